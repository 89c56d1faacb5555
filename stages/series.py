"""`terraalign series`: which pictures are of one series, by their image tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.config import Params, load_params
from pipeline.runs import Run
from stages import DATA
from stages.profile import PARAMS, PROFILES, write_params

if TYPE_CHECKING:
    from pipeline.store.reader import ImageTokens


def series(
    data: Annotated[str, typer.Argument(help=DATA)],
    use: Annotated[bool, typer.Option("--use", help="Set them so, in the profile and in params.yaml.")] = False,
    cosine: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="How alike two pictures of one series are, 0.7 where left out; the more, the shorter are series.",
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
    groups, path = series_of(images, SERIES if cosine is None else cosine), run.series(data)
    with atomically(path) as file:
        file.write(pd.DataFrame({"id": images.ids, "group": groups}).to_csv(index=False).encode())
    found = f"{number(len(images), 'picture', 'pictures')} in {len(set(groups))} series"
    print(f"{path}: {found}")
    again = f"terraalign series {data}"
    if whole := _one_series(images, groups):
        closer = f"{(1 + (SERIES if cosine is None else cosine)) / 2:.2f}"
        shorter = f"; `{again} --cosine {closer}` finds shorter ones" if float(closer) > (cosine or SERIES) else ""
        print(
            f"all pictures for training of {number(len(whole), 'class are', 'classes are')} one series, so validation "
            f"would have none of them: {listed(whole)}{shorter}"
        )
    again += "" if cosine is None else f" --cosine {cosine:g}"
    profile = PROFILES / f"{params.profile}.yaml"
    targets = [profile, PARAMS] if profile.is_file() else [PARAMS]
    lines, places = _lines(params, data), " and ".join(map(str, targets))
    if use:
        for target in targets:
            write_params(target, [f"data.{data}.{key}={value}" for key, value in lines.items()], target)
        print(f"{places} keep each on one side now; next: `terraalign run`")
        return
    wanted = " and ".join(f"data.{data}.{key}: {value}" for key, value in lines.items())
    print(f"to keep each on one side, have {wanted} in {places}: `{again} --use`, then `terraalign run`")


def _one_series(images: ImageTokens, groups: Sequence[str]) -> list[str]:
    """The classes whose pictures that may be held out for validation, several, are all of one series."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for label, part, group in zip(images.rows["label"], images.rows["split"], groups, strict=True):
        if isinstance(label, str) and part in ("train", "val"):
            found[label].append(group)
    return sorted(label for label, series in found.items() if len(series) > 1 == len(set(series)))


def _lines(params: Params, data: str) -> dict[str, str]:
    """What has `prepare` keep each series on one side: values of the data set's section, which `try` keeps."""
    settings, path = params.data_set(data), Run.of(params).series(data)
    lines = {"split": "blocks", "groups": path.as_posix()}
    if settings.split == "blocks" and settings.groups == path:  # DVC knows nothing of the file
        lines["seen"] = datetime.now().isoformat(" ", "seconds")
    return lines
