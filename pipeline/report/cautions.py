"""What makes figures of a data set promise too much: test pictures that training all but saw."""

from __future__ import annotations

import json

import pyarrow.parquet as pq

from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.runs import Run, remedy
from pipeline.sources import copies
from pipeline.sources.texts import number


def caution(params: Params, data: str) -> str:
    """One sentence with its remedy, from what `prepare` and `extract_images` found; nothing where they found nothing.

    Raises UserError naming the stage of a file that cannot be read.
    """
    found = [*_near(params, data), *_copies(params, data)]
    if not found:
        return ""
    said, remedies = zip(*found, strict=True)
    return f"These figures promise too much: {', and '.join(said)}. Remedy: {'; and '.join(remedies)}."


def _near(params: Params, data: str) -> list[tuple[str, str]]:
    """Pictures almost the same as one for training, in a part that has many, and what helps."""
    path = Run.of(params).near(data)
    if not path.exists():
        return []  # of a run before it was written
    from pipeline.extraction import near  # torch

    try:
        told = near.too_near(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError):
        raise UserError(path, "not what `extract-images` writes", remedy(path, force=True)) from None
    what = f"{' and '.join(told)} are almost the same as a picture for training, as shots of a series are"
    return [(what, near.apart(params, data))] if told else []


def _copies(params: Params, data: str) -> list[tuple[str, str]]:
    """Test pictures that have the bytes of one for training, and what helps."""
    path = Run.of(params).manifest(data)
    if not path.exists():
        return []
    columns = ["id", "sha256", "split", "quarantine"]
    again, of = copies.in_training(pq.read_table(path, columns=columns).to_pylist())["test"]
    if not again:
        return []
    listing = copies.listing_beside(Run.of(params).quarantine(data))
    is_one = number(again, f"of {of} test pictures is", f"of {of} test pictures are")
    return [(f"{is_one} in training, too, byte for byte", f"remove one of each pair that {listing} lists")]
