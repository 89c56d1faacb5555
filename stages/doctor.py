"""`terraalign doctor`: is everything here that the active profile needs?"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from pipeline.config import load_params

if TYPE_CHECKING:
    from pipeline.doctor.checks import Diagnosis


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as one JSON object.")] = False,
) -> None:
    """Say what the active profile needs, what is missing and how to get it; `terraalign plan` says what a run costs.

    Exit code 0: everything is there; 1: something is missing. Downloads nothing.
    """
    params = load_params()
    from pipeline.doctor.checks import diagnose

    found = diagnose(params)
    if as_json:
        typer.echo(json.dumps({"ok": found.ok, **asdict(found)}, indent=1))
    else:
        _show(found)
    raise typer.Exit(0 if found.ok else 1)


def _show(found: Diagnosis) -> None:
    console = Console(highlight=False)
    console.width = min(console.width, 100)
    needs = Table("", title=f"profile {found.profile}", title_justify="left")
    for heading in ("needed", "found"):
        needs.add_column(heading, overflow="fold")  # a path must not lose its end
    for check in found.checks:
        needs.add_row("[green]ok[/]" if check.ok else "[red]missing[/]", check.name, check.found)
    console.print(needs, found.hub, sep="\n")
    for check in found.checks:
        if not check.ok:
            # Not wrapped by rich: a command must survive copying.
            typer.echo(f"{check.name}: {check.remedy}")
