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
from rich.progress import Progress

from pipeline.errors import UserError
from pipeline.params import Dataset
from pipeline.pictures import part_of_tar
from pipeline.sources import coco, imagefolder
from pipeline.sources.manifest import Row, order, warn

PICTURES = frozenset(suffix.removeprefix(".") for suffix in imagefolder.SUFFIXES)
TEXTS = frozenset({"txt", "json", "cls"})
LONGEST_TEXT = 2**20  # bytes
_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # key and extension, as webdataset.tariterators.base_plus_ext has it
_META = re.compile(r"__[^/]*__($|/)")  # members that WebDataset skips
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class _Part:
    """A member of a tar; of short texts also the content."""

    offset: int
    size: int
    text: bytes | None


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


def read_captions(pattern: str, count: int | None, workers: int, progress: Progress) -> list[Row]:
    """One row per picture of the shards, with the captions of its json ("captions", "caption") and its txt.

    Split and `count` as in the COCO layout, by hash of the key. Pictures without a caption are quarantined. Raises
    UserError, naming the shard, when a shard is missing or damaged, holds a link or a path that leads out of it, when
    two pictures have one key, or when no picture has a caption.
    """
    return _rows(pattern, "captions", _caption_row, workers, progress)[:count]


def read_classes(pattern: str, validation: float, count: int | None, workers: int, progress: Progress) -> list[Row]:
    """One row per picture of the shards, with the class of its cls or its json ("class_name", "class", "label").

    A class given as a number is the line of that number (from 0) of classes.txt beside the shards. Split as in plain
    folders, by hash of the key; `count` keeps at most that many pictures per class. Raises like read_captions.
    """
    rows = _rows(pattern, "classes", partial(_class_row, validation, {}), workers, progress)
    kept: defaultdict[str | None, list[Row]] = defaultdict(list)
    for row in rows:
        kept[row.label].append(row)
    return [row for group in kept.values() for row in group[:count]]


def look(pattern: str, data: Dataset) -> tuple[int, int]:
    """(shards, pictures in the first one), without reading more than that one. Raises UserError as reading does."""
    shards = find_shards(pattern, f"data.{data}.shards")
    to_row = _caption_row if data == "captions" else partial(_class_row, 0.1, {})
    rows = [to_row(sample) for sample in _index(shards[0])]
    _check_texts(rows, shards[0], data)
    return len(shards), len(rows)


def _rows(pattern: str, data: Dataset, to_row: Callable[[_Sample], Row], workers: int, progress: Progress) -> list[Row]:
    """A row for every picture of the shards, in the order in which `count` cuts."""
    shards = find_shards(pattern, f"data.{data}.shards")
    rows: list[Row] = []
    shard_of: dict[str, str] = {}
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda shard: [to_row(sample) for sample in _index(shard)], shards)
        for shard, part in zip(shards, progress.track(found, len(shards), description="index shards"), strict=True):
            for row in part:
                if shard_of.setdefault(row.id, shard) != shard:
                    raise UserError(
                        f"{shard}: the key {row.id!r} is also in {shard_of[row.id]}; keys must be unique: leave one of "
                        "the shards out, or write it with other keys"
                    )
            rows += part
    _check_texts(rows, pattern, data)
    return sorted(rows, key=lambda row: order(row.id))


def _check_texts(rows: list[Row], name: str, data: Dataset) -> None:
    """Raises UserError when there is no picture, or not one of them has a text."""
    if not rows:
        raise UserError(f"{name}: no picture in it; members are named KEY.jpg (or {', '.join(sorted(PICTURES))})")
    if not any(row.captions for row in rows):
        texts = {
            "captions": 'caption; each KEY.jpg needs KEY.txt, one caption, or KEY.json with "caption" or "captions"',
            "classes": 'class; each KEY.jpg needs KEY.cls, or KEY.json with "class" or "label"',
        }
        raise UserError(
            f"{name}: none of {len(rows)} pictures ({rows[0].id}: {rows[0].quarantine}) has a {texts[data]}"
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


def _index(shard: str) -> list[_Sample]:
    """The samples of one shard that have a picture; a warning names how many have none."""
    groups: dict[str, dict[str, _Part]] = {}
    for name, part in _parts(shard):
        match = _KEY.fullmatch(name)
        if match and (extension := match[2].lower()) in PICTURES | TEXTS:
            group = groups.setdefault(match[1], {})
            if extension in group:
                raise UserError(f"{shard}: two members are named {name!r}; write the shard anew with one of them")
            group[extension] = part
    samples = []
    for key, group in groups.items():
        pictures = sorted(group.keys() & PICTURES)
        if len(pictures) > 1:
            raise UserError(f"{shard}: the key {key!r} has more than one picture ({', '.join(pictures)}); keep one")
        if pictures:
            image = part_of_tar(shard, group[pictures[0]].offset, group[pictures[0]].size)
            texts = {extension: part for extension, part in group.items() if extension in TEXTS}
            samples.append(_Sample(shard, key, image, texts))
    if len(samples) < len(groups):
        warn(f"{shard}: {len(groups) - len(samples)} of {len(groups)} keys have no picture; left out")
    return samples


def _parts(shard: str) -> list[tuple[str, _Part]]:
    """Name and place of every file of a tar, in order, after a check of every member and of the end."""
    found = []
    faults = _faults_of(shard, "cannot be read as an uncompressed tar", "mend or remove it")
    with faults, fsspec.open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            name = _checked_name(shard, member)
            if member.isdir() or _META.match(name) or PurePosixPath(name).name.startswith("."):
                continue
            text = None
            if name.lower().endswith((".txt", ".json", ".cls")) and member.size <= LONGEST_TEXT:
                file.seek(member.offset_data)
                text = file.read(member.size)
            found.append((name, _Part(member.offset_data, member.size, text)))
        _check_end(shard, file, tar.offset, len(found))
    return found


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


def _check_end(shard: str, file: Any, offset: int, count: int) -> None:
    """A tar ends on a block of zeros; tarfile takes a damaged header and the end of the file for its end, too."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if any(block):
        raise UserError(f"{shard}: damaged at byte {offset}, after {count} members; copy or write it anew")
    if not block:
        warn(f"{shard}: no end mark, as if it were cut off; the {count} members before that are used")


def _caption_row(sample: _Sample) -> Row:
    try:
        captions = _captions(sample)
        reason = None if captions else "no caption"
    except ValueError as error:
        captions, reason = [], str(error)
    return Row(sample.key, sample.place, captions, None, coco.split_of(sample.key), reason)


def _captions(sample: _Sample) -> list[str]:
    """The distinct captions. Raises ValueError when a text can't be read."""
    values = _json(sample)
    several, one = values.get("captions") or [], values.get("caption")
    if not isinstance(several, list):
        raise ValueError('"captions" in its json is no list')
    found = [*several, *([] if one is None else [one])]
    if not all(isinstance(caption, str) for caption in found):
        raise ValueError("a caption in its json is no text")
    if "txt" in sample.texts:
        found.append(_text(sample, "txt"))
    return list(dict.fromkeys(caption.strip() for caption in found if caption.strip()))


def _class_row(validation: float, names: dict[str, list[str]], sample: _Sample) -> Row:
    label = None
    try:
        label = _label(sample, names)
        reason = None if label else "no class"
    except ValueError as error:
        reason = str(error)
    split = imagefolder.split_of(sample.key, validation)
    return Row(sample.key, sample.place, [label] if label else [], label, split, reason)


def _label(sample: _Sample, names: dict[str, list[str]]) -> str | None:
    """The class in words; those of json first, as cls often holds a number only."""
    values = _json(sample)
    given = [values.get(key) for key in ("class_name", "class", "label")]
    if "cls" in sample.texts:
        given.append(_text(sample, "cls"))
    texts = [str(value).strip() for value in given if isinstance(value, str | int) and not isinstance(value, bool)]
    words = [text for text in texts if text and not text.isdecimal()]
    if words:
        return " ".join(words[0].replace("_", " ").split())
    numbers = [int(text) for text in texts if text.isdecimal()]
    return _class_name(sample, numbers[0], names) if numbers else None


def _class_name(sample: _Sample, number: int, names: dict[str, list[str]]) -> str:
    """Line `number` of classes.txt in the shard's folder; `names` holds the lines of the files read so far."""
    folder, slash, _ = sample.shard.rpartition("/")
    path = f"{folder}{slash}classes.txt"
    if path not in names:
        try:
            with fsspec.open(path, "rb") as file:
                names[path] = file.read().decode("utf-8-sig").splitlines()
        except Exception as error:  # each file system raises its own
            reason = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
            raise UserError(
                f"{path}: {reason}; {sample.key} of {sample.shard} has the class {number}: write there the classes' "
                "names, one a line, that of class 0 first"
            ) from None
    if number >= len(names[path]) or not names[path][number].strip():
        raise UserError(f"{path}: no line for the class {number} of {sample.key} in {sample.shard}; complete it")
    return " ".join(names[path][number].replace("_", " ").split())


def _json(sample: _Sample) -> dict[str, Any]:
    if "json" not in sample.texts:
        return {}
    try:
        values = json.loads(_text(sample, "json"))
    except (json.JSONDecodeError, RecursionError):
        raise ValueError("its json is not valid JSON") from None
    if not isinstance(values, dict):
        raise ValueError("its json is no object")
    return values


def _text(sample: _Sample, extension: str) -> str:
    content = sample.texts[extension].text
    if content is None:
        raise ValueError(f"its {extension} is over {LONGEST_TEXT} bytes long")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"its {extension} is not UTF-8 text") from None
