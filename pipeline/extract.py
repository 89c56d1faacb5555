"""Extraction: run a frozen model over a data set once and keep what it gives, shard by shard."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.backbones.devices import hash_weights
from pipeline.backbones.vision import VisionEncoder
from pipeline.errors import UserError
from pipeline.params import Dataset, Params
from pipeline.pictures import decode, read
from pipeline.store import schema
from pipeline.store.reader import usable_rows
from pipeline.store.shards import STORE, Manifest, Shard, describe, open_shard, write_shard

EXTRACTOR_VERSION = 2  # since 2: transparency over white, 16-bit grey scaled
"""Raise it when a change here changes the bytes; a golden test notices when that was forgotten."""

Advance = Callable[[int], None]


def extract_images(params: Params, data: Dataset, encoder: VisionEncoder, advance: Advance) -> Manifest:
    """Image tokens of all usable pictures of a data set, in the store.

    Shards that are there already are kept, so an interrupted run loses at most the shard in work.
    Raises UserError when a picture changed since `prepare`, or its tokens are not finite.
    """
    print_ = schema.fingerprint(
        **encoder.identity, stored=params.cache.dtype, batch=params.vision.batch, version=EXTRACTOR_VERSION
    )

    def build(path: Path, rows: pd.DataFrame) -> Shard:
        tokens = _encode(rows, encoder, params, advance)
        arrow = schema.image_schema(tokens.shape[1:], params.cache.dtype, print_)
        columns = [pa.array(rows["id"]), pa.array(rows["sha256"]), schema.tensor_column(tokens, arrow.field("tokens"))]
        return write_shard(path, pa.table(columns, schema=arrow))

    return Manifest("images", print_, _build_missing("images", print_, params, data, ["sha256"], build, advance))


def extract_captions(
    params: Params, data: Dataset, tokenizer: Any, embedding: torch.nn.Module, advance: Advance
) -> Manifest:
    """Token ids of all captions, and the input embeddings of the tokens that occur, in the store.

    Token ids carry no BOS and no special tokens. Embeddings come from calling the LLM's embedding module.
    """
    vocabulary = hashlib.sha256(str(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    print_ = schema.fingerprint(embedding=hash_weights(embedding), vocabulary=vocabulary, version=EXTRACTOR_VERSION)

    def tokenise(rows: pd.DataFrame) -> list[list[list[int]]]:
        return [tokenizer(list(texts), add_special_tokens=False)["input_ids"] for texts in rows["captions"]]

    def build(path: Path, rows: pd.DataFrame) -> Shard:
        arrow = schema.caption_schema(print_)
        shard = write_shard(path, pa.table([pa.array(rows["id"]), pa.array(tokenise(rows))], schema=arrow))
        advance(len(rows))
        return shard

    shards = _build_missing("text", print_, params, data, ["captions"], build, advance)
    manifest = Manifest("text", print_, shards)
    return Manifest("text", print_, shards, _embedding_table(manifest, embedding))


def _embedding_table(manifest: Manifest, embedding: torch.nn.Module) -> Shard:
    """The rows of the input-embedding matrix that the shards of a manifest use."""
    captions = chain.from_iterable(
        open_shard(manifest.folder / shard.name)["captions"].to_pylist() for shard in manifest.shards
    )
    token_ids = sorted({token for texts in captions for text in texts for token in text})
    path = manifest.folder / f"{schema.shard_key([('tokens', str(token_ids))])}.embeddings.arrow"
    if path.exists():
        return describe(path)
    with torch.inference_mode():
        rows = embedding(torch.tensor(token_ids)).float().numpy()
    arrow = schema.embedding_schema(rows.shape[1], manifest.fingerprint)
    columns = [pa.array(token_ids, pa.int32()), schema.tensor_column(rows, arrow.field("embedding"))]
    return write_shard(path, pa.table(columns, schema=arrow))


def _build_missing(
    kind: str,
    print_: str,
    params: Params,
    data: Dataset,
    content: list[str],
    build: Callable[[Path, pd.DataFrame], Shard],
    advance: Advance,
) -> list[Shard]:
    """Build each shard that is not in the store yet; `content` names the columns that its key depends on."""
    rows = usable_rows(Path("data") / params.profile, data)
    if rows.empty:
        raise UserError(f"{data}: no usable picture; see the quarantine column of the prepared manifest")
    shard_numbers = rows["id"].map(lambda row_id: schema.shard_of(row_id, params.cache.shards))
    shards = []
    for _, part in rows.groupby(shard_numbers, sort=True):
        part = part.reset_index(drop=True)
        digests = [str(list(map(_plain, values))) for values in zip(*(part[name] for name in content), strict=True)]
        path = STORE / kind / print_ / f"{schema.shard_key(zip(part['id'], digests, strict=True))}.arrow"
        if path.exists():
            shards.append(describe(path))
            advance(len(part))
        else:
            shards.append(build(path, part))
    return shards


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _encode(rows: pd.DataFrame, encoder: VisionEncoder, params: Params, advance: Advance) -> np.ndarray:
    """Image tokens of some rows, [R, N, D] in the stored dtype.

    Every batch has the same shape: a batch of another size would give other bits.
    """
    size = params.vision.batch
    done: list[np.ndarray] = []
    for start, pixels in _batches(rows, encoder, size, params.runtime.decode_threads):
        real = min(size, len(rows) - start)
        tokens = encoder.encode(pixels)[:real].numpy().astype(params.cache.dtype)
        for offset in np.flatnonzero(~np.isfinite(tokens).all(axis=(1, 2))):
            raise UserError(
                f"{rows['image'][start + offset]}: tokens do not fit {params.cache.dtype}; set cache.dtype: float32"
            )
        done.append(tokens)
        advance(real)
    return np.concatenate(done)


def _batches(rows: pd.DataFrame, encoder: VisionEncoder, size: int, threads: int) -> Iterator[tuple[int, Tensor]]:
    """Padded batches [size, 3, H, W] in order; at most four batches are decoded ahead."""

    def load(row: int) -> Tensor:
        return encoder.preprocess(_read_picture(rows["image"][row], rows["sha256"][row]))

    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[tuple[int, list[Any]]] = deque()
        for start in range(0, len(rows), size):
            ahead.append((start, [pool.submit(load, row) for row in range(start, min(start + size, len(rows)))]))
            if len(ahead) > 4:
                yield _stack(*ahead.popleft(), size)
        while ahead:
            yield _stack(*ahead.popleft(), size)


def _stack(start: int, futures: list[Any], size: int) -> tuple[int, Tensor]:
    pictures = [future.result() for future in futures]
    padding = [torch.zeros_like(pictures[0])] * (size - len(pictures))
    return start, torch.stack([*pictures, *padding])


def _read_picture(name: str, sha256: str) -> Any:
    """A picture that still has the content `prepare` saw."""
    try:
        content = read(name)
    except OSError as error:
        raise UserError(
            f"{name}: cannot be read ({error.strerror}); run `dvc repro --force` for the prepare stage"
        ) from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{name}: changed since it was prepared; run `dvc repro --force` for the prepare stage")
    try:
        return decode(content)
    except ValueError as error:
        raise UserError(f"{name}: {error}; run `dvc repro --force` for the prepare stage") from None
