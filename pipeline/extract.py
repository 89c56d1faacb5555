"""Extraction: run a frozen model over a data set once and keep what it gives, shard by shard."""

from __future__ import annotations

import hashlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from pipeline.backbones.devices import hash_weights
from pipeline.backbones.vision import VisionEncoder
from pipeline.errors import UserError
from pipeline.params import Dataset, Params
from pipeline.pictures import decode, read
from pipeline.store import schema
from pipeline.store.donors import Donors
from pipeline.store.dtypes import Columns, DoesNotFit, pack
from pipeline.store.reader import usable_rows
from pipeline.store.shards import STORE, Manifest, Shard, open_shard, recorded, write_record, write_shard

EXTRACTOR_VERSION = 2  # since 2: transparency over white, 16-bit grey scaled
"""Raise it when a change here changes the bytes; a golden test notices when that was forgotten."""

Advance = Callable[[int], None]


class Clock:
    """Seconds by kind of work. Threads add up: reading and decoding may take more of them than passed on the wall."""

    def __init__(self) -> None:
        self._spent: list[tuple[str, float]] = []

    @contextmanager
    def __call__(self, work: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._spent.append((work, time.perf_counter() - began))

    def seconds(self) -> dict[str, float]:
        works = dict.fromkeys(work for work, _ in self._spent)
        return {work: round(sum(seconds for name, seconds in self._spent if name == work), 4) for work in works}


def extract_images(
    params: Params, data: Dataset, encoder: VisionEncoder, advance: Advance, repair: Manifest | None = None
) -> Manifest:
    """Image tokens of all usable pictures of a data set, in the store.

    Shards that are there are kept, so an interrupted run loses at most the shard in work; of a shard that has to be
    made, rows of pictures that other shards hold are copied. The bytes are those of an extraction from nothing.
    `repair`: make only what this manifest names. Raises UserError when a picture changed since `prepare`, its tokens
    do not fit cache.dtype, or the parameters and pictures are not those of `repair`.
    """
    print_ = schema.fingerprint(
        **encoder.identity, stored=params.cache.dtype, batch=params.vision.batch, version=EXTRACTOR_VERSION
    )
    work = _ImageShards(params, encoder, print_, advance)
    return Manifest("images", print_, _build_missing("images", print_, params, data, work.build, advance, repair))


class _ImageShards:
    """Makes single shards of image tokens."""

    def __init__(self, params: Params, encoder: VisionEncoder, print_: str, advance: Advance):
        self.params, self.encoder, self.print_, self.advance = params, encoder, print_, advance
        self.size = params.vision.batch
        self.donors = Donors(STORE / "images" / print_)

    def build(self, path: Path, rows: pd.DataFrame) -> Shard:
        """The shard of some rows: copied from other shards where their picture is there, else encoded."""
        clock, columns, fresh = Clock(), {}, []

        def put(at: list[int], values: Columns) -> None:
            for name, value in values.items():
                if name not in columns:
                    columns[name] = np.empty((len(rows), *value.shape[1:]), value.dtype)
                columns[name][at] = value
            self.advance(len(at))

        with clock("all"):
            with clock("copy"):
                for row, sha256 in enumerate(rows["sha256"]):
                    found = self.donors.find(sha256)
                    if found is not None and self._rows_stand_alone:
                        put([row], found)
                    else:
                        fresh.append(row)
            for at, values in self._encode(rows, fresh, clock):
                put(at, values)
            arrow = schema.image_schema(columns["tokens"].shape[1:], self.params.cache.dtype, self.print_)
            tensors = [schema.tensor_column(columns[name], arrow.field(name)) for name in arrow.names[2:]]
            with clock("write"):
                shard = write_shard(path, pa.table([pa.array(rows["id"]), pa.array(rows["sha256"]), *tensors], arrow))
        write_record(path, shard, encoded=len(fresh), copied=len(rows) - len(fresh), seconds=clock.seconds())
        return shard

    @cached_property
    def _rows_stand_alone(self) -> bool:
        """Whether a picture has the same bits in every place of a batch, whatever else is in it.

        Some encoders fail this at some batch sizes (CoCa at 5 on two threads). Then no row is copied: in an extraction
        from nothing it would stand in another place.
        """
        picture = self.encoder.preprocess(Image.radial_gradient("L").convert("RGB"))
        everywhere = self.encoder.encode(torch.stack([picture] * self.size))
        alone = self.encoder.encode(_padded([picture], self.size))
        same = all(torch.equal(alone[0], tokens) for tokens in everywhere)
        if not same:
            print("tokens depend on the place in the batch: shards are made whole, no row is copied", file=sys.stderr)
        return same

    def _encode(self, rows: pd.DataFrame, fresh: list[int], clock: Clock) -> Iterator[tuple[list[int], Columns]]:
        """Positions of some rows and their columns, batch by batch.

        Every batch has the same shape: a batch of another size would give other bits.
        """
        dtype = self.params.cache.dtype
        for at, pixels in self._batches(rows, fresh, clock):
            with clock("encode"):
                tokens = self.encoder.encode(pixels)[: len(at)]
            try:
                columns = pack(tokens, dtype)
            except DoesNotFit as fault:
                mend = "set cache.dtype: float32" if tokens.isfinite().all() else "the encoder gives no finite numbers"
                raise UserError(f"{rows['image'][at[fault.row]]}: tokens do not fit {dtype}; {mend}") from None
            yield at, columns

    def _batches(self, rows: pd.DataFrame, fresh: list[int], clock: Clock) -> Iterator[tuple[list[int], Tensor]]:
        """Padded batches [size, 3, H, W] in order; at most four batches are decoded ahead."""

        def load(row: int) -> Tensor:
            with clock("read"):
                content = _read_picture(rows["image"][row], rows["sha256"][row])
            with clock("decode"):
                return self.encoder.preprocess(_decoded(content, rows["image"][row]))

        def stacked(at: list[int], futures: list[Any]) -> tuple[list[int], Tensor]:
            return at, _padded([future.result() for future in futures], self.size)

        with ThreadPoolExecutor(self.params.runtime.decode_threads) as pool:
            ahead: deque[tuple[list[int], list[Any]]] = deque()
            for start in range(0, len(fresh), self.size):
                at = fresh[start : start + self.size]
                ahead.append((at, [pool.submit(load, row) for row in at]))
                if len(ahead) > 4:
                    yield stacked(*ahead.popleft())
            while ahead:
                yield stacked(*ahead.popleft())


def _padded(pictures: list[Tensor], size: int) -> Tensor:
    return torch.stack([*pictures, *[torch.zeros_like(pictures[0])] * (size - len(pictures))])


def _read_picture(name: str, sha256: str) -> bytes:
    """A picture file that still has the content `prepare` saw."""
    try:
        content = read(name)
    except OSError as error:
        raise UserError(
            f"{name}: cannot be read ({error.strerror}); run `dvc repro --force` for the prepare stage"
        ) from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{name}: changed since it was prepared; run `dvc repro --force` for the prepare stage")
    return content


def _decoded(content: bytes, name: str) -> Image.Image:
    try:
        return decode(content)
    except ValueError as error:
        raise UserError(f"{name}: {error}; run `dvc repro --force` for the prepare stage") from None


def extract_captions(
    params: Params,
    data: Dataset,
    tokenizer: Any,
    embedding: torch.nn.Module,
    advance: Advance,
    repair: Manifest | None = None,
) -> Manifest:
    """Token ids of all captions, and the input embeddings of the tokens that occur, in the store.

    Token ids carry no BOS and no special tokens. Embeddings come from calling the LLM's embedding module. A shard whose
    captions changed is tokenised anew as a whole: that is cheap. `repair` as for extract_images.
    """
    vocabulary = hashlib.sha256(str(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    print_ = schema.fingerprint(embedding=hash_weights(embedding), vocabulary=vocabulary, version=EXTRACTOR_VERSION)

    def tokenise(rows: pd.DataFrame) -> list[list[list[int]]]:
        return [tokenizer(list(texts), add_special_tokens=False)["input_ids"] for texts in rows["captions"]]

    def build(path: Path, rows: pd.DataFrame) -> Shard:
        arrow, clock = schema.caption_schema(print_), Clock()
        with clock("all"):
            with clock("encode"):
                captions = tokenise(rows)
            with clock("write"):
                shard = write_shard(path, pa.table([pa.array(rows["id"]), pa.array(captions)], schema=arrow))
        write_record(path, shard, encoded=len(rows), copied=0, seconds=clock.seconds())
        advance(len(rows))
        return shard

    shards = _build_missing("text", print_, params, data, build, advance, repair)
    manifest = Manifest("text", print_, shards)
    return Manifest("text", print_, shards, _embedding_table(manifest, embedding))


def _embedding_table(manifest: Manifest, embedding: torch.nn.Module) -> Shard:
    """The rows of the input-embedding matrix that the shards of a manifest use."""
    tables = [open_shard(manifest.folder / shard.name)["captions"].combine_chunks() for shard in manifest.shards]
    token_ids = np.unique(np.concatenate([table.flatten().flatten().to_numpy() for table in tables])).tolist()
    path = manifest.folder / f"{schema.shard_key([('tokens', str(token_ids))])}.embeddings.arrow"
    kept = recorded(path) if path.exists() else None
    if kept is not None:
        return kept
    with torch.inference_mode():
        rows = embedding(torch.tensor(token_ids)).float().numpy()
    arrow = schema.embedding_schema(rows.shape[1], manifest.fingerprint)
    columns = [pa.array(token_ids, pa.int32()), schema.tensor_column(rows, arrow.field("embedding"))]
    shard = write_shard(path, pa.table(columns, schema=arrow))
    write_record(path, shard)
    return shard


def _build_missing(
    kind: str,
    print_: str,
    params: Params,
    data: Dataset,
    build: Callable[[Path, pd.DataFrame], Shard],
    advance: Advance,
    repair: Manifest | None,
) -> list[Shard]:
    """Build each shard that is not in the store yet."""
    rows = usable_rows(Path("data") / params.profile, data)
    if rows.empty:
        raise UserError(f"{data}: no usable picture; see the quarantine column of the prepared manifest")
    numbers = rows["id"].map(lambda row_id: schema.shard_of(row_id, params.cache.shards))
    parts = {}
    for _, part in rows.groupby(numbers, sort=True):
        part = part.reset_index(drop=True)
        digests = part["sha256"] if kind == "images" else [_text_hash(texts) for texts in part["captions"]]
        parts[STORE / kind / print_ / f"{schema.shard_key(zip(part['id'], digests, strict=True))}.arrow"] = part
    wanted = (print_, [path.name for path in parts])
    if repair is not None and wanted != (repair.fingerprint, [shard.name for shard in repair.shards]):
        raise UserError(f"{kind} of {data}: its manifest is of other parameters or pictures; run `dvc repro`")
    shards = []
    for path, part in parts.items():
        shard = recorded(path) if path.exists() else None
        if shard is None:
            shard = build(path, part)
        else:
            advance(len(part))
        shards.append(shard)
    return shards


def _text_hash(texts: Any) -> str:
    return hashlib.sha256(str(list(texts)).encode()).hexdigest()
