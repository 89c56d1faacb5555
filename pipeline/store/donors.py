"""Rows that are in the store already, under whatever shard: what did not change is copied, not computed."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.store.dtypes import Columns
from pipeline.store.schema import dense
from pipeline.store.shards import open_shard, read_record, sha256_of


class Donors:
    """The image shards of one fingerprint, searched by the SHA-256 of a picture; opened at the first question.

    A shard gives rows only while its bytes are those that were written: a copy would hide damage behind a new hash.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._intact: dict[Path, bool] = {}

    @cached_property
    def _places(self) -> dict[str, tuple[Path, pa.Table, int]]:
        places = {}
        for path in sorted(self.folder.glob("*.arrow")):
            try:
                table = open_shard(path, self.folder.name)
            except UserError:
                continue  # damaged or foreign: `store verify` names it
            for row, sha256 in enumerate(table["sha256"].to_pylist()):
                places[sha256] = (path, table, row)
        return places

    def find(self, sha256: str) -> Columns | None:
        """The columns of a picture's row, [1, ...] each, mapped from disk; None when no intact shard has it."""
        if sha256 not in self._places:
            return None
        path, table, row = self._places[sha256]
        if path not in self._intact:
            record = read_record(path)
            self._intact[path] = record is not None and record[0].sha256 == sha256_of(path)
        if not self._intact[path]:
            return None
        return {name: dense(table, name)[row : row + 1] for name in table.column_names[2:]}
