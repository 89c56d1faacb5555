"""`terraalign show`: the results that are there, without computing anything."""

from __future__ import annotations

from pipeline.config import load_params
from pipeline.errors import UserError
from pipeline.runs import Run


def show() -> None:
    """Print the main figures of the active profile and the path of its report."""
    params = load_params()
    page = Run.of(params).report / "index.html"
    if not page.is_file():
        raise UserError(f"{page}: no report yet; run `dvc repro` first")
    from rich.console import Console
    from rich.table import Table

    from pipeline.report.report import main_figures  # pandas and matplotlib: not needed for --help

    table = Table("figure", "value", title=f"profile {params.profile}", title_justify="left")
    for what, value in main_figures(params):
        table.add_row(what, value)
    Console().print(table)
    print(f"report: {page}")
