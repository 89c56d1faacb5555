"""The header of a GGUF file (ggml's docs/gguf.md): whether it is whole, and whether all tensors lie in the file."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.files import Damaged, refuse_pointer

VERSIONS = (2, 3)
# Bytes of the metadata's values by type; 8 is a string, 9 an array.
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def check_header(path: Path) -> None:
    """Raises Damaged when a GGUF file is not one, not whole, or one of several parts."""
    refuse_pointer(path)
    with path.open("rb") as file:
        _check(file, path)


def _check(file: BinaryIO, path: Path) -> None:
    if file.read(4) != b"GGUF":
        raise Damaged(f"{path.name}: not a GGUF file")
    try:
        version, tensors, values = struct.unpack("<IQQ", file.read(20))
        if version not in VERSIONS:
            raise Damaged(f"{path.name}: GGUF version {version}, not one of {VERSIONS}")
        metadata = dict(_value(file) for _ in range(values))
        ends = [_tensor_end(file) for _ in range(tensors)]
    except (struct.error, KeyError, UnicodeDecodeError):  # the file ends in its header
        raise Damaged(f"{path.name}: cut off, or damaged, in its header") from None
    if metadata.get("split.count", 1) > 1:
        raise Damaged(f"{path.name}: one of {metadata['split.count']} parts; join them with `llama-gguf-split --merge`")
    alignment = metadata.get("general.alignment", 32)
    expected = -(-file.tell() // alignment) * alignment + max(ends, default=0)
    size = path.stat().st_size
    if size < expected:
        raise Damaged(f"{path.name}: cut off, {size:,} of {expected:,} bytes")


def _text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > 1 << 30:
        raise KeyError(length)
    return file.read(length).decode("utf-8", "replace")


def _value(file: BinaryIO) -> tuple[str, Any]:
    """A key of the metadata, and its value if it is a whole number."""
    key = _text(file)
    (kind,) = struct.unpack("<I", file.read(4))
    return key, _content(file, kind)


def _content(file: BinaryIO, kind: int) -> Any:
    if kind == 8:
        return _text(file)
    if kind != 9:
        content = file.read(WIDTHS[kind])
        return int.from_bytes(content, "little")
    inner, count = struct.unpack("<IQ", file.read(12))
    if inner in WIDTHS:
        file.seek(WIDTHS[inner] * count, 1)
    else:
        for _ in range(count):
            _content(file, inner)
    return None


def _tensor_end(file: BinaryIO) -> int:
    """Where a tensor's numbers end, in bytes after the header."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    _text(file)
    (dimensions,) = struct.unpack("<I", file.read(4))
    shape = struct.unpack(f"<{dimensions}Q", file.read(8 * min(dimensions, 8)))
    kind, offset = struct.unpack("<IQ", file.read(12))
    try:
        numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except ValueError:
        raise KeyError(kind) from None
    return int(offset) + math.prod(shape) // numbers * size
