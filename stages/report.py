"""Stage report: everything measured -> one page, one flat file of metrics."""

from __future__ import annotations

from pipeline.config import load_params
from stages import timed


def report() -> None:
    """Gather all results into one page.

    Reads what the stages before wrote below data/<profile>/ and writes report/index.html (one file that holds its
    pictures and needs nothing else: send it to anyone), report/convergence.csv (fine-tuning with and without
    pre-training) and metrics.json (flat keys, for `dvc metrics show` and `dvc metrics diff`). Nothing is computed
    anew: an accuracy is the one that the stage evaluate measured, and a figure that it did not measure is not shown.
    Stages that DVC restored from its cache did not run here and have no timing; the page says so.
    """
    params = load_params()
    from pipeline.report.page import write_report  # pandas and matplotlib: not needed for --help
    from pipeline.report.results import read_results
    from pipeline.report.verdict import tell

    with timed(params, "report"):
        results = read_results(params)
        page = write_report(results)
    tell(results)
    print(page)
