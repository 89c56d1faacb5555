"""The manifest: one row per picture, whichever source it came from, and the check that every picture decodes."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.progress import Progress

from pipeline.errors import UserError, readable
from pipeline.files import atomically, is_utf8
from pipeline.media.pictures import decode, read
from pipeline.sources import copies, labels
from pipeline.sources.folders import NOT_UTF8, LeftOut
from pipeline.sources.rows import Found, Row, warn
from pipeline.sources.texts import NAMED, by_reason, listed, one_line

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
DARK = 2**14  # of 65535: pictures of 16 bits that have nothing brighter are suspect


def build(
    found: Found,
    data: str,
    max_broken: float,
    workers: int,
    progress: Progress,
    listing: Path,
    check: Callable[[str], Check],
    told: bool = False,
) -> pa.Table:
    """The manifest of what a reader found, sorted by id (columns: SCHEMA), after decoding every picture by `check`.

    Pictures that do not decode keep their row, with the reason in `quarantine` and no split. `listing` is where these
    and all else that is left out are written as CSV, whether or not they are too many; copies have one of their own
    beside it. `told`: which pictures are left out or copies is said by the caller. Raises UserError when the share of
    those that do not decode exceeds `max_broken`, when two rows have one id, or when no usable picture is left.
    """
    rows, left_out = _storable(found)
    rows, remarks = labels.mend(rows)
    rows.sort(key=lambda row: row.id)
    _check_unique(rows, data)
    checked = check_pictures([_portable(row.image) for row in rows], workers, progress, check)
    records = [_record(row, seen.sha256, seen.fault) for row, seen in zip(rows, checked, strict=True)]
    records, moved = copies.follow(records, rows)
    _write_listing(_lines(records, left_out), listing)
    of_copies = copies.listing_beside(listing)
    _write_listing(copies.lines(records), of_copies)
    broken = [(_named(row), seen.fault) for row, seen in zip(rows, checked, strict=True) if seen.fault]
    _report_left_out([] if told else rows, left_out, data, listing)
    _report_dark([(_named(row), seen.brightest) for row, seen in zip(rows, checked, strict=True)], data)
    if not told:
        _report_broken(broken, len(rows), data, listing)
    _check_broken(broken, len(rows), data, max_broken, listing)
    if all(record["quarantine"] for record in records):
        raise UserError(f"data.{data}", f"no usable picture among {len(rows)}", "check what params.yaml names there")
    splits = [(row.label, str(record["split"] or "")) for row, record in zip(rows, records, strict=True)]
    remarks += labels.thin((label, split) for label, split in splits if label is not None)
    remarks += [] if told else [*moved, *copies.remarks(records, of_copies)]
    for remark in remarks:
        warn(f"data.{data}: {remark}")
    return pa.Table.from_pylist(records, schema=SCHEMA)


def _storable(found: Found) -> tuple[list[Row], list[LeftOut]]:
    """Rows that UTF-8 can hold, and what is left out, with what it cannot hold."""
    rows, left_out = [], list(found.left_out)
    for row in found.rows:
        image = _portable(row.image)
        if not is_utf8(row.id) or not is_utf8(image):
            left_out.append(LeftOut(image, NOT_UTF8, id=row.id))
            continue
        captions = [caption for caption in row.captions if is_utf8(caption)]
        fault = "half of a character in its text"  # e.g. a text that was cut within an emoji
        if len(captions) < len(row.captions):
            if captions:
                lost = [text for text in row.captions if not is_utf8(text)]
                left_out += [LeftOut(f"{image}: {text}", fault, id=row.id) for text in lost]
            row = replace(row, captions=captions, quarantine=row.quarantine or (None if captions else fault))
        if row.label is not None and not is_utf8(row.label):
            row = replace(row, label=None, quarantine=row.quarantine or fault)
        rows.append(row)
    return rows, left_out


class EmptyPart(UserError):
    """A part of a data set has no picture."""


def check_splits(table: pa.Table, data: str) -> None:
    """Raises EmptyPart when a split is empty: better before the training than after it."""
    for part in ("train", "val", "test"):
        if part not in table["split"].to_pylist():
            raise EmptyPart(
                f"data.{data}",
                f"of {table.num_rows} pictures none falls into the {part} part",
                f"add pictures or raise data.{data}.count",
            )


def write(table: pa.Table, path: Path) -> None:
    """Write a manifest as Parquet, whole or not at all."""
    with atomically(path) as file:
        pq.write_table(table, file, compression="zstd")


@dataclass(frozen=True)
class Check:
    """What decoding a picture said: SHA-256 of its bytes; why it can't be used; of 16 bits also the largest value."""

    sha256: str | None
    fault: str | None = None
    brightest: int | None = None


def check_pictures(
    images: Sequence[str], workers: int, progress: Progress, check: Callable[[str], Check]
) -> list[Check]:
    """Each picture decoded by `check`, in order."""
    Image.init()  # loads PIL's plug-ins; left to the first picture, the threads would race for it
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:  # decoders release the GIL: threads scale
        warnings.simplefilter("ignore")  # PIL's remarks on odd metadata; what matters comes back as a reason
        done: Iterable[Check] = pool.map(check, images)
        return list(progress.track(done, total=len(images), description="check pictures"))


def check_picture(image: str) -> Check:
    """Decode one picture to its last row: a truncated file opens without complaint and fails only there."""
    try:
        content = read(image)
    except FileNotFoundError:
        return Check(None, "no such file")
    except OSError as error:
        return Check(None, f"can't be read: {error.strerror}")
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        return Check(sha256, brightest=decode(content).info.get("brightest"))
    except ValueError as error:
        return Check(sha256, one_line(error))


def _report_left_out(rows: Sequence[Row], left_out: Sequence[LeftOut], data: str, listing: Path) -> None:
    """A line on stderr for the rows that their source could not use, and one for what is no row."""
    if unused := [(row.id, row.quarantine) for row in rows if row.quarantine]:
        print(
            f"data.{data}: {len(unused)} of {len(rows)} left out: {by_reason(unused)}; all: {listing}; complete "
            "or remove their entries",
            file=sys.stderr,
        )
    for owner, count in Counter(one.owner for one in left_out if one.owner).items():
        files = "1 file beside its own is" if count == 1 else f"{count} files beside its own are"
        print(f"data.{data}: {files} of data.{owner}", file=sys.stderr)
    if lost := [one for one in left_out if not one.owner]:
        reasons = by_reason((str(one), one.reason) for one in lost)
        warn(f"data.{data}: {len(lost)} not used: {reasons}; all: {listing}")


def _report_dark(pictures: Iterable[tuple[str, int | None]], data: str) -> None:
    """One line for the pictures of 16 bits a channel that may have fewer, as from a camera of 12."""
    dark = [f"{name}: {value}" for name, value in pictures if value is not None and 0 < value < DARK]
    if dark:
        warn(
            f"data.{data}: pictures of 16 bits a channel that come out nearly black; the brightest value of 65535: "
            f"{listed(dark)}; if they have fewer bits, scale the values to 16 or have the file say it (PNG: "
            "sBIT, TIFF: BitsPerSample, MaxSampleValue)"
        )


def _check_unique(rows: Sequence[Row], data: str) -> None:
    for one, other in pairwise(rows):
        if one.id == other.id:
            raise UserError(
                f"data.{data}",
                f"two pictures have the id {one.id!r}: {one.image} and {other.image}",
                "rename or remove one",
            )


def _lines(records: Sequence[copies.Record], left_out: Sequence[LeftOut]) -> list[list[str]]:
    """id, image and reason of every quarantined picture and all else left out."""
    lines = [[record["id"], record["image"], record["quarantine"]] for record in records if record["quarantine"]]
    return lines + [[one.id, str(one), one.reason] for one in left_out]


def _write_listing(lines: Sequence[Sequence[str]], path: Path) -> None:
    """Lines of id, image and reason as CSV; no file if there is none."""
    if not lines:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["id", "image", "reason"], *([readable(cell) for cell in line] for line in lines)])
    with atomically(path) as file:
        file.write(text.getvalue().encode())


def _report_broken(broken: list[tuple[str, str]], total: int, data: str, listing: Path) -> None:
    for image, reason in broken[:NAMED]:
        warn(f"{image}: {reason}; left out")
    if broken:
        more = f", the first {NAMED} named here" if len(broken) > NAMED else ""
        warn(f"{len(broken)} of {total} pictures of data.{data} can't be used{more}; all with their reasons: {listing}")


def _check_broken(broken: list[tuple[str, str]], total: int, data: str, max_broken: float, listing: Path) -> None:
    if len(broken) > max_broken * total:
        first = ", ".join(f"{image} ({reason})" for image, reason in broken[:3])
        raise UserError(
            f"data.{data}",
            (
                f"{len(broken)} of {total} pictures can't be used, more than data.{data}.max_broken = "
                f"{max_broken:g} allows; first: {first}; all: {listing}"
            ),
            f"mend or remove them, or raise data.{data}.max_broken in params.yaml",
        )


def _record(row: Row, sha256: str | None, reason: str | None) -> copies.Record:
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
