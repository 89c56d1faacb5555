"""What mean tokens tell as soon as there are any: which pictures are almost the same, and what pictures are usual."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.files import atomically
from pipeline.runs import Run, remedy, require
from pipeline.store.reader import ImageTokens, evenly

NEAR = 0.85
"""Cosine of mean tokens, less the mean of the training part, from which on two pictures are of one series.

Measured with EfficientNet-Lite0: of groceries, shot in series, 34 % of a val part by hash have such a picture in train,
of the official test part 1 %; of Flickr's photos none, of the demo's rendered foods none, of its scenes 5 %. 64-bit
difference hashes, which `prepare` could have compared, found 4 % against 0.
"""
SERIES = 0.7
"""Cosine by which `series_of` links pictures: looser, so that nothing of a series is left over.

Groceries, held out in series linked at 0.85, 0.8, 0.75, 0.7: discriminant analysis names 94, 90, 84, 74 % of the val
part, 97 % of one by hash, and 72 to 74 % of the official test part whichever it is.
"""
TOLD = 0.1  # of a part
MOST = {"train": 20_000, "val": 2_000, "test": 2_000}  # pictures looked at: seconds, however large a data set is
KNOWN, HELD_OUT = 1000, 500  # pictures that others are set beside, for training and not


def near_pictures(images: ImageTokens) -> dict[str, tuple[int, int]]:
    """For val and test: how many pictures have one in train that is as near as NEAR, and how many were looked at."""
    pooled = {part: mean_tokens(images, [part], most) for part, most in MOST.items()}
    centre = pooled["train"].mean(0)
    train, found = torch.nn.functional.normalize(pooled["train"] - centre, dim=1), {}
    for part in ("val", "test"):
        own = torch.nn.functional.normalize(pooled[part] - centre, dim=1)
        near = sum(int(((some @ train.T).amax(1) >= NEAR).sum()) for some in own.split(256))
        found[part] = (near, len(own))
    return found


def series_of(images: ImageTokens, cosine: float = SERIES) -> list[str]:
    """For each picture the id of the first one of its series: pictures of a class that are linked by this cosine.

    Memory for mean tokens [n, D], and time of the square of the pictures of a class.
    """
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pooled = mean_tokens(images, [])
    x = torch.nn.functional.normalize(pooled - pooled.mean(0), dim=1)
    first = list(range(len(images)))
    for at in images.rows.groupby(images.rows["label"].fillna("")).indices.values():
        own, pairs = x[at], []
        for start in range(0, len(at), 256):
            pairs.append((own[start : start + 256] @ own.T >= cosine).nonzero() + torch.tensor([start, 0]))
        i, j = torch.cat(pairs).T.numpy()
        _, found = connected_components(coo_array((np.ones(len(i)), (i, j)), shape=(len(at), len(at))), directed=False)
        firsts: dict[int, int] = {}
        for position, number in zip(at, found, strict=True):
            first[position] = firsts.setdefault(int(number), int(position))
    return [images.ids[position] for position in first]


def mean_tokens(images: ImageTokens, parts: Sequence[str], most: int | None = None) -> Tensor:
    """Mean tokens [n, D] of the pictures of some parts, none: of all; of more than `most` of as many, evenly spread."""
    at = [i for part in parts for i in images.split(part)] if parts else list(range(len(images)))
    at = evenly(at, most or len(at))
    means = [images.tokens(at[i : i + 64]).mean(1) for i in range(0, len(at), 64)]
    return torch.cat(means) if means else torch.zeros(0, images.shape[-1])


def sample_of(images: ImageTokens) -> dict[str, Tensor]:
    """Mean tokens, of length 1, of some pictures for training, `known`, and of some `held_out`."""
    parts = {"known": (["train"], KNOWN), "held_out": (["val", "test"], HELD_OUT)}
    return {key: torch.nn.functional.normalize(mean_tokens(images, *part), dim=1) for key, part in parts.items()}


def read_sample(run: Run, data: str) -> dict[str, Tensor]:
    """The same of a data set, as `look` has written it; UserError where it can't be read."""
    path = require(run.sample(data))
    try:
        found = load_file(path)
    except OSError as error:
        raise UserError(path, f"cannot be read ({error.strerror or error})", remedy(path, force=True)) from None
    except SafetensorError:
        found = {}
    known, held_out = (found.get(key, torch.empty(0)) for key in ("known", "held_out"))
    if len(found) != 2 or known.ndim != 2 or known.shape[1:] != held_out.shape[1:]:
        raise UserError(path, "not what `extract-images` writes", remedy(path, force=True))
    return found


def look(params: Params, data: str) -> str | None:
    """Write Run.near and Run.sample of a data set whose tokens are in the store; what to say of it, None if nothing."""
    run = Run.of(params)
    images = ImageTokens.open(run, data)
    found = near_pictures(images) if images.split("train") else {}
    with atomically(run.near(data)) as file:
        file.write((json.dumps(found) + "\n").encode())
    with atomically(run.sample(data)) as file:
        file.write(save(sample_of(images)))
    told = too_near(found)
    if not told:
        return None
    return (
        f"data.{data}: pictures almost the same as one for training, as shots of a series are: {' and '.join(told)}; "
        f"figures there promise too much; {apart(params, data)}"
    )


def too_near(found: Mapping[str, Sequence[int]]) -> list[str]:
    """`6 of 22 in test` for each part that has too many; from what `look` has written."""
    return [f"{near} of {count} in {part}" for part, (near, count) in found.items() if near > TOLD * count]


def apart(params: Params, data: str) -> str:
    """What keeps pictures of one series on one side."""
    blocks = f"set data.{data}.split to blocks; if that does not help, "
    blocks = "" if params.data_set(data).split == "blocks" else blocks
    return f"{blocks}`terraalign series {data}` finds series, and says how to keep each on one side"
