"""Shards on disk: written whole or not at all, and never changed afterwards."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import mmap
import os
import platform
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from pipeline.errors import UserError
from pipeline.files import atomically
from pipeline.runs import STORE, Kind
from pipeline.store import schema


@dataclass(frozen=True)
class Shard:
    """One Arrow file of the store."""

    name: str
    sha256: str
    rows: int
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What DVC tracks of a feature set: its shards by name and SHA-256; for text also its embedding table."""

    kind: Kind
    fingerprint: str
    shards: list[Shard]
    embeddings: Shard | None = None
    encoder: dict[str, str] | None = None
    """Of image tokens: the identity of the encoder that made them; in words, beside the fingerprint."""

    @property
    def folder(self) -> Path:
        return STORE / self.kind / self.fingerprint

    @property
    def files(self) -> list[Shard]:
        """The shards and the embedding table."""
        return self.shards + ([self.embeddings] if self.embeddings else [])

    def write(self, path: Path) -> None:
        with atomically(path) as file:
            file.write((json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raises UserError when the manifest is missing or not one."""
        try:
            values = json.loads(path.read_text())
            values["shards"] = [Shard(**shard) for shard in values["shards"]]
            values["embeddings"] = Shard(**values["embeddings"]) if values["embeddings"] else None
            return cls(**values)
        except FileNotFoundError:
            raise UserError(path, "no such feature manifest", "run `dvc repro`") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(path, f"not a feature manifest ({error})", "delete it and run `dvc repro`") from None


def remove_temporary(folder: Path, process: int) -> None:
    """Remove what a process of this machine that is no more left half written in a folder of the store."""
    for path in folder.glob(f".*.{platform.node()}.{process}.*"):
        path.unlink(missing_ok=True)


@contextmanager
def in_use(exclusive: bool = False) -> Iterator[None]:
    """Hold the store: extractions share it, `prune` needs it alone.

    Raises UserError when it is asked for alone while others are at work.
    """
    STORE.mkdir(parents=True, exist_ok=True)
    mode = os.O_RDWR if exclusive else os.O_RDONLY  # a store of another user can be shared, if there is nothing to add
    with os.fdopen(os.open(STORE / ".lock", mode | os.O_CREAT, 0o666)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
        except BlockingIOError:
            raise UserError(STORE, "an extraction is at work here", "wait until it has ended") from None
        yield


def write_shard(path: Path, table: pa.Table) -> Shard:
    """Write a table as an uncompressed Arrow IPC file of one record batch under its final name, read-only."""
    with atomically(path) as file:
        hashed = _Hashed(file)
        _write_table(hashed, table)
        sha256 = hashed.finish()
    return Shard(path.name, sha256, table.num_rows, path.stat().st_size)


def _write_table(file: Any, table: pa.Table) -> None:
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table.combine_chunks())


class _Hashed:
    """A file that another thread hashes while it is written, as far as that is done in order and never twice."""

    closed = False
    PIECE = 1 << 20  # bytes; one write of many took Linux up to eight times as long

    def __init__(self, file: BinaryIO):
        self.file, self.tell, self.flush = file, file.tell, file.flush
        self._digest, self._hashed, self._beside = hashlib.sha256(), 0, ThreadPoolExecutor(1)
        self._hashing = self._beside.submit(self._digest.update, b"")

    def write(self, data: Any) -> int:
        buffer = pa.py_buffer(data)
        if self.tell() == self._hashed:
            self._hashed += buffer.size
            self._hashing.result()  # so that one buffer waits in memory, not all
            self._hashing = self._beside.submit(self._digest.update, buffer)
        for start in range(0, buffer.size, self.PIECE):
            self.file.write(buffer[start : start + self.PIECE])
        return buffer.size

    def finish(self) -> str:
        """Bring all to the disk, make the file read-only and return its SHA-256.

        What was not written in order is read again.
        """
        self.flush()
        os.fchmod(self.file.fileno(), 0o444)
        os.fsync(self.file.fileno())
        self._hashing.result()
        with Path(self.file.name).open("rb") as file:
            file.seek(self._hashed)
            while chunk := file.read(self.PIECE):
                self._digest.update(chunk)
        return self._digest.hexdigest()


class ShardFile:
    """A shard that is written row by row, in any order, each row once: memory does not grow with its size.

    The file has its final layout from the start, with holes where the numbers go. Its bytes are those of write_shard.
    `leading` are the columns [rows] before the fixed-shape ones of the schema `arrow`.
    """

    def __init__(self, file: BinaryIO, arrow: pa.Schema, leading: list[pa.Array]):
        rows, fields = len(leading[0]), list(arrow)[len(leading) :]
        blank = [_zeros(rows, field) for field in fields]
        columns = [schema.tensor_column(zeros, field) for zeros, field in zip(blank, fields, strict=True)]
        self._file, self._hashed = file, _Hashed(file)
        holes = _Holes(self._hashed, {zeros.ctypes.data for zeros in blank})
        _write_table(holes, pa.table([*leading, *columns], arrow))
        file.flush()
        mapped = pa.memory_map(file.name)
        start = mapped.read_buffer().address
        mapped.seek(0)
        table = pa.ipc.open_file(mapped).read_all()
        found = {field.name: schema.dense(table, field.name) for field in fields}
        self._places = {name: (column.ctypes.data - start, column[0].nbytes) for name, column in found.items()}

    def put(self, at: list[int], columns: dict[str, np.ndarray[Any, Any]]) -> None:
        """Write rows to the positions `at`, at least one; columns [len(at), ...] in the numbers of the schema."""
        runs = np.split(np.arange(len(at)), np.flatnonzero(np.diff(at) != 1) + 1)  # of neighbours, which go at once
        for name, column in columns.items():
            offset, size = self._places[name]
            for run in runs:
                self._file.seek(offset + at[run[0]] * size)
                self._hashed.write(np.ascontiguousarray(column[run[0] : run[-1] + 1]))

    def finish(self) -> str:
        """Bring all to the disk, make the file read-only and return its SHA-256."""
        return self._hashed.finish()


def _zeros(rows: int, field: pa.Field) -> np.ndarray[Any, Any]:
    """Zeros [rows, ...] for a fixed-shape column. They take no memory: pages that nobody wrote to are all one page."""
    shape, dtype = (rows, *field.type.shape), np.dtype(field.type.value_type.to_pandas_dtype())
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, mmap.MAP_PRIVATE)
    return np.frombuffer(pages, dtype).reshape(shape)


class _Holes:
    """A file that is not written to where Arrow writes one of the `blank` buffers, named by their addresses."""

    closed = False

    def __init__(self, hashed: _Hashed, blank: set[int]):
        self.hashed, self.blank = hashed, blank
        self.tell, self.flush = hashed.tell, hashed.flush

    def write(self, data: Any) -> int:
        buffer = pa.py_buffer(data)
        if buffer.address in self.blank:
            self.hashed.file.seek(buffer.size, os.SEEK_CUR)
        else:
            self.hashed.write(buffer)
        return buffer.size


def describe(path: Path) -> Shard:
    """A shard as it is on disk; raises UserError when it is not a whole Arrow file."""
    rows = open_shard(path).num_rows
    return Shard(path.name, sha256_of(path), rows, path.stat().st_size)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_record(path: Path, shard: Shard, **making: object) -> None:
    """Keep beside a shard what it was when it was written, and what its making took: <shard>.json.

    It is no DVC output: timings must not make a later stage stale.
    """
    with atomically(path.with_suffix(".json")) as file:
        file.write((json.dumps({"shard": asdict(shard), **making}, indent=1) + "\n").encode())


def read_record(path: Path) -> tuple[Shard, dict[str, Any]] | None:
    """What `write_record` kept of the shard at `path`; None when there is nothing or it is no record."""
    try:
        values = json.loads(path.with_suffix(".json").read_text())
        return Shard(**values.pop("shard")), values
    except (OSError, ValueError, KeyError, TypeError):
        return None


def recorded(path: Path) -> Shard | None:
    """A shard as it was when it was written: so a manifest made anew does not take damage for the truth.

    None, with a note on stderr, when what is there is no whole shard of its folder's fingerprint.
    """
    try:
        open_shard(path, path.parent.name)
    except UserError as fault:
        print(f"{str(fault).partition(';')[0]}; it is made again", file=sys.stderr)
        return None
    record = read_record(path)
    if record is not None:
        return record[0]
    shard = describe(path)  # the process was killed between shard and record, or the record was deleted
    write_record(path, shard)
    return shard


def open_shard(path: Path, expected: str | None = None) -> pa.Table:
    """Map a shard into memory; `expected` is the fingerprint it has to carry.

    Raises UserError naming the file when it is missing, cut short, of another fingerprint or of another schema.
    """
    mend = "`terraalign store verify --repair` makes it anew"
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except FileNotFoundError:
        raise UserError(path, "this shard is gone", mend) from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(path, f"not a whole Arrow file ({error})", mend) from None
    fault = schema.fault(table.schema, expected)
    if fault is not None:
        raise UserError(path, fault, mend)
    return table
