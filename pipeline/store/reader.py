"""Reading features back: memory-mapped shards, joined with the manifest of pictures on the id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.devices import CPU
from pipeline.errors import UserError, reason
from pipeline.runs import Run, remedy
from pipeline.store.dtypes import Columns, unpack
from pipeline.store.schema import dense, views_in
from pipeline.store.shards import Manifest, open_shard

if TYPE_CHECKING:
    import pandas as pd


COUNTED = 1000  # training pictures, whose captions say which words are common: an answer waits for it


def usable_rows(run: Run, data: str) -> pd.DataFrame:
    """The rows of a prepared manifest that are not in quarantine, sorted by id."""
    rows = _manifest(run, data).to_pandas()
    return rows[rows["quarantine"].isna()].sort_values("id", ignore_index=True)


def training_captions(run: Run, data: str, most: int = COUNTED) -> list[list[str]]:
    """The captions of each of at most so many training pictures, evenly spread over those of a manifest.

    Without pandas and pyarrow.compute, for which a first answer would wait.
    """
    table = _manifest(run, data)
    return [table["captions"][row].as_py() for row in evenly(_training_rows(table), most)]


def training_digests(run: Run, data: str) -> set[str]:
    """The SHA-256, in hexadecimal digits, of each training picture's file."""
    table = _manifest(run, data)
    return {table["sha256"][row].as_py() for row in _training_rows(table)}


def _training_rows(table: pa.Table) -> list[int]:
    """In the order of their ids."""
    ids, splits, faults = (table[column].to_pylist() for column in ("id", "split", "quarantine"))
    train = [row for row, split in enumerate(splits) if split == "train" and faults[row] is None]
    return sorted(train, key=ids.__getitem__)


def evenly(positions: list[int], most: int) -> list[int]:
    """At most so many of some positions, evenly spread."""
    count = len(positions)
    return [positions[i * count // most] for i in range(most)] if count > most else positions


def _manifest(run: Run, data: str) -> pa.Table:
    path = run.manifest(data)
    if not path.exists():
        raise UserError(path, "no such manifest", remedy(path))
    try:
        return pq.ParquetFile(path).read()  # not read_table, which imports pandas
    except (OSError, pa.ArrowException) as error:
        raise UserError(path, f"cannot be read ({reason(error)})", remedy(path, force=True)) from None


class ImageTokens:
    """Image tokens [N, D] of one data set: random access, from wherever `stored` reads them.

    `stored` gives some rows as they are kept: tokens [B, N, D] in `dtype` (bfloat16 as uint16), for int8 also scale
    [B, N]. A picture has a row for each of its `views`, the plain one first: position x views + view. `others` names
    those beside the plain one.
    """

    def __init__(
        self, rows: pd.DataFrame, shape: tuple[int, ...], dtype: str, stored: Callable[[list[int]], Columns],
        others: Sequence[str] = (),
    ):  # fmt: skip
        self.rows, self.shape, self.dtype, self.stored = rows, shape, dtype, stored
        self.others, self.views = list(others), 1 + len(others)
        self.ids: list[str] = list(rows["id"])

    @classmethod
    def open(cls, run: Run, data: str) -> ImageTokens:
        """Map the shards that data/<profile>/images/<data>/manifest.json names.

        Raises UserError when a shard is gone or foreign, or a picture has no features.
        """
        manifest = Manifest.read(run.features("images", data))
        tables = [open_shard(manifest.folder / shard.name, manifest.fingerprint) for shard in manifest.shards]
        places = {
            row_id: (number, row)
            for number, table in enumerate(tables)
            for row, row_id in enumerate(table["id"].to_pylist())
        }
        rows = usable_rows(run, data)
        missing = [row_id for row_id in rows["id"] if row_id not in places]
        if missing:
            raise UserError(
                "",
                f"{len(missing)} pictures of {data} have no image tokens, the first is {missing[0]}",
                f"run `dvc repro extract_images@{data}`",
            )
        dtype, others = tables[0].schema.metadata[b"dtype"].decode(), views_in(tables[0].schema)
        columns = [{name: dense(table, name) for name in table.column_names[2:]} for table in tables]
        shards = [{name: _by_view(column, others) for name, column in shard.items()} for shard in columns]
        mapped = Mapped(shards, [places[row_id] for row_id in rows["id"]], 1 + len(others))
        return cls(rows, shards[0]["tokens"].shape[1:], dtype, mapped, others)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitems__(self, positions: list[int]) -> Tensor:
        """`tokens`, as torch's DataLoader asks for a batch; it needs no workers, which would copy each once more."""
        return self.tokens(positions)

    def split(self, name: str) -> list[int]:
        """Positions of the rows of train, val or test."""
        return [int(i) for i in np.flatnonzero(self.rows["split"] == name)]

    def tokens(self, positions: list[int], device: torch.device = CPU, views: Sequence[int] | None = None) -> Tensor:
        """Image tokens of some rows: float32 [B, N, D] on a device.

        Of the plain pictures, or for each of the view that `views` has, [B].
        """
        chosen = [0] * len(positions) if views is None else views
        rows = [self.views * position + view for position, view in zip(positions, chosen, strict=True)]
        return unpack(self.stored(rows), self.dtype, device)


def drawn_views(views: int, count: int) -> list[int] | None:
    """One of so many views for each of `count` pictures, by torch's own state; of one alone None, and nothing drawn."""
    return None if views == 1 else torch.randint(views, (count,)).tolist()


def _by_view(column: np.ndarray[Any, Any], others: Sequence[str]) -> np.ndarray[Any, Any]:
    """A column [R, V, ...] of pictures with several views as [R x V, ...], without a copy."""
    return column.reshape(-1, *column.shape[2:]) if others else column


class Mapped:
    """Rows of shards that are mapped into memory, by shard and row: no copy until a batch is made.

    `places` are those of the pictures, which have `views` rows each.
    """

    def __init__(self, shards: list[Columns], places: list[tuple[int, int]], views: int = 1):
        self._shards, self._places, self._views = shards, places, views

    def __call__(self, rows: list[int]) -> Columns:
        out = {name: np.empty((len(rows), *all_.shape[1:]), all_.dtype) for name, all_ in self._shards[0].items()}
        for target, at in enumerate(rows):
            position, view = divmod(at, self._views)
            shard, row = self._places[position]
            for name, column in self._shards[shard].items():
                out[name][target] = column[self._views * row + view]
        return out


class CaptionTokens:
    """Caption token ids of one data set and the LLM's input embeddings of the tokens that occur."""

    def __init__(self, captions: dict[str, list[list[int]]], token_ids: np.ndarray, table: Tensor):
        self._captions, self.table = captions, table
        self.token_ids = token_ids
        self._row = {int(token): row for row, token in enumerate(token_ids)}

    @classmethod
    def open(cls, run: Run, data: str) -> CaptionTokens:
        """Map the shards and the embedding table that data/<profile>/text/<data>/manifest.json names."""
        manifest = Manifest.read(run.features("text", data))
        if manifest.embeddings is None:
            raise UserError("", f"{run.features('text', data)} names no embedding table", "run `dvc repro`")
        captions: dict[str, list[list[int]]] = {}
        for shard in manifest.shards:
            table = open_shard(manifest.folder / shard.name, manifest.fingerprint)
            captions.update(zip(table["id"].to_pylist(), table["captions"].to_pylist(), strict=True))
        table = open_shard(manifest.folder / manifest.embeddings.name, manifest.fingerprint)
        rows = unpack(
            {"tokens": dense(table, "embedding").copy()}, table.schema.metadata.get(b"dtype", b"float32").decode()
        )
        return cls(captions, table["token_id"].to_numpy(), rows)

    def captions(self, row_id: str) -> list[list[int]]:
        """Token ids of each caption of a picture."""
        return self._captions[row_id]

    def rows_of(self, token_ids: list[int]) -> list[int]:
        """Rows of the embedding table that hold these tokens."""
        return [self._row[token] for token in token_ids]

    def embeddings(self, token_ids: list[int]) -> Tensor:
        """Input embeddings of some tokens: float32 [n, D]."""
        return self.table[self.rows_of(token_ids)]
