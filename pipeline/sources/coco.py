"""Pictures with captions in the COCO layout: one JSON of images and annotations, one folder of pictures."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import Field

from pipeline.errors import UserError
from pipeline.files import Damaged
from pipeline.sources.base import FolderSettings, FolderSource
from pipeline.sources.folders import LeftOut, unnamed
from pipeline.sources.rows import SHARES, Found, Row, below, order
from pipeline.sources.split import by_hash
from pipeline.sources.texts import parse_json

if TYPE_CHECKING:
    from rich.progress import Progress

_NUMBER = re.compile(r"-?[0-9]{1,40}(\.[0-9]{1,40})?")
_T = TypeVar("_T")


class CocoSettings(FolderSettings):
    captions: str = Field("captions.json", description="COCO captions JSON, relative to root")
    images: str = Field("images", description="image folder, relative to root")


class Coco(FolderSource):
    """A folder in the COCO captions layout."""

    Settings, tasks = CocoSettings, ("caption",)
    assumed = 118_287
    settings: CocoSettings
    has_classes: ClassVar[bool] = False

    @property
    def lists(self) -> list[str]:
        return [self.settings.captions]

    @property
    def images(self) -> str:
        return self.settings.images

    def read(self, progress: Progress) -> Found:
        return read(self.folder(), self.settings.captions, self.settings.images, self.settings.count, self.key)

    def named(self) -> set[Path]:
        path = self.folder() / self.settings.captions
        return set(_image_files(path, _load(path, self.key), self.settings.root / self.settings.images, [])[0].values())

    def look(self) -> None:
        super().look()
        _check_ends(self.settings.root / self.settings.captions)

    def pictures(self) -> int | None:
        found = super().pictures()
        return min(found, self.settings.count or found) if found else None


def _check_ends(path: Path) -> None:
    """Raises Damaged unless a file begins and ends as a JSON object does; parsing a large one takes seconds."""
    with path.open("rb") as file:
        first = file.read(4096).removeprefix(b"\xef\xbb\xbf").strip()[:1]
        file.seek(max(0, path.stat().st_size - 4096))
        last = file.read().strip()[-1:]
    if (first, last) != (b"{", b"}"):
        raise Damaged(f"{path.name}: {'cut off' if first == b'{' else 'no JSON object'}")


def read(root: Path, captions: str, images: str, count: int | None, section: str) -> Found:
    """One row per entry of "images" in root/captions, with all its captions; at most `count` of them.

    Left out are entries that lack a field or have one of a wrong type, annotations of unknown images, and files that no
    entry names; images without a caption are quarantined. An id is the same number or the same text: 7, 7.0 and "7"
    meet. An entry may have a "group" (rows.Row). Raises UserError for JSON that is broken or not of this layout, lists
    two images under one id, or has no entry that can be used.
    """
    path = root / captions
    content = _load(path, section)
    left_out: list[LeftOut] = []
    files, ids = _image_files(path, content, root / images, left_out)
    texts = _captions_by_image(path, content, ids, left_out)
    left_out += unnamed(root / images, files.values(), f"named by no entry of {captions}")
    kept = sorted(files, key=order)[:count]
    groups = _groups(content["images"])
    return Found([_row(one, files[one], texts[one], groups.get(one)) for one in kept], left_out)


def split_of(image_id: str) -> str:
    """train, val or test (70 : 15 : 15) by the hash of the id."""
    return by_hash(image_id, SHARES)


def _row(image_id: str, image: Path, captions: list[str], group: str | None) -> Row:
    reason = None if captions else "no caption"
    return Row(image_id, image, captions, label=None, quarantine=reason, group=group)


def _groups(entries: list[Any]) -> dict[str, str]:
    """Id -> "group", of the images that have one."""
    groups = {str(one.get("id")): group_of(one.get("group")) for one in entries if isinstance(one, dict)}
    return {image_id: group for image_id, group in groups.items() if group}


def group_of(value: Any) -> str | None:
    """The name of a group, as JSON has it: a text or a number; None for anything else, and for an empty text."""
    named = isinstance(value, str | int) and not isinstance(value, bool)
    return str(value).strip() or None if named else None


def _load(path: Path, section: str) -> dict[str, Any]:
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(path, error.strerror, f"set {section}.root and {section}.captions") from None
    except json.JSONDecodeError as error:
        lines = "; it may be JSON Lines: write one object" if error.msg == "Extra data" and error.lineno > 1 else ""
        raise UserError(f"{path}:{error.lineno}:{error.colno}", f"not valid JSON: {error.msg}{lines}") from None
    except ValueError as error:
        raise UserError(path, error, "expected an object with images and annotations") from None
    if not isinstance(content, dict):
        raise UserError(path, f"expected an object with images and annotations, found a {type(content).__name__}")
    return content


class _Ids:
    """The ids of the images, to find one by the same text or the same number."""

    def __init__(self) -> None:
        self.text_of: dict[Hashable, dict[str, Any]] = defaultdict(dict)  # number or text -> id -> as in the JSON

    def add(self, value: Any) -> str:
        """The id as text. Raises ValueError when it is an earlier one's, or the same number as an earlier one."""
        same = self.text_of[_number(value)]
        for text, earlier in same.items():
            if text == str(value) or not isinstance(value, str) or not isinstance(earlier, str):
                raise ValueError(f"has the id {value!r} of an earlier image, {earlier!r}; ids must be unique")
        same[str(value)] = value
        return str(value)

    def find(self, value: Any) -> str | None:
        same = self.text_of.get(_number(value), {})
        return str(value) if str(value) in same else next(iter(same)) if len(same) == 1 else None


def _number(value: Any) -> Hashable:
    """What ids are compared by: Python's numbers of all types are equal, and have equal hashes, if their values are."""
    if isinstance(value, str):
        return Decimal(value) if _NUMBER.fullmatch(value) else value
    return float(value) if isinstance(value, float) else int(value)


def _image_files(
    path: Path, content: dict[str, Any], folder: Path, left_out: list[LeftOut]
) -> tuple[dict[str, Path], _Ids]:
    """Id -> picture, and what finds an id."""
    if content.get("images") == []:
        raise UserError(path, "the list images is empty", "nothing to prepare")

    def picture(entry: Any) -> tuple[Any, Path]:
        return _id(entry, "id"), below(folder, _text(entry, "file_name"))

    files: dict[str, Path] = {}
    ids = _Ids()
    for name, (value, file) in _usable(path, content, "images", picture, left_out):
        if files.get(str(value)) == file:
            left_out.append(LeftOut(name, "a repetition of an earlier entry", id=str(value)))
            continue
        try:
            files[ids.add(value)] = file
        except ValueError as fault:
            raise UserError(path, f"{name} {fault}") from None
    return files, ids


def _captions_by_image(
    path: Path, content: dict[str, Any], ids: _Ids, left_out: list[LeftOut]
) -> defaultdict[str, list[str]]:
    texts: defaultdict[str, list[str]] = defaultdict(list)

    def annotation(entry: Any) -> tuple[Any, str]:
        return _id(entry, "image_id"), _text(entry, "caption").strip()

    for name, (value, caption) in _usable(path, content, "annotations", annotation, left_out):
        image_id = ids.find(value)
        if image_id is None:
            left_out.append(LeftOut(f"{name} of {value}", "of an image that is not listed", id=str(value)))
        elif not caption:
            left_out.append(LeftOut(name, "with an empty caption", id=image_id))
        else:
            texts[image_id].append(caption)
    return texts


def _usable(
    path: Path, content: dict[str, Any], key: str, parse: Callable[[Any], _T], left_out: list[LeftOut]
) -> list[tuple[str, _T]]:
    """(name, parsed entry) of those in the list `key` that can be used. Raises UserError when none can."""
    entries = content.get(key)
    if not isinstance(entries, list):
        raise UserError(path, f"no list {key!r}", "a COCO captions file has the lists images and annotations")
    usable, faults = [], []
    for i, entry in enumerate(entries):
        try:
            usable.append((f"{key}[{i}]", parse(entry)))
        except ValueError as fault:
            faults.append(LeftOut(f"{key}[{i}]", str(fault)))
    if faults and not usable:
        raise UserError(path, f"{faults[0].name} {faults[0].reason}", f"mend it (none of {len(entries)} can be used)")
    left_out += faults
    return usable


def _field(entry: Any, key: str) -> Any:
    if not isinstance(entry, dict):
        raise ValueError(f"no object, so without {key!r}")
    if entry.get(key) is None:
        raise ValueError(f"has no {key!r}")
    return entry[key]


def _text(entry: Any, key: str) -> str:
    value = _field(entry, key)
    if not isinstance(value, str):
        raise ValueError(f"has a {type(value).__name__} for {key!r}; it must be a string")
    return value


def _id(entry: Any, key: str) -> Any:
    value = _field(entry, key)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"has a {type(value).__name__} for {key!r}; it must be a number or a string")
    if (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"has {value!r} for {key!r}; it must be a number or a string")
    return value
