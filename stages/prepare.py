"""Stage prepare: a data set of any layout -> one manifest."""

from __future__ import annotations

import io
import os
from contextlib import nullcontext, redirect_stderr
from typing import Annotated

import typer

from pipeline.config import load_params
from pipeline.progress import new_progress
from stages import DATA, TOLD, timed


def prepare(
    data: Annotated[str, typer.Argument(help=DATA)],
) -> None:
    """Read a data set and write its manifest: one row per picture, with its split.

    Writes data/<profile>/prepare/<data>.parquet, which every later stage reads instead of the data set itself. What
    the data set is stands in params.yaml under data.<data>: `source` is the layout (coco, food101, imagefolder,
    webdataset, or drawings rendered here: openmoji_scenes, openmoji_food), `root` its folder, or `shards` its tars.

    Every picture is decoded once. A broken one is named on stderr and left out, and so is a picture without a caption
    and whatever else cannot be used; data/<profile>/quarantine/<data>.csv lists all of it with the reasons. More broken
    ones than the share data.<data>.max_broken stop the stage after all were looked at, without a manifest. A picture's
    split depends on the hash of its id alone, so pictures added later never move the others; with data.<data>.split:
    blocks, consecutive pictures and groups are held out together. Food-101's lists, and folders train, val and test
    around class folders, decide it themselves.
    """
    params = load_params()
    from pipeline.runs import Run
    from pipeline.sources import manifest  # pyarrow and PIL: not needed to answer --help
    from pipeline.sources.prepare import prepare as read
    from pipeline.sources.texts import number

    run = Run.of(params)

    # `try` has just said what there is to say: the same again, among its stages, would only hide what is new.
    quiet = redirect_stderr(io.StringIO()) if TOLD in os.environ else nullcontext()
    with timed(params, f"prepare@{data}"), new_progress("pictures") as progress, quiet:
        table = read(params, data, progress)
        manifest.check_splits(table, data)
        manifest.write(table, run.manifest(data))
    parts = ", ".join(f"{table['split'].to_pylist().count(name)} {name}" for name in ("train", "val", "test"))
    used = table["quarantine"].null_count
    left_out = f"; {table.num_rows - used} left out, see {run.quarantine(data)}" if used < table.num_rows else ""
    print(f"{run.manifest(data)}: {number(used, 'picture', 'pictures')} ({parts}){left_out}")
