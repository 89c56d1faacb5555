"""Reading features back: memory-mapped shards, joined with the manifest of pictures on the id."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.params import Dataset
from pipeline.store.shards import Manifest, open_shard


def usable_rows(base: Path, data: Dataset) -> pd.DataFrame:
    """The rows of a prepared manifest that are not in quarantine, sorted by id."""
    path = base / "prepare" / f"{data}.parquet"
    if not path.exists():
        raise UserError(f"{path}: no such manifest; run `dvc repro prepare@{data}`")
    rows = pq.read_table(path).to_pandas()
    return rows[rows["quarantine"].isna()].sort_values("id", ignore_index=True)


class ImageTokens:
    """Image tokens of one data set: random access to [N, D] samples without a copy until the batch is made."""

    def __init__(self, rows: pd.DataFrame, tokens: list[np.ndarray], places: dict[str, tuple[int, int]]):
        self.rows, self._tokens, self._places = rows, tokens, places
        self.ids: list[str] = list(rows["id"])
        self.shape: tuple[int, int] = tokens[0].shape[1:]

    @classmethod
    def open(cls, base: Path, data: Dataset) -> ImageTokens:
        """Map the shards that data/<profile>/images/<data>/manifest.json names.

        Raises UserError when a shard is gone or foreign, or a picture has no features.
        """
        manifest = Manifest.read(base / "images" / data / "manifest.json")
        tokens, places = [], {}
        for number, shard in enumerate(manifest.shards):
            table = open_shard(manifest.folder / shard.name, manifest.fingerprint)
            for row, row_id in enumerate(table["id"].to_pylist()):
                places[row_id] = (number, row)
            tokens.append(_dense(table))
        rows = usable_rows(base, data)
        missing = [row_id for row_id in rows["id"] if row_id not in places]
        if missing:
            raise UserError(
                f"{len(missing)} pictures of {data} have no image tokens, the first is {missing[0]}; "
                f"run `dvc repro extract_images@{data}`"
            )
        return cls(rows, tokens, places)

    def split(self, name: str) -> list[int]:
        """Positions of the rows of train, val or test."""
        return [int(i) for i in np.flatnonzero(self.rows["split"] == name)]

    def tokens(self, positions: list[int]) -> Tensor:
        """Image tokens of some rows: float32 [B, N, D]."""
        out = np.empty((len(positions), *self.shape), self._tokens[0].dtype)
        for target, position in enumerate(positions):
            shard, row = self._places[self.ids[position]]
            out[target] = self._tokens[shard][row]
        return torch.from_numpy(out).float()


class CaptionTokens:
    """Caption token ids of one data set and the LLM's input embeddings of the tokens that occur."""

    def __init__(self, captions: dict[str, list[list[int]]], token_ids: np.ndarray, table: Tensor):
        self._captions, self.table = captions, table
        self.token_ids = token_ids
        self._row = {int(token): row for row, token in enumerate(token_ids)}

    @classmethod
    def open(cls, base: Path, data: Dataset) -> CaptionTokens:
        """Map the shards and the embedding table that data/<profile>/text/<data>/manifest.json names."""
        manifest = Manifest.read(base / "text" / data / "manifest.json")
        if manifest.embeddings is None:
            raise UserError(f"{base}/text/{data}/manifest.json names no embedding table; run `dvc repro`")
        captions: dict[str, list[list[int]]] = {}
        for shard in manifest.shards:
            table = open_shard(manifest.folder / shard.name, manifest.fingerprint)
            captions.update(zip(table["id"].to_pylist(), table["captions"].to_pylist(), strict=True))
        table = open_shard(manifest.folder / manifest.embeddings.name, manifest.fingerprint)
        return cls(captions, table["token_id"].to_numpy(), torch.from_numpy(_dense(table, "embedding").copy()))

    def captions(self, row_id: str) -> list[list[int]]:
        """Token ids of each caption of a picture."""
        return self._captions[row_id]

    def rows_of(self, token_ids: list[int]) -> list[int]:
        """Rows of the embedding table that hold these tokens."""
        return [self._row[token] for token in token_ids]

    def embeddings(self, token_ids: list[int]) -> Tensor:
        """Input embeddings of some tokens: float32 [n, D]."""
        return self.table[self.rows_of(token_ids)]


def _dense(table: pa.Table, column: str = "tokens") -> np.ndarray:
    """A fixed-shape tensor column as one array [rows, ...]; a shard is one record batch, so no copy is made."""
    chunks = table[column].chunks
    if not chunks:
        return np.empty((0, *table.schema.field(column).type.shape), np.float32)
    arrays = [chunk.to_numpy_ndarray() for chunk in chunks]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
