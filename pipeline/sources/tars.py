"""Pictures in WebDataset tar shards, local or remote: the members KEY.jpg and KEY.txt, KEY.json or KEY.cls.

The format: https://github.com/webdataset/webdataset; captions as img2dataset writes them. Nothing is unpacked: a
picture is read again, at any time, by its offset in the tar.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from pydantic import Field, field_validator
from rich.progress import Progress

from pipeline.config.base import Name, Positive
from pipeline.config.schema import DataSettings
from pipeline.errors import UserError
from pipeline.files import is_utf8
from pipeline.media.pictures import part_of_tar
from pipeline.sources import coco, imagefolder, texts
from pipeline.sources.base import Carved, Source
from pipeline.sources.folders import NOT_UTF8, SUFFIXES, LeftOut, begins_as_picture, is_hidden
from pipeline.sources.manifest import Found, Row, order, warn
from pipeline.sources.texts import by_reason

PICTURES = frozenset(suffix.removeprefix(".") for suffix in SUFFIXES)
TEXTS = frozenset({"txt", "json", "cls"})
LONGEST_TEXT = 2**20  # bytes
LONGEST_NUMBER = 9  # digits
_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # key and extension, as webdataset.tariterators.base_plus_ext has it
_META = re.compile(r"__[^/]*__($|/)")  # members that WebDataset skips
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class _Part:
    """A member of a tar; of short texts also the content, of other names whether it begins as a picture does."""

    offset: int
    size: int
    text: bytes | None
    picture: bool


@dataclass(frozen=True)
class _Sample:
    """The members of one key: its picture and its texts by extension."""

    shard: str
    key: str
    image: str
    texts: dict[str, _Part]

    @property
    def place(self) -> Path | str:
        return self.image if "://" in self.shard else Path(self.image)


SHARDS = "webdataset: tars, as a path, a glob, a range like shard-{0000..0009}.tar, or an fsspec URL"
_ToRow = Callable[[_Sample, list[LeftOut]], Row]


class TarsSettings(DataSettings):
    shards: Name = Field(None, validate_default=True, description=SHARDS)
    count: Positive | None = Field(
        None, description="at most this many pictures, of each class where there are classes"
    )
    validation: Carved = Field(0.1, description="share carved from train by hash; of classes alone")

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
        own = self.settings
        if own.task == "caption":
            return read_captions(own.shards, own.count, self.workers, progress, self.key)
        return read_classes(own.shards, own.validation, own.count, self.workers, progress, self.key)


def read_captions(pattern: str, count: int | None, workers: int, progress: Progress, key: str = "data") -> Found:
    """One row per picture of the shards, with the captions of its json ("captions", "caption") and its txt.

    Split and `count` as in the COCO layout, by hash of the key. Pictures without a caption are quarantined; members
    that belong to no picture, and texts that can't be read, are left out. Raises UserError, naming the shard, when a
    shard is missing or damaged, holds a link or a path that leads out of it, when two pictures have one key, or when no
    picture has a caption.
    """
    found = _rows(pattern, "caption", _caption_row, workers, progress, key)
    return Found(found.rows[:count], found.left_out)


def read_classes(
    pattern: str, validation: float, count: int | None, workers: int, progress: Progress, key: str = "data"
) -> Found:
    """One row per picture of the shards, with the class of its cls or its json ("class_name", "class", "label").

    A class given as a number is the line of that number (from 0) of classes.txt beside the shards. Split as in plain
    folders, by hash of the key; `count` keeps at most that many pictures per class. Raises like read_captions.
    """
    found = _rows(pattern, "classify", partial(_class_row, validation, {}), workers, progress, key)
    kept: defaultdict[str | None, list[Row]] = defaultdict(list)
    for row in found.rows:
        kept[row.label].append(row)
    return Found([row for group in kept.values() for row in group[:count]], found.left_out)


def look(pattern: str, task: str, key: str) -> tuple[int, int]:
    """(shards, pictures in the first one), without reading more than that one. Raises UserError as reading does."""
    shards = find_shards(pattern, f"{key}.shards")
    to_row = _caption_row if task == "caption" else partial(_class_row, 0.1, {})
    left_out: list[LeftOut] = []
    rows = [to_row(sample, left_out) for sample in _index(shards[0], left_out)]
    _check_texts(Found(rows, left_out), shards[0], task)
    return len(shards), len(rows)


def _rows(pattern: str, task: str, to_row: _ToRow, workers: int, progress: Progress, key: str) -> Found:
    """A row for every picture of the shards, in the order in which `count` cuts."""
    shards = find_shards(pattern, f"{key}.shards")
    found = Found([])
    shard_of: dict[str, str] = {}

    def rows_of(shard: str) -> Found:
        left_out: list[LeftOut] = []
        return Found([to_row(sample, left_out) for sample in _index(shard, left_out)], left_out)

    with ThreadPoolExecutor(workers) as pool:
        parts = pool.map(rows_of, shards)
        for shard, part in zip(shards, progress.track(parts, len(shards), description="index shards"), strict=True):
            for row in part.rows:
                if shard_of.setdefault(row.id, shard) != shard:
                    raise UserError(
                        f"{shard}: the key {row.id!r} is also in {shard_of[row.id]}; keys must be unique: leave one of "
                        "the shards out, or write it with other keys"
                    )
            found.rows.extend(part.rows)
            found.left_out.extend(part.left_out)
    _check_texts(found, pattern, task)
    return Found(sorted(found.rows, key=lambda row: order(row.id)), found.left_out)


def _check_texts(found: Found, name: str, task: str) -> None:
    """Raises UserError when there is no picture, or not one of them has a text."""
    rows = found.rows
    if not rows:
        there = by_reason((one.name, one.reason) for one in found.left_out)
        raise UserError(
            f"{name}: no picture in it; members are named KEY.jpg (or {', '.join(sorted(PICTURES))})"
            + (f"; it has: {there}" if there else "")
        )
    if not any(row.captions for row in rows):
        texts = {
            "caption": 'caption; each KEY.jpg needs KEY.txt, one caption, or KEY.json with "caption" or "captions"',
            "classify": 'class; each KEY.jpg needs KEY.cls, or KEY.json with "class" or "label"',
        }
        raise UserError(
            f"{name}: none of {len(rows)} pictures ({rows[0].id}: {rows[0].quarantine}) has a {texts[task]}"
        )


def find_shards(pattern: str, parameter: str) -> list[str]:
    """The tars that a path, glob, brace range (shard-{0000..0009}.tar) or fsspec URL names, sorted.

    Raises UserError when one is not there, is no .tar, or a glob finds none; `parameter` is where the pattern stands.
    """
    found: dict[str, None] = {}
    for name in _expand(pattern):
        with _faults_of(name, "cannot be looked up", "correct the address, or check network and access"):
            system, path = fsspec.url_to_fs(name)
            matches = system.glob(path) if any(sign in name for sign in "*?[") else []
            if "://" in name:
                matches = [system.unstrip_protocol(match) for match in matches]
            if not matches and _is_file(system, path):
                matches = [name]
        if not matches:
            raise UserError(f"{name}: no such tar; set {parameter} in params.yaml to the shards, or put them there")
        found |= dict.fromkeys(matches)
    for name in found:
        if not name.endswith(".tar"):
            raise UserError(
                f"{name}: not a .tar; decompress it, as pictures are read by their offset, or mend {parameter}"
            )
    return sorted(found)


def _expand(pattern: str) -> list[str]:
    """`a-{08..10}.tar` -> a-08.tar, a-09.tar, a-10.tar; every range of a pattern."""
    match = _RANGE.search(pattern)
    if not match:
        return [pattern]
    first, last = match[1], match[2]
    numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    if not numbers:
        raise UserError(f"{pattern}: the range {match[0]} is empty; write the smaller number first")
    return [name for number in numbers for name in _expand(pattern[: match.start()] + number + pattern[match.end() :])]


def _is_file(system: Any, path: str) -> bool:
    """Like fsspec's isfile, which answers False also when a server cannot be reached."""
    try:
        return bool(system.info(path)["type"] == "file")
    except FileNotFoundError as error:
        if error.__cause__ is None or isinstance(error.__cause__, FileNotFoundError):
            return False
        raise error.__cause__ from None


@contextmanager
def _faults_of(name: str, what: str, mend: str) -> Iterator[None]:
    """What damage leads tarfile to, and each file system's own exceptions, as one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise UserError(f"{name}: {what} ({type(error).__name__}: {reason}); {mend}") from None


def _index(shard: str, left_out: list[LeftOut]) -> list[_Sample]:
    """The samples of one shard that have a picture; what belongs to none of them goes to `left_out`.

    A key ends at the first dot, as in the library. A picture whose name has another dot, like a.5x.jpg, is a sample of
    its own if there is a text of that name, a.5x.txt; and one of an unknown extension, if its key has no other.
    """
    groups: dict[str, dict[str, _Part]] = {}
    for name, part in _parts(shard, left_out):
        match = _KEY.fullmatch(name)
        if not match:
            left_out.append(LeftOut(f"{shard}: {name}", "without an extension, so without a key"))
            continue
        group, extension = groups.setdefault(match[1], {}), match[2].lower()
        if extension in group and (part.picture or extension.rpartition(".")[2] in PICTURES | TEXTS):
            raise UserError(f"{shard}: two members are named {name!r}; write the shard anew with one of them")
        group[extension] = part
    samples = []
    for key, group in groups.items():
        samples += _dotted(shard, key, group, left_out)
        if sample := _sample(shard, key, group):
            samples.append(sample)
        elif any("." not in extension for extension in group):
            left_out.append(LeftOut(f"{shard}: {key}", "without a picture"))
    return samples


def _sample(shard: str, key: str, group: dict[str, _Part]) -> _Sample | None:
    """The sample of a key's members by their extensions, if there is a picture; one at most."""
    pictures = sorted(group.keys() & PICTURES) or sorted(
        e for e, part in group.items() if part.picture and "." not in e
    )
    if len(pictures) > 1:
        raise UserError(f"{shard}: the key {key!r} has more than one picture ({', '.join(pictures)}); keep one")
    if not pictures:
        return None
    image = part_of_tar(shard, group[pictures[0]].offset, group[pictures[0]].size)
    return _Sample(shard, key, image, {extension: part for extension, part in group.items() if extension in TEXTS})


def _dotted(shard: str, key: str, group: dict[str, _Part], left_out: list[LeftOut]) -> list[_Sample]:
    """The samples among the members of a key whose names have another dot."""
    stems: defaultdict[str, dict[str, _Part]] = defaultdict(dict)
    for extension, part in group.items():
        rest, dot, last = extension.rpartition(".")
        if dot:
            stems[f"{key}.{rest}"][last] = part
    samples = []
    for stem, members in stems.items():
        sample = _sample(shard, stem, members)
        if sample and sample.texts:
            samples.append(sample)
        elif sample:
            reason = "with a second dot in the name and no text of that name; a key ends at the first dot: rename it"
            left_out.append(LeftOut(f"{shard}: {stem}", reason))
        elif not group.keys() & PICTURES:
            left_out.append(LeftOut(f"{shard}: {stem}", "without a picture"))
    return samples


def _parts(shard: str, left_out: list[LeftOut]) -> list[tuple[str, _Part]]:
    """Name and place of every file of a tar, in order, after a check of every member and of the end.

    Tars that were written one behind another are read to the last.
    """
    found: list[tuple[str, _Part]] = []
    start: int | None = 0
    faults = _faults_of(shard, "cannot be read as an uncompressed tar", "mend or remove it")
    with faults, fsspec.open(shard, "rb") as file:
        while start is not None:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
                while (member := tar.next()) is not None:
                    name = _checked_name(shard, member)
                    if not member.isdir() and not _META.match(name) and _wanted(shard, name, left_out):
                        found.append((name, _part(file, name, member)))
                start = _behind(shard, file, tar.offset, len(found), left_out)
    return found


def _wanted(shard: str, name: str, left_out: list[LeftOut]) -> bool:
    if any(map(is_hidden, name.split("/"))):
        left_out.append(LeftOut(f"{shard}: {name}", "hidden", hidden=True))
    elif not is_utf8(name):
        left_out.append(LeftOut(f"{shard}: {name}", NOT_UTF8))
    else:
        return True
    return False


def _part(file: Any, name: str, member: tarfile.TarInfo) -> _Part:
    extension = name.rpartition(".")[2].lower()
    text, picture = None, False
    if extension in TEXTS and member.size <= LONGEST_TEXT:
        file.seek(member.offset_data)
        text = file.read(member.size)
    elif extension not in PICTURES | TEXTS:
        file.seek(member.offset_data)
        picture = begins_as_picture(file.read(min(32, member.size)))
    return _Part(member.offset_data, member.size, text, picture)


def _checked_name(shard: str, member: tarfile.TarInfo) -> str:
    """The member's name below the shard, without a leading ./ ."""
    path = PurePosixPath(member.name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        fault = "leads out of the shard"
    elif not (member.isreg() or member.isdir()) or member.issparse() or member.size < 0:
        fault = "is a link, a device or another thing that is no plain file"
    else:
        return path.as_posix()
    raise UserError(f"{shard}: the member {member.name!r} {fault}; write the shard anew without it")


def _behind(shard: str, file: Any, offset: int, count: int, left_out: list[LeftOut]) -> int | None:
    """Where another tar begins behind the end of this one, or None.

    A tar ends on a block of zeros; tarfile takes a damaged header and the end of the file for its end, too.
    """
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if any(block):
        raise UserError(f"{shard}: damaged at byte {offset}, after {count} members; copy or write it anew")
    if not block:
        warn(f"{shard}: no end mark, as if it were cut off; the {count} members before that are used")
    while block := file.read(2**20):
        offset = file.tell() - len(block)
        if rest := block.lstrip(b"\0"):
            offset += (len(block) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            file.seek(offset)
            if _is_header(file.read(tarfile.BLOCKSIZE)):
                return int(offset)
            left_out.append(LeftOut(f"{shard}#{offset}", "behind the tar's end, and no tar"))
            return None
    return None


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _caption_row(sample: _Sample, left_out: list[LeftOut]) -> Row:
    captions, faults = _captions(sample)
    if captions:
        left_out += [LeftOut(str(sample.place), fault, id=sample.key) for fault in faults]
    reason = None if captions else (faults or ["no caption"])[0]
    return Row(sample.key, sample.place, captions, None, coco.split_of(sample.key), reason)


def _captions(sample: _Sample) -> tuple[list[str], list[str]]:
    """The distinct captions, and the reasons why a text is not used."""
    values, faults = _json(sample)
    several, one = values.get("captions") or [], values.get("caption")
    if not isinstance(several, list):
        several = []
        faults.append('"captions" in its json is no list')
    found = [*several, *([] if one is None else [one])]
    if not all(isinstance(caption, str) for caption in found):
        faults.append("a caption in its json is no text")
    text, fault = _text(sample, "txt")
    usable = [caption.strip() for caption in [*found, text] if isinstance(caption, str) and caption.strip()]
    return list(dict.fromkeys(usable)), faults + fault


def _class_row(validation: float, names: dict[str, list[str]], sample: _Sample, left_out: list[LeftOut]) -> Row:
    label, faults = _label(sample, names)
    if label:
        left_out += [LeftOut(str(sample.place), fault, id=sample.key) for fault in faults]
    reason = None if label else (faults or ["no class"])[0]
    split = imagefolder.split_of(sample.key, validation)
    return Row(sample.key, sample.place, [label] if label else [], label, split, reason)


def _label(sample: _Sample, names: dict[str, list[str]]) -> tuple[str | None, list[str]]:
    """The class in words, and why a text is not used; the words of json first, as cls often holds a number only."""
    values, faults = _json(sample)
    given = [values.get(key) for key in ("class_name", "class", "label")]
    text, fault = _text(sample, "cls")
    faults += fault
    given = [int(value) if isinstance(value, float) and value.is_integer() else value for value in [*given, text]]
    found = [str(value).strip() for value in given if isinstance(value, str | int) and not isinstance(value, bool)]
    words = [one for one in found if one and not one.isdecimal()]
    if words:
        return " ".join(words[0].replace("_", " ").split()), faults
    numbers = [one for one in found if one.isdecimal()]
    if numbers and len(numbers[0]) > LONGEST_NUMBER:
        return None, [*faults, "its class is a number beyond all classes"]
    return _class_name(sample, int(numbers[0]), names) if numbers else None, faults


def _class_name(sample: _Sample, number: int, names: dict[str, list[str]]) -> str:
    """Line `number` of classes.txt in the shard's folder; `names` holds the lines of the files read so far."""
    folder, slash, _ = sample.shard.rpartition("/")
    path = f"{folder}{slash}classes.txt"
    if path not in names:
        try:
            with fsspec.open(path, "rb") as file:
                names[path] = texts.decode(file.read()).splitlines()
        except Exception as error:  # each file system raises its own
            reason = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
            raise UserError(
                f"{path}: {reason}; {sample.key} of {sample.shard} has the class {number}: write there the classes' "
                "names, one a line, that of class 0 first"
            ) from None
    if number >= len(names[path]) or not names[path][number].strip():
        raise UserError(f"{path}: no line for the class {number} of {sample.key} in {sample.shard}; complete it")
    return " ".join(names[path][number].replace("_", " ").split())


def _json(sample: _Sample) -> tuple[dict[str, Any], list[str]]:
    """What its json says, and why that is nothing."""
    text, fault = _content(sample, "json")
    if text is None:
        return {}, fault
    try:
        values = texts.parse_json(text)
    except json.JSONDecodeError:
        return {}, ["its json is not valid JSON"]
    except ValueError as error:
        return {}, [f"its json is {str(error).partition(':')[0]}"]
    return (values, []) if isinstance(values, dict) else ({}, ["its json is no object"])


def _text(sample: _Sample, extension: str) -> tuple[str | None, list[str]]:
    """A text of it, and why it has none."""
    content, fault = _content(sample, extension)
    try:
        return (None if content is None else texts.decode(content)), fault
    except ValueError:
        return None, [f"its {extension} is not UTF-8 text"]


def _content(sample: _Sample, extension: str) -> tuple[bytes | None, list[str]]:
    if extension not in sample.texts:
        return None, []
    content = sample.texts[extension].text
    return content, [f"its {extension} is over {LONGEST_TEXT} bytes long"] if content is None else []
