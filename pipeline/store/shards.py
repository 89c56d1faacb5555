"""Shards on disk: written whole or not at all, and never changed afterwards."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from pipeline.errors import UserError

STORE = Path("data/store")


@dataclass(frozen=True)
class Shard:
    """One Arrow file of the store."""

    name: str
    sha256: str
    rows: int


@dataclass(frozen=True)
class Manifest:
    """What DVC tracks of a feature set: its shards by name and SHA-256; for text also its embedding table."""

    kind: str
    fingerprint: str
    shards: list[Shard]
    embeddings: Shard | None = None

    @property
    def folder(self) -> Path:
        return STORE / self.kind / self.fingerprint

    def write(self, path: Path) -> None:
        write_atomically(path, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raises UserError when the manifest is missing or not one."""
        try:
            values = json.loads(path.read_text())
            values["shards"] = [Shard(**shard) for shard in values["shards"]]
            values["embeddings"] = Shard(**values["embeddings"]) if values["embeddings"] else None
            return cls(**values)
        except FileNotFoundError:
            raise UserError(f"{path}: no such feature manifest; run `dvc repro`") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a feature manifest ({error}); delete it and run `dvc repro`") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name, fsync, rename: the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(path: Path, table: pa.Table) -> Shard:
    """Write a table as an uncompressed Arrow IPC file under its final name, read-only."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    write_atomically(path, sink.getvalue())
    path.chmod(0o444)
    return describe(path)


def describe(path: Path) -> Shard:
    """Name, SHA-256 and rows of a shard on disk; raises UserError when it is not a whole Arrow file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(path.name, digest, open_shard(path).num_rows)


def open_shard(path: Path, expected: str | None = None) -> pa.Table:
    """Map a shard into memory; `expected` is the fingerprint it has to carry.

    Raises UserError naming the file when it is missing, cut short, or of another fingerprint.
    """
    mend = "delete it if it is there, then run `dvc repro --force` for the extract stage"
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except FileNotFoundError:
        raise UserError(f"{path}: this shard is gone; {mend}") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a whole Arrow file ({error}); {mend}") from None
    found = (table.schema.metadata or {}).get(b"fingerprint", b"").decode()
    if expected is not None and found != expected:
        raise UserError(f"{path}: made by another extraction (fingerprint {found or 'none'}); {mend}")
    return table
