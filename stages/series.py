"""`terraalign series`: which pictures are of one series, by their image tokens."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.config import load_params
from pipeline.runs import Run
from stages import DATA


def series(data: Annotated[str, typer.Argument(help=DATA)]) -> None:
    """Find series of near pictures by their image tokens, so that validation has none that training all but saw.

    Writes data/<profile>/series/<data>.csv, of the columns id and group. With data.<data>.groups set to that file and
    data.<data>.split to blocks, `dvc repro` keeps each series on one side; no picture is encoded again.
    """
    run = Run.of(load_params())
    import pandas as pd

    from pipeline.extraction.near import series_of
    from pipeline.files import atomically
    from pipeline.store.reader import ImageTokens

    images = ImageTokens.open(run, data)
    groups, path = series_of(images), run.series(data)
    with atomically(path) as file:
        file.write(pd.DataFrame({"id": images.ids, "group": groups}).to_csv(index=False).encode())
    found = f"{len(images)} pictures in {len(set(groups))} series"
    print(f"{path}: {found}; set data.{data}.groups to it, and data.{data}.split to blocks")
