"""`terraalign series`: which pictures are of one series, by their image tokens."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated

import typer

from pipeline.config import Params, load_params
from pipeline.runs import Run
from stages import DATA
from stages.profile import PARAMS, PROFILES


def series(data: Annotated[str, typer.Argument(help=DATA)]) -> None:
    """Find series of near pictures by their image tokens, so that validation has none that training all but saw.

    Writes data/<profile>/series/<data>.csv, of the columns id and group, and says which lines of the profile have each
    series on one side: data.<data>.groups set to that file, and split to blocks; no picture is encoded again.
    """
    params = load_params()
    run = Run.of(params)
    import pandas as pd

    from pipeline.extraction.near import series_of
    from pipeline.files import atomically
    from pipeline.sources.texts import number
    from pipeline.store.reader import ImageTokens

    images = ImageTokens.open(run, data)
    groups, path = series_of(images), run.series(data)
    with atomically(path) as file:
        file.write(pd.DataFrame({"id": images.ids, "group": groups}).to_csv(index=False).encode())
    found = f"{number(len(images), 'picture', 'pictures')} in {len(set(groups))} series"
    print(f"{path}: {found}\n{_remedy(params, data)}")


def _remedy(params: Params, data: str) -> str:
    """What has `prepare` keep each series on one side: the lines of the profile, which `try` keeps, and the command."""
    settings, path = params.data_set(data), Run.of(params).series(data)
    lines = {"split": "blocks", "groups": path.as_posix()}
    if settings.split == "blocks" and settings.groups == path:  # DVC knows nothing of the file
        lines = {"seen": json.dumps(datetime.now().isoformat(" ", "seconds"))}
    profile = PROFILES / f"{params.profile}.yaml"
    target = profile if profile.is_file() else PARAMS
    use = f"`terraalign profile use {params.profile}`, " if target == profile else ""
    return (
        f"to keep each on one side, have these lines in {target}, in place of those of the same names:\n"
        f"data:\n  {data}:\n"
        + "".join(f"    {key}: {value}\n" for key, value in lines.items())
        + f"then {use}`terraalign run`"
    )
