"""`terraalign show`: the results that are there, without computing anything."""

from __future__ import annotations

from pipeline.answers.best import not_yet
from pipeline.config import load_params
from pipeline.runs import Run


def show() -> None:
    """Print what came of it in words, the main figures of the active profile and the path of its report."""
    params = load_params()
    page = Run.of(params).report / "index.html"
    if not page.is_file():
        raise not_yet(params, page, "no report yet")
    from pipeline.report.results import read_results
    from pipeline.report.verdict import tell

    tell(read_results(params))
    print(f"report: {page}")
