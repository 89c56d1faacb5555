"""The parts of a data set where its files do not give them: by the hash of each id, or in blocks by order and group."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import accumulate, chain
from pathlib import Path

from pipeline.errors import UserError
from pipeline.sources.rows import Found, Row, share
from pipeline.sources.texts import listed

BLOCK = 32  # pictures: longer than most series, and short enough for many blocks in a large data set
Shares = Mapping[str, float]
"""The share of each part, which sum to 1; by hash the last one takes what the others leave."""
_NUMBER = re.compile("([0-9]+)")


def assign(found: Found, how: str, section: str) -> tuple[list[Row], list[str]]:
    """The rows, all with a part, and what there is to say; `how` is hash or blocks.

    Rows that have a part keep it. Raises UserError for blocks where the source leaves nothing to be split.
    """
    to_split, remarks = [row for row in found.rows if row.split is None], list[str]()
    if how == "hash":
        parts = {row.id: by_hash(row.id, found.shares) for row in to_split}
    elif to_split:
        parts = in_blocks(to_split, found.shares)
        remarks = _without(to_split, parts, found.shares)
    else:
        raise UserError(f"{section}.split blocks", "this source gives the part of every picture", "leave it out")
    by_group = how == "blocks"  # by hash a group is on both sides anyway
    rows = [
        row if row.split else replace(row, split=parts[row.id], carved=True, group=row.group if by_group else None)
        for row in found.rows
    ]
    return rows, remarks


def with_groups(found: Found, path: Path, section: str) -> Found:
    """Rows with the groups that a CSV file gives them by id. Raises UserError when it can't be read or names none."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            groups = {line["id"]: line["group"] for line in csv.DictReader(file, restval="")}
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise UserError(
            path, repr(error), f"{section}.groups has to be a CSV file of the columns id and group"
        ) from None
    if not any(row.id in groups for row in found.rows):
        raise UserError(path, "it has no id of this data set", f"mend it, or leave {section}.groups out")
    return replace(found, rows=[replace(row, group=groups.get(row.id) or row.group) for row in found.rows])


def by_hash(key: str, shares: Shares) -> str:
    """The part of an id. It depends on the id alone, so that an added picture never moves another."""
    place = share(key)
    return next(
        (part for part, end in zip(shares, accumulate(shares.values()), strict=True) if place < end), [*shares][-1]
    )


def in_blocks(rows: Iterable[Row], shares: Shares) -> dict[str, str]:
    """Id -> part: of each class, blocks of consecutive pictures are held out, and groups as a whole.

    Pictures stand in the natural order of their ids (img_2 before img_10), so neighbours are of one series where ids
    are in the order of shooting. A block is at most BLOCK pictures long: the share of a small class is one block, with
    two edges at which a series may go on in training; that of a large one is several, because a single long one would
    be of one place and one day alone, and a part is to stand for all. (A series longer than a block, or ids in no
    order, leak still: only groups help there.)

    A group is decided once, in the rarest of its classes (as Sechidis et al. 2011, On the Stratification of Multi-Label
    Data, do). A class keeps at least one picture or group for training. Its share is rounded up or down by the hash of
    its name, so that many small classes have the right share together, though some of them have none.

    It depends on ids, classes and groups alone. A block begins at the picture with the lowest hash and goes on, by
    order. So an added picture moves one other at most out of a block into which it falls; it moves a whole block where
    its own hash is the lowest, and one picture more is held out where the share grows by one.
    """
    classes: defaultdict[str | None, defaultdict[tuple[str, str], int]] = defaultdict(lambda: defaultdict(int))
    rows = sorted(rows, key=lambda row: _natural(row.id))
    units = {row.id: ("group", row.group) if row.group else ("id", row.id) for row in rows}
    for row in rows:
        classes[row.label][units[row.id]] += 1
    parts: dict[tuple[str, str], str] = {}
    for label, sizes in sorted(classes.items(), key=lambda one: (sum(one[1].values()), str(one[0]))):
        for part, size in shares.items():
            if part != "train":
                wanted = int(size * sum(sizes.values()) + share(f"{part} of {label}"))
                _hold_out(part, wanted, sizes, parts)
        for unit in sizes:
            parts.setdefault(unit, "train")
    return {row_id: parts[unit] for row_id, unit in units.items()}


def _hold_out(part: str, wanted: int, sizes: Mapping[tuple[str, str], int], parts: dict[tuple[str, str], str]) -> None:
    """Put about `wanted` pictures of a class, whose units have `sizes` and stand in order, into a part, by blocks."""
    units = list(sizes)
    wanted -= sum(sizes[unit] for unit in units if parts.get(unit) == part)
    free = sum(unit not in parts for unit in units) - ("train" not in map(parts.get, units))
    for start in sorted(range(len(units)), key=lambda at: share(f"block:{units[at][1]}")):
        room = min(BLOCK, wanted)
        for at in chain(range(start, len(units)), range(start - 1, -1, -1)):  # at the end of the class, backwards
            unit = units[at]
            if unit in parts:
                continue
            if not free or sizes[unit] >= 2 * room:  # it would be farther from `wanted` with it than without
                break
            parts[unit] = part
            free, room, wanted = free - 1, room - sizes[unit], wanted - sizes[unit]
        if wanted <= 0 or not free:
            break


def _natural(text: str) -> tuple[list[str | tuple[int, str]], str]:
    """What sorts texts as people do: numbers in them by value, however long."""
    pieces = _NUMBER.split(text)
    numbers = [piece.lstrip("0") for piece in pieces[1::2]]
    key: list[str | tuple[int, str]] = list(pieces)
    key[1::2] = [(len(number), number) for number in numbers]
    return key, text


def _without(rows: Iterable[Row], parts: Mapping[str, str], shares: Shares) -> list[str]:
    """What there is to say of classes that no validation picture could be taken from, and why."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    groups: defaultdict[str, set[str | None]] = defaultdict(set)
    for row in rows:
        if row.label is not None:
            found[row.label].add(parts[row.id])
            groups[row.label].add(row.group)
    without = sorted(label for label, there in found.items() if "val" in shares and "val" not in there)
    whole = [
        label
        for label in without
        if found[label] == {"train"} and len(groups[label] - {None}) == 1 == len(groups[label])
    ]
    kinds = (
        ([label for label in without if label not in whole], "too small for a validation block"),
        (whole, "one group each, which stays in training, so they have no validation pictures"),
    )
    return [f"{len(some)} of {len(found)} classes are {what}: {listed(some)}" for some, what in kinds if some]
