"""`terraalign series`: which pictures are of one series, by their image tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
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
    cosine: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="How alike two pictures of a class are in one series: more finds fewer and shorter ones; 0.7.",
        ),
    ] = None,
) -> None:
    """Find series of near pictures by their image tokens, so that validation has none that training all but saw.

    Writes data/<profile>/series/<data>.csv, of the columns id and group, and says which parameters keep each series on
    one side: data.<data>.groups set to that file, and split to blocks; no picture is encoded again.
    """
    params = load_params()
    run = Run.of(params)
    import pandas as pd

    from pipeline.extraction.near import SERIES, series_of
    from pipeline.files import atomically
    from pipeline.sources.texts import listed, number
    from pipeline.store.reader import ImageTokens

    images = ImageTokens.open(run, data)
    cosine = SERIES if cosine is None else cosine
    groups, path = series_of(images, cosine), run.series(data)
    with atomically(path) as file:
        file.write(pd.DataFrame({"id": images.ids, "group": groups}).to_csv(index=False).encode())
    found = f"{number(len(images), 'picture', 'pictures')} in {len(set(groups))} series"
    print(f"{path}: {found}")
    whole = _one_series(images.rows["label"].tolist(), groups)
    if whole:
        print(
            f"{number(len(whole), 'class is', 'classes are')} one series each, so validation would have none of their "
            f"pictures: {listed(whole)}; `--cosine {(1 + cosine) / 2:.2f}` finds shorter ones"
        )
    profile = PROFILES / f"{params.profile}.yaml"
    targets = [profile, PARAMS] if profile.is_file() else [PARAMS]
    lines, places = _lines(params, data), " and ".join(map(str, targets))
    if use:
        for target in targets:
            write_params(target, [f"data.{data}.{key}={value}" for key, value in lines.items()], target)
        print(f"{places} keep each on one side now; next: `terraalign run`")
        return
    wanted = " and ".join(f"data.{data}.{key}: {value}" for key, value in lines.items())
    print(
        f"to keep each on one side, have {wanted} in {places}: `terraalign series {data} --use`, then `terraalign run`"
    )


def _one_series(labels: Sequence[str | None], groups: Sequence[str]) -> list[str]:
    """The classes whose pictures are all of one series."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for label, group in zip(labels, groups, strict=True):
        if label is not None:
            found[label].add(group)
    return sorted(label for label, series in found.items() if len(series) == 1)


def _lines(params: Params, data: str) -> dict[str, str]:
    """What has `prepare` keep each series on one side: values of the data set's section, which `try` keeps."""
    settings, path = params.data_set(data), Run.of(params).series(data)
    lines = {"split": "blocks", "groups": path.as_posix()}
    if settings.split == "blocks" and settings.groups == path:  # DVC knows nothing of the file
        lines["seen"] = datetime.now().isoformat(" ", "seconds")
    return lines
