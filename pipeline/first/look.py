"""What is to be said of a data set before anything is trained: counts, what is broken, balance, texts, copies."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import Any

import pyarrow as pa

from pipeline.plan.rows import Rows, counted
from pipeline.sources.texts import listed

SPLITS = ("train", "val", "test")
UNEVEN = 5  # a class with so many times the pictures of another


@dataclass(frozen=True)
class News:
    """How many pictures are not as an earlier manifest has them."""

    new: int
    gone: int
    changed: int  # in their bytes, texts, or whether they can be used

    @classmethod
    def of(cls, manifest: pa.Table, earlier: pa.Table) -> News:
        """From two tables with the columns of manifest.SCHEMA."""
        now, then = (
            {one["id"]: (one["sha256"], one["captions"], one["label"], one["quarantine"]) for one in table.to_pylist()}
            for table in (manifest, earlier)
        )
        both = now.keys() & then.keys()
        return cls(len(now) - len(both), len(then) - len(both), sum(now[one] != then[one] for one in both))

    def __bool__(self) -> bool:
        return any((self.new, self.gone, self.changed))

    def __str__(self) -> str:
        lost = f"{self.gone} gone, {self.changed} changed" if self.gone or self.changed else "0 gone or changed"
        return f"{self.new} {'picture is' if self.new == 1 else 'pictures are'} new, {lost}"


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
    news: News | None  # since the manifest that is there, if one is

    @classmethod
    def of(cls, manifest: pa.Table, earlier: pa.Table | None = None) -> Look:
        """From a table with the columns of manifest.SCHEMA, and an earlier one."""
        records: list[dict[str, Any]] = manifest.to_pylist()
        used = [record for record in records if not record["quarantine"]]
        classes = Counter(str(record["label"]) for record in used if record["label"] is not None)
        captions = [record["captions"] for record in used if record["label"] is None]
        first: dict[str, str] = {}
        again = [(first.setdefault(one["sha256"], one["id"]) != one["id"], one) for one in used]
        part_of = {record["id"]: record["split"] for record in used}
        copies = [record for copy, record in again if copy]
        return cls(
            {part: sum(record["split"] == part for record in used) for part in SPLITS},
            [f"{record['image']} ({record['quarantine']})" for record in records if record["quarantine"]],
            dict(classes.most_common()),
            [len(texts) for texts in captions],
            [len(text.split()) for texts in captions for text in texts],
            counted(records),
            len(copies),
            sum(part_of[first[record["sha256"]]] != record["split"] for record in copies),
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
            found.append(("left out", f"{len(self.left_out)}: {listed(self.left_out, 3)}"))
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
            found.append(("copies", f"{self.copies} pictures have the bytes of an earlier one{across}"))
        return found
