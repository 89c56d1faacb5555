"""What is in a tar: its members by the keys of WebDataset, each with its place, after a check of every one.

The format: https://github.com/webdataset/webdataset. Nothing is unpacked.
"""

from __future__ import annotations

import re
import tarfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from pipeline.errors import UserError
from pipeline.files import foreign_faults, is_utf8
from pipeline.media.pictures import part_of_tar
from pipeline.sources.folders import NOT_UTF8, SUFFIXES, LeftOut, begins_as_picture, is_hidden
from pipeline.sources.rows import warn

PICTURES = frozenset(suffix.removeprefix(".") for suffix in SUFFIXES)
TEXTS = frozenset({"txt", "json", "cls"})
LONGEST_TEXT = 2**20  # bytes
_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # key and extension, as webdataset.tariterators.base_plus_ext has it
_META = re.compile(r"__[^/]*__($|/)")  # members that WebDataset skips


@dataclass(frozen=True)
class Part:
    """A member of a tar; of short texts also the content, of other names whether it begins as a picture does."""

    offset: int
    size: int
    text: bytes | None
    picture: bool


@dataclass(frozen=True)
class Sample:
    """The members of one key: its picture and its texts by extension."""

    shard: str
    key: str
    image: str
    texts: dict[str, Part]

    @property
    def place(self) -> Path | str:
        return self.image if "://" in self.shard else Path(self.image)


def samples_of(shard: str, left_out: list[LeftOut]) -> list[Sample]:
    """The samples of one shard that have a picture; what belongs to none of them goes to `left_out`.

    A key ends at the first dot, as in the library. A picture whose name has another dot, like a.5x.jpg, is a sample of
    its own if there is a text of that name, a.5x.txt; and one of an unknown extension, if its key has no other.
    """
    groups: dict[str, dict[str, Part]] = {}
    for name, part in _parts(shard, left_out):
        match = _KEY.fullmatch(name)
        if not match:
            left_out.append(LeftOut(f"{shard}: {name}", "without an extension, so without a key"))
            continue
        group, extension = groups.setdefault(match[1], {}), match[2].lower()
        if extension in group and (part.picture or extension.rpartition(".")[2] in PICTURES | TEXTS):
            raise UserError(shard, f"two members are named {name!r}", "write the shard anew with one of them")
        group[extension] = part
    samples = []
    for key, group in groups.items():
        samples += _dotted(shard, key, group, left_out)
        if sample := _sample(shard, key, group):
            samples.append(sample)
        elif any("." not in extension for extension in group):
            left_out.append(LeftOut(f"{shard}: {key}", "without a picture"))
    return samples


def _sample(shard: str, key: str, group: dict[str, Part]) -> Sample | None:
    """The sample of a key's members by their extensions, if there is a picture; one at most."""
    pictures = sorted(group.keys() & PICTURES) or sorted(
        e for e, part in group.items() if part.picture and "." not in e
    )
    if len(pictures) > 1:
        raise UserError(shard, f"the key {key!r} has more than one picture ({', '.join(pictures)})", "keep one")
    if not pictures:
        return None
    image = part_of_tar(shard, group[pictures[0]].offset, group[pictures[0]].size)
    return Sample(shard, key, image, {extension: part for extension, part in group.items() if extension in TEXTS})


def _dotted(shard: str, key: str, group: dict[str, Part], left_out: list[LeftOut]) -> list[Sample]:
    """The samples among the members of a key whose names have another dot."""
    stems: defaultdict[str, dict[str, Part]] = defaultdict(dict)
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


def _parts(shard: str, left_out: list[LeftOut]) -> list[tuple[str, Part]]:
    """Name and place of every file of a tar, in order, after a check of every member and of the end.

    Tars that were written one behind another are read to the last.
    """
    found: list[tuple[str, Part]] = []
    start: int | None = 0

    def fault(reason: str) -> UserError:  # also what damage leads tarfile to
        return UserError(shard, f"cannot be read as an uncompressed tar ({reason})", "mend or remove it")

    with foreign_faults(fault), fsspec.open(shard, "rb") as file:
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


def _part(file: Any, name: str, member: tarfile.TarInfo) -> Part:
    extension = name.rpartition(".")[2].lower()
    text, picture = None, False
    if extension in TEXTS and member.size <= LONGEST_TEXT:
        file.seek(member.offset_data)
        text = file.read(member.size)
    elif extension not in PICTURES | TEXTS:
        file.seek(member.offset_data)
        picture = begins_as_picture(file.read(min(32, member.size)))
    return Part(member.offset_data, member.size, text, picture)


def _checked_name(shard: str, member: tarfile.TarInfo) -> str:
    """The member's name below the shard, without a leading ./ ."""
    path = PurePosixPath(member.name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        fault = "leads out of the shard"
    elif not (member.isreg() or member.isdir()) or member.issparse() or member.size < 0:
        fault = "is a link, a device or another thing that is no plain file"
    else:
        return path.as_posix()
    raise UserError(shard, f"the member {member.name!r} {fault}", "write the shard anew without it")


def _behind(shard: str, file: Any, offset: int, count: int, left_out: list[LeftOut]) -> int | None:
    """Where another tar begins behind the end of this one, or None.

    A tar ends on a block of zeros; tarfile takes a damaged header and the end of the file for its end, too.
    """
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if any(block):
        raise UserError(shard, f"damaged at byte {offset}, after {count} members", "copy or write it anew")
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
