"""Arrow schemas of the shards, and the names that decide where a row lives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

FORMAT = "terraalign/2"

STORED = {"float16": pa.float16(), "float32": pa.float32(), "bfloat16": pa.uint16(), "int8": pa.int8()}
"""Arrow type of the numbers for each cache.dtype. Arrow has no bfloat16: its bits are kept in uint16."""


def fingerprint(**parts: object) -> str:
    """Hash of everything that decides the bytes of a feature: backbone, preprocessing, dtype, version."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def shard_of(row_id: str, shards: int) -> int:
    """The shard of a row: hash(id) mod n, so that an insertion does not move its neighbours."""
    return int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], "big") % shards


def shard_key(rows: Iterable[tuple[str, str]]) -> str:
    """Name of a shard: hash of its sorted (id, content SHA-256) pairs."""
    text = json.dumps(sorted(rows))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def image_schema(shape: tuple[int, ...], dtype: str, print_: str, views: Sequence[str] = ()) -> pa.Schema:
    """id, sha256 of the picture, and its image tokens as a fixed-shape tensor [N, D]; for int8 also scale [N].

    With `views` beside the plain one, which the metadata name, [V, N, D] and [V, N], the plain one first.
    """
    tokens = pa.fixed_shape_tensor(STORED[dtype], shape)
    fields = [("id", pa.string()), ("sha256", pa.string()), ("tokens", tokens)]
    if dtype == "int8":
        fields.append(("scale", pa.fixed_shape_tensor(pa.float32(), shape[:-1])))
    said = {"dtype": dtype} | ({"views": " ".join(views)} if views else {})
    return pa.schema(fields, metadata={**_metadata("images", print_), **said})


def caption_schema(print_: str) -> pa.Schema:
    """id and the token ids of each of its captions."""
    captions = pa.list_(pa.list_(pa.int32()))
    return pa.schema([("id", pa.string()), ("captions", captions)], metadata=_metadata("captions", print_))


def embedding_schema(width: int, dtype: str, print_: str) -> pa.Schema:
    """token_id and its row of the LLM's input-embedding matrix [D]; the metadata say if it is bfloat16, not float32."""
    fields = [("token_id", pa.int32()), ("embedding", pa.fixed_shape_tensor(STORED[dtype], (width,)))]
    said = {} if dtype == "float32" else {"dtype": dtype}
    return pa.schema(fields, metadata={**_metadata("embeddings", print_), **said})


def views_in(found: pa.Schema) -> list[str]:
    """The views beside the plain one that a shard of images holds."""
    return (found.metadata or {}).get(b"views", b"").decode(errors="replace").split()


def _metadata(kind: str, fingerprint: str) -> dict[str, str]:
    return {"format": FORMAT, "kind": kind, "fingerprint": fingerprint}


def fault(found: pa.Schema, expected: str | None) -> str | None:
    """What keeps a file from being a shard of the fingerprint `expected` (None: of any), or None."""
    metadata = {
        key.decode(errors="replace"): value.decode(errors="replace") for key, value in (found.metadata or {}).items()
    }
    print_, kind = metadata.get("fingerprint", "none"), metadata.get("kind")
    if expected is not None and print_ != expected:
        return f"made by another extraction (fingerprint {print_})"
    if metadata.get("format") != FORMAT:
        return f"in the format {metadata.get('format', 'of another program')}, this version reads {FORMAT}"
    try:
        if kind == "images":
            shape, views = tuple(found.field("tokens").type.shape), views_in(found)
            whole = len(shape) == 2 if not views else len(shape) == 3 and shape[0] == 1 + len(views)
            ours = image_schema(shape, metadata["dtype"], print_, views) if whole else None
        elif kind == "embeddings":
            ours = embedding_schema(found.field("embedding").type.shape[0], metadata.get("dtype", "float32"), print_)
        else:
            ours = caption_schema(print_)
    except (KeyError, AttributeError, TypeError, IndexError):
        ours = None
    return None if ours is not None and found.equals(ours, check_metadata=True) else "of another schema"


def tensor_column(rows: Any, field: pa.Field) -> pa.Array:
    """A contiguous numpy array [R, ...] as a fixed-shape tensor column of R rows, without a copy."""
    # Not pa.array(): it copies float16 number by number.
    numbers = pa.Array.from_buffers(field.type.value_type, rows.size, [None, pa.py_buffer(rows)])
    return pa.ExtensionArray.from_storage(field.type, pa.FixedSizeListArray.from_arrays(numbers, rows[0].size))


def dense(table: pa.Table, column: str) -> Any:
    """A fixed-shape tensor column as one numpy array [rows, ...]; a shard is one record batch, so without a copy."""
    [chunk] = table[column].chunks
    return chunk.to_numpy_ndarray()
