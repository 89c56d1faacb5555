"""Pictures in WebDataset tar shards, local or remote: the members KEY.jpg and KEY.txt, KEY.json or KEY.cls.

The format: https://github.com/webdataset/webdataset; captions as img2dataset writes them. Nothing is unpacked: a
picture is read again, at any time, by its offset in the tar.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from pipeline.config.base import Name, Positive
from pipeline.config.schema import DataSettings
from pipeline.errors import UserError
from pipeline.files import foreign_faults
from pipeline.needs import Need
from pipeline.sources import imagefolder
from pipeline.sources.base import Carved, Source
from pipeline.sources.folders import SUFFIXES, LeftOut
from pipeline.sources.rows import Found, Row, order
from pipeline.sources.texts import by_reason

if TYPE_CHECKING:
    from rich.progress import Progress

    from pipeline.sources.tar_index import Sample

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
SHARDS = "webdataset: tars, as a path, a glob, a range like shard-{0000..0009}.tar, or an fsspec URL"


_ToRow = Callable[["Sample", list[LeftOut]], Row]


class TarsSettings(DataSettings):
    shards: Name = Field(None, validate_default=True, description=SHARDS)
    count: Positive | None = Field(
        None, description="at most this many pictures, of each class where there are classes"
    )
    validation: Carved = Field(0.1, description="share of train that is carved from it; of classes alone")

    @field_validator("shards", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        if value is None:
            raise ValueError(f"needed here: {SHARDS}")
        return value


class Tars(Source):
    """WebDataset tars, here or in object storage."""

    Settings, tasks = TarsSettings, ("caption", "classify")
    settings: TarsSettings

    def read(self, progress: Progress) -> Found:
        """One row per picture of the shards, with the texts that the task needs.

        Captions are those of its json ("captions", "caption") and its txt; split and `count` as in the COCO layout. A
        class is that of its cls or its json ("class_name", "class", "label"), a number the line of that number (from 0)
        of classes.txt beside the shards; split as in plain folders, and `count` keeps at most that many pictures per
        class. The json may have a "group" (rows.Row). Pictures without a text are quarantined; members that belong to
        no picture, and texts that can't be read, are left out. Raises UserError, naming the shard, when a shard is
        missing or damaged, holds a link or a path that leads out of it, when two pictures have one key, or when no
        picture has a text.
        """
        found, count = self._rows(progress), self.settings.count
        if self.settings.task == "caption":
            return Found(found.rows[:count], found.left_out)
        kept: defaultdict[str | None, list[Row]] = defaultdict(list)
        for row in found.rows:
            kept[row.label].append(row)
        rows = [row for group in kept.values() for row in group[:count]]
        return Found(rows, found.left_out, imagefolder.shares_of(self.settings.validation))

    def need(self) -> Need:
        """Whether the tars are there and the first of them is sound; remote ones are left to `prepare`."""
        shards = self.settings.shards
        if "://" in shards:
            found = f"{shards}: remote, looked at by `terraalign prepare {self.name}` only"
            return Need(self.title, True, found)
        try:
            count, pictures = _look(self.settings, self.key)
        except UserError as error:
            return Need(self.title, False, f"{error.where}: {error.what}", error.remedy)
        return Need(self.title, True, f"{shards}: {count} tars, {pictures} pictures in the first")

    def pictures(self) -> int | None:
        """As if every tar held as many pictures as the first; None for remote ones."""
        return None if "://" in self.settings.shards else _pictures(self.settings, self.key)

    def settings_for_use(self, missing: bool) -> list[str]:
        return [f"{self.key}.source=webdataset", f"{self.key}.shards={self.settings.shards}"]

    def _rows(self, progress: Progress) -> Found:
        """A row for every picture of the shards, in the order in which `count` cuts."""
        shards = find_shards(self.settings.shards, f"{self.key}.shards")
        found, to_row = Found([]), _to_row(self.settings)
        shard_of: dict[str, str] = {}
        with ThreadPoolExecutor(self.workers) as pool:
            parts = pool.map(partial(_rows_of, to_row), shards)
            for shard, part in zip(shards, progress.track(parts, len(shards), description="index shards"), strict=True):
                for row in part.rows:
                    if (other := shard_of.setdefault(row.id, shard)) != shard:
                        raise UserError(
                            shard,
                            f"the key {row.id!r} is also in {other}",
                            "keys must be unique: leave one of the shards out, or write it with other keys",
                        )
                found.rows.extend(part.rows)
                found.left_out.extend(part.left_out)
        _check_texts(found, self.settings.shards, self.settings.task)
        return Found(sorted(found.rows, key=lambda row: order(row.id)), found.left_out)


@cache
def _pictures(settings: TarsSettings, key: str) -> int | None:
    """Cached, as it is asked many times a run."""
    try:
        found = math.prod(_look(settings, key))
    except UserError:
        return None
    return min(found, settings.count or found) if settings.task == "caption" else found


def _look(settings: TarsSettings, key: str) -> tuple[int, int]:
    """(shards, pictures in the first one), without reading more than that one. Raises UserError as `read`."""
    shards = find_shards(settings.shards, f"{key}.shards")
    found = _rows_of(_to_row(settings), shards[0])
    _check_texts(found, shards[0], settings.task)
    return len(shards), len(found.rows)


def _check_texts(found: Found, name: str, task: str) -> None:
    """Raises UserError when there is no picture, or not one of them has a text."""
    rows = found.rows
    if not rows:
        there = by_reason((one.name, one.reason) for one in found.left_out)
        names = ", ".join(sorted(suffix.removeprefix(".") for suffix in SUFFIXES))
        has = f"; it has: {there}" if there else ""
        raise UserError(name, "no picture in it", f"members are named KEY.jpg (or {names}){has}")
    if not any(row.captions for row in rows):
        texts = {
            "caption": ("caption", 'KEY.txt, one caption, or KEY.json with "caption" or "captions"'),
            "classify": ("class", 'KEY.cls, or KEY.json with "class" or "label"'),
        }
        what, where = texts[task]
        raise UserError(
            name,
            f"none of {len(rows)} pictures ({rows[0].id}: {rows[0].quarantine}) has a {what}",
            f"each KEY.jpg needs {where}",
        )


def _to_row(settings: TarsSettings) -> _ToRow:
    from pipeline.sources.tar_rows import caption_row, class_row

    return caption_row if settings.task == "caption" else partial(class_row, {})


def _rows_of(to_row: _ToRow, shard: str) -> Found:
    from pipeline.sources.tar_index import samples_of

    left_out: list[LeftOut] = []
    return Found([to_row(sample, left_out) for sample in samples_of(shard, left_out)], left_out)


def find_shards(pattern: str, parameter: str) -> list[str]:
    """The tars that a path, glob, brace range (shard-{0000..0009}.tar) or fsspec URL names, sorted.

    Raises UserError when one is not there, is no .tar, or a glob finds none; `parameter` is where the pattern stands.
    """
    found: dict[str, None] = {}
    for name in _expand(pattern):
        if not (matches := _matches(name)):
            raise UserError(name, "no such tar", f"set {parameter} in params.yaml to the shards, or put them there")
        found |= dict.fromkeys(matches)
    for name in found:
        if not name.endswith(".tar"):
            raise UserError(
                name, "not a .tar", f"decompress it, as pictures are read by their offset, or mend {parameter}"
            )
    return sorted(found)


def _expand(pattern: str) -> list[str]:
    """`a-{08..10}.tar` -> a-08.tar, a-09.tar, a-10.tar, as bash and WebDataset expand braces; also {train,test}."""
    from braceexpand import braceexpand

    for match in _RANGE.finditer(pattern):
        if int(match[1]) > int(match[2]):
            raise UserError(pattern, f"the range {match[0]} is empty", "write the smaller number first")
    try:
        return list(braceexpand(pattern, escape=False))
    except ValueError:  # a brace without its other: part of a name
        return [pattern]


def _matches(name: str) -> list[str]:
    """The files that a path, glob or URL names. Raises UserError when that cannot be told."""
    import fsspec

    def fault(reason: str) -> UserError:
        return UserError(name, f"cannot be looked up ({reason})", "correct the address, or check network and access")

    with foreign_faults(fault):
        system, path = fsspec.url_to_fs(name)
        matches: list[str] = system.glob(path) if any(sign in name for sign in "*?[") else []
        if "://" in name:
            matches = [system.unstrip_protocol(match) for match in matches]
        return matches or ([name] if _is_file(system, path) else [])


def _is_file(system: Any, path: str) -> bool:
    """Like fsspec's isfile, which answers False also when a server cannot be reached."""
    try:
        return bool(system.info(path)["type"] == "file")
    except FileNotFoundError as error:
        if error.__cause__ is None or isinstance(error.__cause__, FileNotFoundError):
            return False
        raise error.__cause__ from None
