"""Pictures with the same bytes: in one part where that is carved here, and told where it is not, or in two classes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.sources.rows import Row
from pipeline.sources.texts import listed, number

Record = dict[str, Any]
"""A row of manifest.SCHEMA, of which id, image, sha256, label, split and quarantine are read."""


def follow(records: Sequence[Record], rows: Sequence[Row]) -> tuple[list[Record], list[str]]:
    """The records, and what there is to say: those whose part is carved are in that of the first with their bytes.

    Those of a group that is in another part are quarantined, for a group is on one side. Parts that the files of a data
    set give are left. `rows` are those that the records are of.
    """
    first: dict[str, Record] = {}
    mended, moved, left_out = [], list[str](), list[str]()
    for record, row in zip(records, rows, strict=True):
        one = first.setdefault(record["sha256"], record) if row.carved and not record["quarantine"] else record
        if one["split"] == record["split"]:
            mended.append(record)
            continue
        place = f"{record['image']} ({record['split']}) as {one['image']} ({one['split']})"
        (left_out if row.group else moved).append(place)
        reason = f"has the bytes of {one['image']}, which is in another part than its group" if row.group else None
        mended.append({**record, "split": None if row.group else one["split"], "quarantine": reason})
    has = ("picture has the bytes of an earlier one", "pictures have the bytes of an earlier one")
    told = []
    if moved:
        come = [f"{text} and {verb} into its part" for text, verb in zip(has, ("comes", "come"), strict=True)]
        told.append(f"{number(len(moved), *come)}, as testing would see what training saw: {listed(moved)}")
    if left_out:
        told.append(f"{number(len(left_out), *has)} in another part than their group, left out: {listed(left_out)}")
    return mended, told


def pairs(records: Iterable[Record]) -> list[tuple[Record, Record]]:
    """Each picture in use with the bytes of an earlier one, and the first one that has them."""
    first: dict[str, Record] = {}
    used = [record for record in records if not record["quarantine"]]
    return [(record, one) for record in used if (one := first.setdefault(record["sha256"], record)) is not record]


def in_training(records: Iterable[Record]) -> dict[str, tuple[int, int]]:
    """For val and test: how many pictures have the bytes of one for training, and how many there are."""
    used = [record for record in records if not record["quarantine"]]
    seen = {record["sha256"] for record in used if record["split"] == "train"}
    every = Counter(record["split"] for record in used)
    known = Counter(record["split"] for record in used if record["sha256"] in seen)
    return {part: (known[part], every[part]) for part in ("val", "test")}


def mislabelled(records: Iterable[Record]) -> list[str]:
    """The pictures that stand in several classes with the same bytes: `a/1.jpg (a) and b/2.jpg (b)` for each."""
    found: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for record in records:
        if not record["quarantine"] and record["label"] is not None:
            found[record["sha256"]].setdefault(record["label"], record["image"])
    several = (one for one in found.values() if len(one) > 1)
    return [" and ".join(f"{image} ({label})" for label, image in one.items()) for one in several]


def remarks(records: Sequence[Record], listing: Path) -> list[str]:
    """What there is to say of pictures on both sides of a split, or in two classes; `listing` names all of them."""
    said = []
    across = [
        f"{one['image']} ({one['split']}) of {first['image']} ({first['split']})"
        for one, first in pairs(records)
        if one["split"] != first["split"]
    ]
    if across:
        count = number(len(across), "picture has", "pictures have")
        said.append(
            f"{count} the bytes of one in another split, so training may see what is tested: {listed(across)}; remove "
            f"one of each; all: {listing}"
        )
    if wrong := mislabelled(records):
        said.append(f"{in_two_classes(wrong)}; all: {listing}")
    return said


def in_two_classes(wrong: Sequence[str], room: int = 20) -> str:
    """What `mislabelled` found, as one line."""
    count = number(len(wrong), "picture is", "pictures are")
    return f"{count} in two classes, which is a labelling mistake: {listed(wrong, room)}; remove it from the wrong one"


def listing_beside(listing: Path) -> Path:
    """Where copies are listed, beside what is left out."""
    return listing.with_name(f"{listing.stem}-copies.csv")


def lines(records: Iterable[Record]) -> list[list[str]]:
    """id, image and reason of every copy."""
    return [[one["id"], one["image"], _reason(one, first)] for one, first in pairs(records)]


def _reason(one: Record, first: Record) -> str:
    reason = f"has the bytes of {first['image']}"
    if one["label"] != first["label"]:
        reason += f"; labelled {one['label']}, the other {first['label']}: one is wrong"
    return reason + (f"; in {one['split']}, the other in {first['split']}" if one["split"] != first["split"] else "")
