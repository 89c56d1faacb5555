"""What is to be said of a data set before anything is trained: counts, what is broken, balance, texts, copies."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa

from pipeline.plan.rows import Rows, counted
from pipeline.sources import copies
from pipeline.sources.texts import listed, number

SPLITS = ("train", "val", "test")
NAMED = 3  # pictures
UNEVEN = 5  # a class with so many times the pictures of another


@dataclass(frozen=True)
class News:
    """How many pictures are not as an earlier manifest has them."""

    new: int
    gone: int
    changed: int  # in their bytes, texts, or whether they can be used
    moved: int  # others that are in another part, as another list of series has it

    @classmethod
    def of(cls, manifest: pa.Table, earlier: pa.Table) -> News:
        """From two tables with the columns of manifest.SCHEMA."""
        now, then = ({one["id"]: one for one in table.to_pylist()} for table in (manifest, earlier))
        both = [(now[one], then[one]) for one in now.keys() & then.keys()]
        own = ("sha256", "captions", "label", "quarantine")
        same = [pair for pair in both if all(pair[0][key] == pair[1][key] for key in own)]
        moved = sum(one["split"] != other["split"] for one, other in same)
        return cls(len(now) - len(both), len(then) - len(both), len(both) - len(same), moved)

    def __bool__(self) -> bool:
        return any((self.new, self.gone, self.changed, self.moved))

    def __str__(self) -> str:
        lost = f"{self.gone} gone, {self.changed} changed" if self.gone or self.changed else "0 gone or changed"
        if not (self.new or self.gone or self.changed):
            return f"{number(self.moved, 'picture is', 'pictures are')} in another part"
        return f"{number(self.new, 'picture is', 'pictures are')} new, {lost}"


@dataclass(frozen=True)
class Look:
    """A data set as its manifest has it."""

    parts: dict[str, int]  # pictures of each split
    left_out: list[str]  # pictures that can't be used, with reasons
    classes: dict[str, int]  # usable pictures of each
    texts: list[int]  # captions of each usable picture; empty for classes
    words: list[int]  # of each caption
    rows: Rows
    copies: int  # pictures with the bytes of an earlier one
    leaks: int  # of these in another part than the earlier one
    mislabelled: list[str]  # pictures that are in several classes
    listing: Path  # where what is left out is listed
    news: News | None  # since the manifest that is there, if one is

    @classmethod
    def of(cls, manifest: pa.Table, listing: Path, earlier: pa.Table | None = None) -> Look:
        """From a table with the columns of manifest.SCHEMA, the list of what is left out, and an earlier table."""
        records: list[dict[str, Any]] = manifest.to_pylist()
        used = [record for record in records if not record["quarantine"]]
        classes = Counter(str(record["label"]) for record in used if record["label"] is not None)
        captions = [record["captions"] for record in used if record["label"] is None]
        again = copies.pairs(records)
        return cls(
            {part: sum(record["split"] == part for record in used) for part in SPLITS},
            [f"{record['image']} ({record['quarantine']})" for record in records if record["quarantine"]],
            dict(classes.most_common()),
            [len(texts) for texts in captions],
            [len(text.split()) for texts in captions for text in texts],
            counted(records),
            len(again),
            sum(one["split"] != first["split"] for one, first in again),
            copies.mislabelled(records),
            listing,
            None if earlier is None else News.of(manifest, earlier),
        )

    @property
    def pictures(self) -> int:
        """Those that can be used."""
        return sum(self.parts.values())

    def lines(self) -> list[tuple[str, str]]:
        """What there is to say: a word for what, and what."""
        parts = ", ".join(f"{count} {part}" for part, count in self.parts.items())
        found = [("pictures", f"{self.pictures:,} ({parts})")]
        if self.news:
            found.append(("since the last run", str(self.news)))
        if self.left_out:
            more = f"; all: {self.listing}" if len(self.left_out) > NAMED else ""
            found.append(("left out", f"{len(self.left_out)}: {listed(self.left_out, NAMED)}{more}"))
        if self.classes:
            most, least = next(iter(self.classes)), list(self.classes)[-1]
            spread = f"{self.classes[least]} ({least}) to {self.classes[most]} ({most})"
            spread = str(self.classes[most]) if self.classes[most] == self.classes[least] else spread
            uneven = self.classes[most] >= UNEVEN * self.classes[least]
            warned = "; uneven: rare classes will be named worse" if uneven else ""
            found.append(("classes", f"{len(self.classes)}, with {spread} pictures each{warned}"))
        if self.words:
            each, words = median(self.texts), sorted(self.words)
            lengths = f"{words[0]} to {words[-1]} words, half of them at most {median(words):g}"
            found.append(("captions", f"{len(words):,}, {each:g} for a picture; {lengths}"))
        if self.copies:
            across = f", {self.leaks} of them in another part: testing sees what training saw" if self.leaks else ""
            count = number(self.copies, "picture has", "pictures have")
            where = f"; all: {copies.listing_beside(self.listing)}"
            found.append(("copies", f"{count} the bytes of an earlier one{across}{where}"))
        if self.mislabelled:
            found.append(("labels", copies.in_two_classes(self.mislabelled, NAMED)))
        return found
