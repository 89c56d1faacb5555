"""The manifest: one row per picture, whichever source it came from, and the check that every picture decodes."""

from __future__ import annotations

import csv
import hashlib
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.progress import Progress

from pipeline.errors import UserError
from pipeline.pictures import decode, read

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.string()),
        ("sha256", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("label", pa.string()),
        ("split", pa.string()),
        ("quarantine", pa.string()),
    ]
)
NAMED = 20  # pictures named one by one on stderr; the listing names all of them


@dataclass(frozen=True)
class Row:
    """What a reader says of one picture. `quarantine` is a reason not to use it, known before it is opened.

    `image` is a path, also one with the ending of `pictures.part_of_tar`, or a text: the same of a remote tar.
    """

    id: str
    image: Path | str
    captions: list[str]
    label: str | None
    split: str
    quarantine: str | None = None


def share(key: str) -> float:
    """A number in [0, 1) that depends on the key alone, so that an inserted picture never moves another one."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def order(key: str) -> float:
    """The place of a picture where `count` cuts; independent of `share`, or a cut would take one split only."""
    return share(f"order:{key}")


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def existing_folder(root: Path | None, parameter: str) -> Path:
    """`root` if it is a folder. Raises UserError naming the parameter that holds it."""
    if root is None or not root.is_dir():
        raise UserError(f"{root}: no such folder; set {parameter} in params.yaml to the folder of the data set")
    return root


def below(folder: Path, name: str, where: str) -> Path:
    """`folder / name`. Raises UserError if `name`, read from a file of the data set, leads out of the folder."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if not name or parts.is_absolute() or ".." in parts.parts or "\0" in name:
        raise UserError(f"{where}: {name!r} is no file name below {folder}; mend that entry")
    return folder / name


def build(
    rows: Sequence[Row], data: str, max_broken: float, workers: int, progress: Progress, listing: Path
) -> pa.Table:
    """The manifest of `rows`, sorted by id (columns: SCHEMA), after decoding every picture.

    Pictures that do not decode keep their row, with the reason in `quarantine` and no split. `listing` is where the
    quarantined ones are written as CSV, whether or not they are too many. Raises UserError when the share of those
    that do not decode exceeds `max_broken`, when two rows have one id, or when no usable picture is left.
    """
    rows = sorted(rows, key=lambda row: row.id)
    _check_unique(rows, data)
    checked = check_pictures([_portable(row.image) for row in rows], workers, progress)
    records = [_record(row, sha256, reason) for row, (sha256, reason) in zip(rows, checked, strict=True)]
    _write_listing(records, listing)
    broken = [(_named(row), reason) for row, (_, reason) in zip(rows, checked, strict=True) if reason]
    _report_broken(broken, len(rows), data, max_broken, listing)
    _report_left_out(rows, data)
    if all(record["quarantine"] for record in records):
        raise UserError(f"data.{data}: no usable picture among {len(rows)}; check the root and files it names")
    return pa.Table.from_pylist(records, schema=SCHEMA)


def check_splits(table: pa.Table, data: str) -> None:
    """Raises UserError when a split is empty: better before the training than after it."""
    for part in ("train", "val", "test"):
        if part not in table["split"].to_pylist():
            raise UserError(
                f"data.{data}: of {table.num_rows} pictures none falls into the {part} part; add pictures or raise "
                f"data.{data}.count"
            )


def write(table: pa.Table, path: Path) -> None:
    """Write a manifest as Parquet: to a temporary name first, so that a half-written one never has the real name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(table, temporary, compression="zstd")
    temporary.replace(path)


def check_pictures(images: Sequence[str], workers: int, progress: Progress) -> list[tuple[str | None, str | None]]:
    """(SHA-256 of the bytes or None, reason it can't be used or None) for each picture, in order."""
    Image.init()  # loads PIL's plug-ins; left to the first picture, the threads would race for it
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:  # decoders release the GIL: threads scale
        warnings.simplefilter("ignore")  # PIL's remarks on odd metadata; what matters comes back as a reason
        done: Iterable[tuple[str | None, str | None]] = pool.map(check_picture, images)
        return list(progress.track(done, total=len(images), description="check pictures"))


def check_picture(image: str) -> tuple[str | None, str | None]:
    """Decode one picture to its last row: a truncated file opens without complaint and fails only there."""
    try:
        content = read(image)
    except FileNotFoundError:
        return None, "no such file"
    except OSError as error:
        return None, f"can't be read: {error.strerror}"
    return hashlib.sha256(content).hexdigest(), _decoding_fault(content)


def _decoding_fault(content: bytes) -> str | None:
    try:
        decode(content)
    except ValueError as error:
        return str(error)
    return None


def _report_left_out(rows: Sequence[Row], data: str) -> None:
    """One line on stderr for the rows that their source could not use, e.g. for want of a caption."""
    left_out = [row for row in rows if row.quarantine]
    if left_out:
        first = left_out[0]
        print(
            f"data.{data}: {len(left_out)} of {len(rows)} left out ({first.quarantine}), first {first.id}; "
            "complete or remove their entries",
            file=sys.stderr,
        )


def _check_unique(rows: Sequence[Row], data: str) -> None:
    if not rows:
        raise UserError(f"data.{data}: the data set has no picture; check the root and the files it names")
    for one, other in pairwise(rows):
        if one.id == other.id:
            raise UserError(f"data.{data}: two pictures have the id {one.id!r}: {one.image} and {other.image}")


def _write_listing(records: Sequence[dict[str, object]], path: Path) -> None:
    """id, image and reason of every quarantined picture, as CSV; no file where there is none."""
    quarantined = [[record["id"], record["image"], record["quarantine"]] for record in records if record["quarantine"]]
    if not quarantined:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "image", "reason"], *quarantined])


def _report_broken(broken: list[tuple[str, str]], total: int, data: str, max_broken: float, listing: Path) -> None:
    for image, reason in broken[:NAMED]:
        warn(f"{image}: {reason}; left out")
    if broken:
        more = f", the first {NAMED} named here" if len(broken) > NAMED else ""
        warn(f"{len(broken)} of {total} pictures of data.{data} can't be used{more}; all with their reasons: {listing}")
    if len(broken) > max_broken * total:
        first = ", ".join(f"{image} ({reason})" for image, reason in broken[:3])
        raise UserError(
            f"data.{data}: {len(broken)} of {total} pictures can't be used, more than data.{data}.max_broken = "
            f"{max_broken:g} allows; first: {first}; all: {listing}; mend or remove them, or raise "
            f"data.{data}.max_broken in params.yaml"
        )


def _record(row: Row, sha256: str | None, reason: str | None) -> dict[str, object]:
    quarantine = row.quarantine or reason
    return {
        "id": row.id,
        "image": _portable(row.image),
        "sha256": sha256,
        "captions": row.captions,
        "label": row.label,
        "split": None if quarantine else row.split,
        "quarantine": quarantine,
    }


def _named(row: Row) -> str:
    """The picture for people: of one in a tar the offset says little, the key more."""
    image = _portable(row.image)
    return f"{image} ({row.id})" if ".tar#" in image else image


def _portable(path: Path | str) -> str:
    """Relative to the project folder if below it, so that a moved project keeps its manifest; links are kept."""
    if isinstance(path, str):
        return path
    absolute = Path(os.path.normpath(path.absolute()))  # resolve() would follow a linked data folder
    here = Path.cwd()
    return (absolute.relative_to(here) if absolute.is_relative_to(here) else absolute).as_posix()
