"""`terraalign series`: which pictures are of one series, by their image tokens."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

from pipeline.config import Params, load_params
from pipeline.runs import Run
from stages import DATA
from stages.profile import PARAMS, PROFILES, write_params


def series(
    data: Annotated[str, typer.Argument(help=DATA)],
    use: Annotated[bool, typer.Option("--use", help="Set them so, in the profile and in params.yaml.")] = False,
) -> None:
    """Find series of near pictures by their image tokens, so that validation has none that training all but saw.

    Writes data/<profile>/series/<data>.csv, of the columns id and group, and says which parameters keep each series on
    one side: data.<data>.groups set to that file, and split to blocks; no picture is encoded again.
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
    print(f"{path}: {found}")
    profile = PROFILES / f"{params.profile}.yaml"
    targets = [profile, PARAMS] if profile.is_file() else [PARAMS]
    lines, listed = _lines(params, data), " and ".join(map(str, targets))
    if use:
        for target in targets:
            write_params(target, [f"data.{data}.{key}={value}" for key, value in lines.items()], target)
        print(f"{listed} keep each on one side now; next: `terraalign run`")
        return
    wanted = " and ".join(f"data.{data}.{key}: {value}" for key, value in lines.items())
    print(
        f"to keep each on one side, have {wanted} in {listed}: `terraalign series {data} --use`, then `terraalign run`"
    )


def _lines(params: Params, data: str) -> dict[str, str]:
    """What has `prepare` keep each series on one side: values of the data set's section, which `try` keeps."""
    settings, path = params.data_set(data), Run.of(params).series(data)
    lines = {"split": "blocks", "groups": path.as_posix()}
    if settings.split == "blocks" and settings.groups == path:  # DVC knows nothing of the file
        lines["seen"] = datetime.now().isoformat(" ", "seconds")
    return lines
