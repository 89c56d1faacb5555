"""`terraalign study`: adapters, methods and seeds side by side, each an ordinary run of the graph."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
import yaml

from pipeline.config import parse_params, read_yaml
from pipeline.config.study import Cell, Study, fitted, parameters_of, parse_study, profile_of
from pipeline.errors import UserError, UserErrors
from pipeline.files import atomically
from pipeline.runs import RESULTS, Run
from stages.run import run_stages, stages_of_graph

PARAMS = Path("params.yaml")
KEPT = "params-before.yaml"


def study(
    file: Annotated[Path, typer.Argument(help="What is compared.")] = Path("study.yaml"),
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORD",
            help="Only trainings of which a part is so called: an adapter, a method, a seed, or 60s; steps are those "
            "after equal steps. Repeatable: all of these, e.g. --only mlp --only 17.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Stages side by side, each on a core.")] = 2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Name and reckon the trainings, and run none.")] = False,
    page: Annotated[bool, typer.Option("--page", help="Write the page of what is there, and run nothing.")] = False,
) -> None:
    """Compare adapters and ways to train them on the data of params.yaml, e.g. `terraalign study --only mlp`.

    Each training of study.yaml (adapter x method x seed, after equal steps and equal seconds) is an adapter of the
    profile <profile>-study: pre-trained, fine-tuned and evaluated by the graph's own stages, so that what is done is
    never done again, an interrupted study goes on, and any part of it may run first. One that fails is told at the end,
    and the others go on. Writes data/<profile>-study/study.html and study.csv, a row for each training.
    """
    text, at_work = _own_parameters()
    if at_work and not (page or dry_run):
        raise UserError("", "a study is at work in this folder", "wait for it; --page shows what is there so far")
    whole, own = parse_study(_read(file), str(file)), read_yaml(text, str(PARAMS))
    compared, left_out = fitted(whole, own)
    _check_words(whole, compared, only or [])
    values = parameters_of(compared, own)
    if left_out:
        typer.echo(f"left out of {file}: {'; '.join(left_out)}", err=True)
    cells = _chosen(compared, only or [])
    active = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    params = parse_params(active, f"{file} with {PARAMS}")
    if dry_run:
        typer.echo("\n".join(cell.name for cell in cells))
        typer.echo(_costs(Run.of(params), cells, compared.recipes), err=True)
        return
    faults = [] if page else _run(active, compared, cells, jobs)
    from pipeline.report.study import write_study

    try:
        typer.echo(write_study(params, compared))
    except UserError as error:
        faults.append(error)
    if faults:
        raise UserErrors([*faults, UserError("", "mend it, and run the same command again: it goes on from there")])


def _costs(run: Run, cells: list[Cell], recipes: Iterable[str]) -> str:
    """How many trainings there are, and what those that have not run will take by those that have."""
    from pipeline.report.figures import duration
    from pipeline.report.results import timed
    from pipeline.sources.texts import number

    stages = [list(cell.stages(recipes)) for cell in cells]
    seconds = [[timed(run.seconds(stage)).get("seconds") for stage in some] for some in stages]
    known = [sum(filter(None, some)) for some in seconds if None not in some]
    told = f"{number(len(cells), 'training', 'trainings')}, {len(known)} of them run here before"
    left = len(cells) - len(known)
    if not known or not left:
        return told
    rest = duration(left * sum(known) / len(known))
    return f"{told}; the other {left} take {rest}, one after the other, if they take as long each"


def _check_words(whole: Study, compared: Study, only: list[str]) -> None:
    """UserError for a word that no training of a study has, with those of the trainings that are compared."""
    unknown = [word for word in only if not any(word in cell.parts for cell in whole.cells())]
    if unknown:
        raise _no_such(compared, unknown)


def _chosen(compared: Study, only: list[str]) -> list[Cell]:
    """The trainings that have all of these parts; UserError when there is none."""
    cells = compared.cells()
    found = [cell for cell in cells if set(only) <= cell.parts]
    if not found:
        raise _no_such(compared, only)
    return found


def _no_such(compared: Study, only: list[str]) -> UserError:
    known = dict.fromkeys(part for cell in compared.cells() for part in sorted(cell.parts - {cell.name}))
    return UserError(f"--only {' '.join(only)}", f"no such training; there are {', '.join(known)}")


def _run(active: str, compared: Study, cells: list[Cell], jobs: int) -> list[UserError]:
    """Run some trainings, with what they need before them, one whole after the other; returns what failed."""
    own = {stage: number for number, cell in enumerate(cells) for stage in cell.stages(compared.recipes)}
    with _active(active):
        graph = stages_of_graph()
        wanted, found = list(own), dict[str, list[str]]()
        while wanted:
            stage = wanted.pop()
            if stage not in found:
                found[stage] = graph[stage]
                wanted += graph[stage]
        # On a core each: equal seconds are no others where more, or none, run beside.
        return run_stages(found, jobs, lambda stage: -own.get(stage, -1), go_on=True, threads=1)


@contextmanager
def _active(text: str) -> Iterator[None]:
    """Have params.yaml say this for a while: DVC reads no other file."""
    kept = RESULTS / profile_of(read_yaml(_read(PARAMS), str(PARAMS))["profile"]) / KEPT
    kept.parent.mkdir(parents=True, exist_ok=True)
    _write(kept, _read(PARAMS))
    with kept.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as long as this process lives: what a killed one leaves is not locked
        try:
            _write(PARAMS, text)
            yield
        finally:
            _write(PARAMS, _read(kept))
            kept.unlink()


def _own_parameters() -> tuple[str, bool]:
    """What params.yaml says but for a study, and whether one is at work; it is put back where one was killed."""
    for kept in RESULTS.glob(f"*/{KEPT}"):
        with kept.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return _read(kept), True
            _write(PARAMS, _read(kept))
            kept.unlink()
        typer.echo(f"{PARAMS} is again what it was before a study that was killed", err=True)
    return _read(PARAMS), False


def _write(path: Path, text: str) -> None:
    with atomically(path) as file:
        file.write(text.encode())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(path, f"cannot be read as text: {error}") from None
