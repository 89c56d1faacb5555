"""What a source says of its pictures, before any is opened: a row for each, which the manifest keeps."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pipeline.sources.folders import LeftOut
from pipeline.sources.texts import one_line


@dataclass(frozen=True)
class Row:
    """What a source says of one picture. `quarantine` is a reason not to use it, known before it is opened.

    `image` is a path, also one with the ending of `pictures.part_of_tar`, or a text: the same of a remote tar.
    """

    id: str
    image: Path | str
    captions: list[str]
    label: str | None
    split: str
    quarantine: str | None = None


@dataclass(frozen=True)
class Found:
    """What a source found in a data set: a row for every picture, and whatever is not used and no row."""

    rows: list[Row]
    left_out: list[LeftOut] = field(default_factory=list)


def share(key: str) -> float:
    """A number in [0, 1) that depends on the key alone, so that an inserted picture never moves another one."""
    return int.from_bytes(hashlib.sha256(key.encode(errors="surrogatepass")).digest()[:8], "big") / 2**64


def order(key: str) -> float:
    """The place of a picture where `count` cuts; independent of `share`, or a cut would take one split only."""
    return share(f"order:{key}")


def below(folder: Path, name: str) -> Path:
    """`folder / name`. Raises ValueError if `name`, read from a file of the data set, leads out of the folder."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if not name or parts.is_absolute() or ".." in parts.parts or "\0" in name:
        raise ValueError(f"{name!r} is no file name below {folder}")
    return folder / name


def warn(message: str) -> None:
    print(f"warning: {one_line(message)}", file=sys.stderr)
