"""Copies of shards elsewhere: a folder, S3, or whatever else fsspec reaches, in the store's own layout."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import fsspec

from pipeline.errors import UserError
from pipeline.files import atomically, foreign_faults, temporary_name
from pipeline.runs import STORE
from pipeline.store.inventory import Use
from pipeline.store.shards import Shard, in_use, sha256_of, write_record

Advance = Callable[[int], None]
BLOCK = 16 << 20  # bytes


def push(uses: list[Use], url: str, advance: Advance) -> int:
    """Copy what some manifests name to `url`, if it is not there with the right size; gives the files copied.

    Files get their name there when they are whole. Raises UserError when a shard here is not the manifest's, or the
    other side fails.
    """
    there, root = _connect(url)
    copied = 0
    for path, shard in files(uses).items():
        local, target = STORE / path, f"{root}/{path}"
        with _faults_of(url):
            if not there.exists(target) or there.size(target) != shard.bytes:
                if not local.exists() or sha256_of(local) != shard.sha256:
                    raise UserError(local, "not what its manifest names", "run `terraalign store verify --repair`")
                folder, _, name = target.rpartition("/")
                there.makedirs(folder, exist_ok=True)
                temporary = f"{folder}/{temporary_name(name)}"
                there.put_file(str(local), temporary)
                there.mv(temporary, target)
                copied += 1
        advance(shard.bytes)
    return copied


def pull(uses: list[Use], url: str, advance: Advance) -> int:
    """Fetch what some manifests name and the store lacks; gives the files fetched.

    A file gets its name when its SHA-256 is the manifest's; one that is damaged here is replaced. Raises UserError when
    a file is missing there or not what the manifest says.
    """
    there, root = _connect(url)
    fetched = 0
    with in_use():
        for path, shard in files(uses).items():
            local = STORE / path
            if not local.exists() or sha256_of(local) != shard.sha256:
                with _faults_of(url):
                    _fetch(there, f"{root}/{path}", local, shard)
                write_record(local, shard)
                fetched += 1
            advance(shard.bytes)
    return fetched


def _fetch(there: Any, source: str, local: Path, shard: Shard) -> None:
    digest = hashlib.sha256()
    with atomically(local) as file:
        with there.open(source, "rb", block_size=BLOCK) as remote:
            while block := remote.read(BLOCK):
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != shard.sha256:
            raise UserError(source, "not what the manifest names (SHA-256)", "delete it there and push it again")
        os.fchmod(file.fileno(), 0o444)


def _faults_of(url: str) -> AbstractContextManager[None]:
    """Credentials, network: as one line; a full disk passes."""
    return foreign_faults(
        lambda reason: UserError(url, reason, "run the same command again to go on"),
        lambda text: UserError(url, f"not there: {text}", "push it first, from where it was extracted"),
    )


def _connect(url: str) -> tuple[Any, str]:
    def fault(reason: str) -> UserError:
        hint = "; for s3:// install terraalign[s3]" if reason.startswith("ImportError") else ""
        return UserError(url, f"{reason}{hint}")

    with foreign_faults(fault):
        there, root = fsspec.core.url_to_fs(url)
        return there, root.rstrip("/")


def files(uses: list[Use]) -> dict[str, Shard]:
    """What some manifests name, by its place below the store."""
    return {
        f"{use.manifest.kind}/{use.manifest.fingerprint}/{shard.name}": shard
        for use in uses
        for shard in use.manifest.files
    }
