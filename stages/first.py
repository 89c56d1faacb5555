"""`terraalign try` and `init`: from a folder of pictures to a profile, and to a page with answers."""

from __future__ import annotations

import os
import sys
import time
import webbrowser
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.config import Params, check_project, load_params, parse_params, read_yaml
from pipeline.errors import UserError
from pipeline.files import atomically
from pipeline.progress import new_progress
from pipeline.runs import Run
from pipeline.sources.texts import number
from stages import TOLD
from stages.plan import planned, reckoned, show
from stages.profile import PARAMS, PROFILES, changed, write_params
from stages.run import stages_with, stale_stages

if TYPE_CHECKING:
    from pipeline.first.layout import Layout
    from pipeline.plan.rows import Rows

JOBS = 2  # stages side by side
FEW = 20  # test pictures
KEPT = Path("params-before.yaml")
FOLDER = typer.Argument(metavar="FOLDER", help="Pictures in a folder per class, or with a file of captions, or both.")
NAME = typer.Option("--name", help="What the profile is called; else after the folder.")
YES = typer.Option("--yes", "-y", help="Ask nothing, take the defaults; without a terminal nothing is asked anyway.")
DRY = typer.Option("--dry-run", help="Say what is there and what a run would take; write only what is left out.")


def try_(
    folder: Annotated[Path, FOLDER],
    name: Annotated[str | None, NAME] = None,
    yes: Annotated[bool, YES] = False,
    dry_run: Annotated[bool, DRY] = False,
) -> None:
    """From a folder of own pictures to a page with answers, e.g. `terraalign try ~/pictures/birds`.

    Recognises class folders (FOLDER/<class>/*.jpg), a file of captions (COCO JSON, JSON Lines, CSV of file and text),
    or both; says how many pictures there are, which are broken, copied or rare; writes profiles/NAME.yaml, sized for a
    first look within minutes, with a plan; runs the graph, and opens its page. A profile of that name that is there is
    kept as it is, with what you changed in it. The same command again goes on where it was interrupted.
    """
    asks = _asks(yes)
    begun = _begin(folder, name, asks, dry_run, "try")
    if begun is None:
        return
    params, is_stale = begun
    if is_stale:
        if asks and not typer.confirm("run it?", default=True):
            return
        from pipeline.plan.machine import cuda
        from stages.run import run

        os.environ[TOLD] = "1"
        try:
            run(jobs=1 if cuda(params.runtime.device)[0] else JOBS)
        finally:
            del os.environ[TOLD]
    page = (Run.of(params).report / "index.html").resolve()
    tasks = sorted({one.task for one in params.data.values()})
    ways = [f"`terraalign {task} PHOTO`" for task in tasks if task in ("caption", "classify")]
    typer.echo(f"the page: {page}\nnext: {', '.join(ways)}, `terraalign serve`")
    if sys.stdout.isatty():
        webbrowser.open(page.as_uri())


def init(
    folder: Annotated[Path, FOLDER],
    name: Annotated[str | None, NAME] = None,
    yes: Annotated[bool, YES] = False,
    dry_run: Annotated[bool, DRY] = False,
) -> None:
    """Write a profile for a folder of own pictures and run nothing, e.g. `terraalign init ~/pictures/birds`.

    All that `terraalign try` does before the run: what it recognises, says and writes. The profile becomes params.yaml;
    `terraalign plan` says what running it will cost, `terraalign run` runs it.
    """
    begun = _begin(folder, name, _asks(yes), dry_run, "init")
    if begun and begun[1]:
        typer.echo("next: `terraalign run`")


def _asks(yes: bool) -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty() and not yes


def _begin(folder: Path, name: str | None, asks: bool, dry_run: bool, command: str) -> tuple[Params, bool] | None:
    """Recognise, say, write and take the profile, and plan: the parameters, and whether there is something to run.

    None where that was to be said only.
    """
    check_project()
    from pipeline.first.layout import recognise
    from pipeline.first.profile import checked_name, fitted, name_of, of_same

    folder = folder.expanduser().resolve()
    if Path.cwd().resolve().is_relative_to(folder):
        raise UserError(folder, "this project is in it", "name a folder that holds your pictures alone")
    profile = checked_name(name) if name is not None else name_of(folder)
    layout = recognise(folder)
    typer.echo("\n".join([*(one.said for one in layout.sets.values()), *(f"not used: {one}" for one in layout.unused)]))
    layout = _asked(layout) if asks else layout
    path = PROFILES / f"{profile}.yaml"
    with new_progress("pictures") as progress:
        is_there = path.is_file()
        if is_there:
            text, looks = path.read_text(encoding="utf-8"), of_same(load_params(path), layout, path, progress)
        else:
            text, looks = fitted(layout, profile, folder, command, progress)
    seen = [f"data.{data}.seen" for data, look in looks.items() if is_there and look.news]
    if seen:
        text, _ = changed(text, read_yaml(text, str(path)), [f"{key}={layout.seen}" for key in seen])
    for data, look in looks.items():
        typer.echo("\n".join(f"{data}: {said if what == data else f'{what}: {said}'}" for what, said in look.lines()))
    params = parse_params(text, str(path))
    kept = f", as it is there already{', but for ' if seen else ''}{', '.join(seen)}" if is_there else ""
    typer.echo(f"{'would write ' if dry_run and not is_there else ''}profile {path}{kept}")
    tasks = {one.task for one in params.data.values()}
    for name in (name for name, one in layout.sets.items() if one.section["task"] not in tasks):
        typer.echo(f"not in it, as it was not there: {name}; to have it, take another --name, or remove {path}")
    rows = {data: look.rows for data, look in looks.items()}
    _warn_of_few(rows)
    if dry_run:
        _show_plan(params, text, rows)
        typer.echo("next: the same without --dry-run")
        return None
    _take(path, text)
    found = planned(params, JOBS, rows)
    show(found)
    return params, bool(found["stages"])


def _warn_of_few(rows: dict[str, Rows]) -> None:
    for data, one in rows.items():
        if one.test < FEW:
            few = number(one.test, "test picture", "test pictures")
            typer.echo(
                f"warning: {data}: {few}: figures will say little; give more, twenty of a kind at least", err=True
            )


def _show_plan(params: Params, text: str, rows: dict[str, Rows]) -> None:
    """Of a profile with this text, which need not be the active one."""
    if PARAMS.is_file() and PARAMS.read_text(encoding="utf-8") == text and not stale_stages()[1]:
        show({"profile": params.profile, "stages": {}})
        return
    began, graph = time.monotonic(), stages_with(text)
    show(reckoned(params, JOBS, rows, graph, set(graph), time.monotonic() - began))


def _asked(layout: Layout) -> Layout:
    """Where pictures have captions and lie in several folders, these may be classes or not."""
    unclear = len(layout.sets) == 2 and layout.sets["classes"].section["source"] == "imagefolder"
    if not unclear or typer.confirm("are these folders named after what is in their pictures?", default=True):
        return layout
    return replace(layout, sets={"captions": layout.sets["captions"]})


def _lost(before: bytes, path: Path, text: str) -> str:
    """What there is to say of values that params.yaml had, as by `profile use --set`, and the profile has not."""
    with suppress(UserError, UnicodeDecodeError):
        old, new = read_yaml(before.decode(), str(PARAMS)), read_yaml(text, str(path))
        if old.get("profile") == path.stem and (lines := _changes(old, new)):
            return f"; to have them from now on, put these lines into {path}:\n{lines}"
    return ""


def _changes(values: dict[str, Any], others: dict[str, Any]) -> str:
    """The lines of YAML that others lack to be as values are."""
    import yaml

    def of(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        both = {key: (value, other.get(key)) for key, value in one.items() if key not in other or value != other[key]}
        found = {
            key: of(own, their) if isinstance(own, dict) and isinstance(their, dict) else own
            for key, (own, their) in both.items()
            if key != "seen"  # it is this command's own
        }
        return {key: value for key, value in found.items() if value != {}}

    found = of(values, others)
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True).rstrip() if found else ""


def _take(path: Path, text: str) -> None:
    """Write a profile and make it the active one, and say how to go back; parameters that are no profile's are kept."""
    before = PARAMS.read_bytes() if PARAMS.is_file() else None
    same = next((one.stem for one in sorted(PROFILES.glob("*.yaml")) if one.read_bytes() == before), None)
    if before is not None and same is None:
        KEPT.write_bytes(before)
        typer.echo(f"params.yaml had changes of its own: they are kept in {KEPT}{_lost(before, path, text)}")
    with atomically(path) as file:
        file.write(text.encode())
    write_params(path, [])
    if same != path.stem:
        back = f"; back: `terraalign profile use {same or KEPT}`" if before is not None else ""
        typer.echo(f"the active profile is now {path.stem}: `run`, `plan`, `classify`, `serve` are about it{back}")
