"""What a source says of its pictures, before any is opened: a row for each, which the manifest keeps."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pipeline.sources.folders import LeftOut
from pipeline.sources.texts import one_line

SHARES = {"train": 0.70, "val": 0.15, "test": 0.15}


@dataclass(frozen=True)
class Row:
    """What a source says of one picture. `quarantine` is a reason not to use it, known before it is opened.

    `image` is a path, also one with the ending of `pictures.part_of_tar`, or a text: the same of a remote tar. `split`
    is None where the files of the data set do not give it: then data.<name>.split decides, and where that is blocks,
    pictures of one `group`, such as a series of shots, come into one part. `carved`: it has decided.
    """

    id: str
    image: Path | str
    captions: list[str]
    label: str | None
    split: str | None = None
    quarantine: str | None = None
    group: str | None = None
    carved: bool = False


@dataclass(frozen=True)
class Found:
    """What a source found in a data set: a row for every picture, and whatever is not used and no row.

    `shares` are those of the parts into which rows without a split come.
    """

    rows: list[Row]
    left_out: list[LeftOut] = field(default_factory=list)
    shares: Mapping[str, float] = field(default_factory=lambda: SHARES)


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
