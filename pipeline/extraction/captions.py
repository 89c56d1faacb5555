"""Captions as token ids, and the LLM's input embeddings of the tokens that occur, kept in the store."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline import versions
from pipeline.config import Params
from pipeline.devices import hash_weights
from pipeline.extraction.work import Advance, Clock, build_missing, check_repair, parts_of, usable
from pipeline.llms.text import Texts
from pipeline.store import schema
from pipeline.store.dtypes import pack
from pipeline.store.shards import (
    Manifest,
    Shard,
    open_shard,
    recorded,
    write_record,
    write_shard,
)


def extract_captions(
    params: Params,
    data: str,
    tokenizer: Any,
    embedding: torch.nn.Module,
    advance: Advance,
    repair: Manifest | None = None,
    context: int | None = None,
) -> Manifest:
    """Token ids of all captions, and the input embeddings of the tokens that occur, in the store.

    Token ids carry no BOS and no special tokens; captions longer than llm.max_caption_tokens, or than the LLM's
    `context`, are cut, counted and the first of them named. Embeddings come from calling the LLM's embedding module. A
    shard whose captions changed is tokenised anew as a whole: that is cheap. `repair` as for extract_images.
    """
    vocabulary = hashlib.sha256(str(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    print_ = schema.fingerprint(embedding=hash_weights(embedding), vocabulary=vocabulary, version=versions.TEXT)
    words = Captions(tokenizer, min(params.llm.max_caption_tokens, context or sys.maxsize))

    def build(path: Path, advance: Advance) -> Shard:
        rows, arrow, clock = parts[path], schema.caption_schema(print_), Clock()
        with clock("all"):
            with clock("encode"):
                captions = [words.ids(list(texts)) for texts in rows["captions"]]
            with clock("write"):
                shard = write_shard(path, pa.table([pa.array(rows["id"]), pa.array(captions)], schema=arrow))
        write_record(path, shard, encoded=len(rows), copied=0, seconds=clock.seconds())
        advance(len(rows))
        return shard

    rows = usable(params, data)
    digests = [words.digest(row_id, list(texts)) for row_id, texts in zip(rows["id"], rows["captions"], strict=True)]
    parts = parts_of("text", print_, params, rows, digests)
    words.warn()
    check_repair("text", data, print_, parts, repair)
    shards = build_missing(parts, lambda paths, advance: {path: build(path, advance) for path in paths}, advance)
    manifest = Manifest("text", print_, shards)
    return Manifest("text", print_, shards, _embedding_table(manifest, embedding))


class Captions:
    """Captions as token ids, at most `limit` each, and the digests that name their shards."""

    def __init__(self, tokenizer: Any, limit: int):
        self._texts, self._tokenizer, self._limit = Texts(tokenizer), tokenizer, limit
        self._cut: list[str] = []

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of the captions of a picture."""
        return [ids[: self._limit] for ids in self._texts.ids(texts)]

    def digest(self, row_id: str, texts: list[str]) -> str:
        """Hash of a picture's captions; of their token ids as well where these are not simply the tokenizer's own.

        So the store keeps its names for all others. Only captions that look long or hold what may be a special token
        are tokenised for it: a byte gives a token at most, unless a normaliser expands it.
        """
        odd = [t for t in texts if 2 * len(t.encode()) >= self._limit or self._texts.may_hold_control(t)]
        if not odd:
            return text_hash(texts)
        whole, ours = self._texts.ids(odd), self.ids(odd)
        if whole != ours:
            self._cut.append(row_id)
        simple = self._tokenizer(odd, add_special_tokens=False)["input_ids"]
        return text_hash(texts) if simple == ours else text_hash([*texts, str(ours)])

    def warn(self) -> None:
        """Say on stderr which pictures' captions are cut."""
        if self._cut:
            names, more = ", ".join(self._cut[:3]), ", ..." if len(self._cut) > 3 else ""
            why = f"cut to {self._limit} tokens (llm.max_caption_tokens, or the LLM's context)"
            print(f"captions of {len(self._cut)} pictures are {why}: {names}{more}", file=sys.stderr)


def _embedding_table(manifest: Manifest, embedding: torch.nn.Module) -> Shard:
    """The rows of the input-embedding matrix that the shards of a manifest use.

    In bfloat16 if that changes no number, as with models that are published in it, else in float32.
    """
    tables = [open_shard(manifest.folder / shard.name)["captions"].combine_chunks() for shard in manifest.shards]
    token_ids = np.unique(np.concatenate([table.flatten().flatten().to_numpy() for table in tables])).tolist()
    with torch.inference_mode():
        rows = embedding(torch.tensor(token_ids)).float()
    dtype = "bfloat16" if torch.equal(rows.bfloat16().float(), rows) else "float32"
    held = [("tokens", str(token_ids)), *([] if dtype == "float32" else [("dtype", dtype)])]
    path = manifest.folder / f"{schema.shard_key(held)}.embeddings.arrow"
    kept = recorded(path) if path.exists() else None
    if kept is not None:
        return kept
    arrow = schema.embedding_schema(rows.shape[1], dtype, manifest.fingerprint)
    numbers = pack(rows, dtype)["tokens"]
    columns = [pa.array(token_ids, pa.int32()), schema.tensor_column(numbers, arrow.field("embedding"))]
    shard = write_shard(path, pa.table(columns, schema=arrow))
    write_record(path, shard)
    return shard


def text_hash(texts: Any) -> str:
    return hashlib.sha256(str(list(texts)).encode()).hexdigest()
