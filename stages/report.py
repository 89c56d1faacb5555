"""Stage report: everything measured -> one page, one flat file of metrics."""

from __future__ import annotations

from pipeline.config import load_params
from stages import timed


def report() -> None:
    """Gather all results into one page.

    Reads what the stages before wrote below data/<profile>/ and writes report/index.html (one file that holds its
    pictures and needs nothing else: send it to anyone), report/convergence.csv (fine-tuning with and without
    pre-training) and metrics.json (flat keys, for `dvc metrics show` and `dvc metrics diff`). Nothing is computed
    anew: an accuracy is the one that the stage evaluate measured. Stages that DVC restored from its cache did not
    run here and have no timing; the page says so.
    """
    params = load_params()
    from rich.console import Console
    from rich.table import Table

    from pipeline.report import report as pages  # pandas and matplotlib: not needed for --help

    with timed(params, "report"):
        page = pages.write_report(params)
    table = Table("figure", "value", title=f"profile {params.profile}", title_justify="left")
    for what, value in pages.main_figures(params):
        table.add_row(what, value)
    Console().print(table)
    print(page)
