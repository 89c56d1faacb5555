"""`terraalign plan`: what the graph would run, and what that takes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pipeline.config import Params, load_params
from pipeline.errors import UserError
from pipeline.files import atomically
from pipeline.runs import Run
from stages.run import lengths, stale_stages

if TYPE_CHECKING:
    from pipeline.plan.rows import Rows

WITHIN = 0.25  # share by which the sum may be off


def plan(
    jobs: Annotated[int, typer.Option(min=1, help="Stages side by side, as `terraalign run` has them.")] = 2,
    check: Annotated[bool, typer.Option("--check", help="Compare the last plan with what its stages took.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what `terraalign run` would do now, stage by stage, and what it takes: pictures, bytes, time, memory.

    DVC says what is stale. How long that takes is reckoned from measurements of some 15 s on this machine: encoder,
    decoding, a step of each adapter with its objective, a step of fine-tuning, writing with the language model. The
    store is asked what is in it. Keeps the plan in data/<profile>/plan.json; --check compares it with the timings of
    the stages that ran since. E.g. `terraalign plan`, `terraalign run`, `terraalign plan --check`.
    """
    params = load_params()
    found = _checked(Run.of(params)) if check else planned(params, jobs)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    elif check:
        _show_check(found)
    else:
        show(found)


def planned(params: Params, jobs: int, counted: dict[str, Rows] | None = None) -> dict[str, Any]:
    """The plan for the active parameters, which is kept, too; without stages where nothing is to be done.

    `counted`: how much there is of the data sets, where that is known before they are prepared.
    """
    from pipeline.plan.rows import rows_of

    began = time.monotonic()
    graph, stale = stale_stages()
    if not stale:
        return {"profile": params.profile, "stages": {}, "sum": 0.0, "wall": 0.0}
    idle = time.monotonic() - began
    rows = counted or {name: rows_of(params, name) for name in params.run.data}
    found = reckoned(params, jobs, rows, graph, stale, idle)
    with atomically(_path(Run.of(params))) as file:
        file.write(json.dumps(found, indent=1).encode())
    return found


def reckoned(
    params: Params, jobs: int, rows: dict[str, Rows], graph: dict[str, list[str]], stale: set[str], idle: float
) -> dict[str, Any]:
    """What some stages of the graph would take; DVC takes `idle` seconds for each besides."""
    from pipeline.plan.calibrate import calibrate
    from pipeline.plan.estimate import Machine
    from pipeline.plan.schedule import times

    typer.echo("measuring this machine for the plan: about 15 s, longer beside other work", err=True)
    began = time.monotonic()
    language, vision = calibrate(params, rows, jobs)
    measured = time.monotonic() - began
    machine = Machine(params, rows, language, vision)
    wanted = {stage: machine.estimate(stage) for stage in graph if stage in stale}
    seconds, wall = times(graph, wanted, idle, jobs, os.cpu_count() or 1, lengths(graph).__getitem__)
    return {
        "profile": params.profile,
        "at": time.time(),
        "counted": all(one.counted for one in rows.values()),
        "measured": measured,
        "stages": {
            stage: {"seconds": seconds[stage], "rows": one.rows, "bytes": one.bytes, "peak_bytes": one.peak}
            for stage, one in wanted.items()
        },
        "stored": vision.stored,
        "sum": sum(seconds.values()),
        "wall": wall,
        "speeds": {"language": asdict(language), "vision": asdict(vision)},
    }


def show(found: Mapping[str, Any]) -> None:
    """A plan as a table."""
    if not found["stages"]:
        typer.echo(f"profile {found['profile']}: nothing to do, everything is up to date")
        return
    table = Table("stage", title=f"profile {found['profile']}: what would run", title_justify="left")
    for heading in ("pictures", "writes", "time", "memory"):
        table.add_column(heading, justify="right")
    for stage, one in found["stages"].items():
        cells = (f"{one['rows']:,}" if one["rows"] else "", _size(one["bytes"]), _time(one["seconds"]))
        table.add_row(stage, *cells, _size(one["peak_bytes"]))
    Console(highlight=False).print(table)
    for data, count in found["stored"].items():
        if count:
            typer.echo(f"{data}: image tokens of {count:,} pictures are in the store")
    rough = "" if found["counted"] else "; pictures were not counted yet, so roughly"
    typer.echo(f"in all {_time(found['sum'])} of stages, {_time(found['wall'])} on the clock{rough}")
    measured = f"the {found['measured']:.0f} s of measuring for this plan"
    typer.echo(f"of stages alone; not in it: {measured}, and the first look at the pictures that `try` takes")
    typer.echo("at most, as what comes out the same stops the rest; but other work on this machine delays it")


def _path(run: Run) -> Path:
    return run.base / "plan.json"


def _checked(run: Run) -> dict[str, Any]:
    """The last plan beside what the stages took that ran since."""
    path = _path(run)
    if not path.is_file():
        raise UserError(path, "no plan yet", "`terraalign plan`, `terraalign run`, and then --check")
    kept = json.loads(path.read_text(encoding="utf-8"))
    stages = {
        stage: {"planned": one["seconds"], "took": took["seconds"], "planned_peak": one["peak_bytes"], "peak": peak}
        for stage, one, took in _ran_since(run, kept)
        for peak in [took.get("peak_bytes")]
    }
    if not stages:
        raise UserError(path, "none of its stages ran since", "`terraalign run` first")
    planned, took = (sum(one[key] for one in stages.values()) for key in ("planned", "took"))
    return {"profile": kept["profile"], "stages": stages, "planned": planned, "took": took, "ratio": planned / took}


def _ran_since(run: Run, kept: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for stage, one in kept["stages"].items():
        path = run.seconds(stage)
        if path.is_file() and path.stat().st_mtime > kept["at"]:
            yield stage, one, json.loads(path.read_text(encoding="utf-8"))


def _show_check(found: Mapping[str, Any]) -> None:
    table = Table("stage", title=f"profile {found['profile']}: the plan and what came", title_justify="left")
    for heading in ("planned", "took", "memory planned", "held"):
        table.add_column(heading, justify="right")
    for stage, one in found["stages"].items():
        sizes = _size(one["planned_peak"]), _size(one["peak"]) if one["peak"] else ""
        table.add_row(stage, _time(one["planned"]), _time(one["took"]), *sizes)
    Console(highlight=False).print(table)
    off = found["ratio"] - 1
    said = f"planned {_time(found['planned'])} in all, took {_time(found['took'])}: {100 * abs(off):.0f} % too"
    verdict = "within" if abs(off) <= WITHIN else "more than"
    typer.echo(
        f"{said} {'much' if off > 0 else 'little'} planned, {verdict} the {100 * WITHIN:.0f} % that are aimed at"
    )
    if abs(off) > WITHIN:
        typer.echo("other work on the machine, while it was measured or while the stages ran, may be why")


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
