"""`terraalign show`: the results that are there, without computing anything."""

from __future__ import annotations

from pipeline.answers.best import not_yet
from pipeline.config import load_params
from pipeline.runs import Run


def show() -> None:
    """Print the main figures of the active profile and the path of its report."""
    params = load_params()
    page = Run.of(params).report / "index.html"
    if not page.is_file():
        raise not_yet(params, page, "no report yet")
    from rich.console import Console

    from pipeline.report.figures import terminal_table
    from pipeline.report.results import read_results

    Console().print(terminal_table(read_results(params)))
    print(f"report: {page}")
