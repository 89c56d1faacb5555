"""Features as WebDataset tars, which https://github.com/webdataset/webdataset reads as they are, for use elsewhere.

A folder of tars `<split>-000000.tar` with the members `<key>.tokens.npy`, float16 [N, D], and `<key>.captions.json`,
a list of token-id lists; beside them `token_ids.npy`, int32 [V], sorted, and `embeddings.npy`, float32 [V, D]: their
rows of the LLM's input embeddings. docs/webdataset.md shows how to read them.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import numpy as np

from pipeline.errors import UserError
from pipeline.store.reader import CaptionTokens, ImageTokens
from pipeline.store.schema import shard_of


def export(
    images: ImageTokens, captions: CaptionTokens, destination: Path, per_shard: int, advance: Callable[[int], None]
) -> list[Path]:
    """Write the features of one data set to a new folder and return its tars, at most `per_shard` pictures in each.

    Within a split the order is that of the ids' hashes, so neighbours are not of one class. The same features give the
    same bytes. Raises UserError when the folder is not empty, a picture has no caption tokens, or its tokens do not
    fit float16; then, and when interrupted, no folder is left.
    """
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise UserError(f"{destination}: there already; name a new folder, or delete this one first")
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        order = np.argsort(captions.token_ids)
        np.save(temporary / "token_ids.npy", captions.token_ids[order].astype(np.int32), allow_pickle=False)
        np.save(temporary / "embeddings.npy", captions.table.numpy()[order], allow_pickle=False)
        names = [
            name
            for split in ("train", "val", "test")
            for name in _write_split(images, captions, temporary, split, per_shard, advance)
        ]
        temporary.chmod(0o755)  # mkdtemp makes it private
        temporary.rename(destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [destination / name for name in names]


def key_of(row_id: str) -> str:
    """The id as a WebDataset key, which must have no dot in its last part; urllib.parse.unquote gives the id back."""
    key = quote(row_id, safe="/ ").replace(".", "%2E")
    return "%2F" + key[1:] if key.startswith("/") else key


def _write_split(
    images: ImageTokens,
    captions: CaptionTokens,
    folder: Path,
    split: str,
    per_shard: int,
    advance: Callable[[int], None],
) -> list[str]:
    positions = sorted(images.split(split), key=lambda position: shard_of(images.ids[position], 2**64))
    names = []
    for number, start in enumerate(range(0, len(positions), per_shard)):
        part = positions[start : start + per_shard]
        names.append(f"{split}-{number:06d}.tar")
        with tarfile.open(folder / names[-1], "w") as tar:
            for position in part:
                key = key_of(images.ids[position])
                _add(tar, f"{key}.tokens.npy", _tokens(images, position))
                _add(tar, f"{key}.captions.json", _captions(captions, images.ids[position]))
                advance(1)
    return names


def _tokens(images: ImageTokens, position: int) -> bytes:
    """The image tokens of a picture as a .npy file of float16 [N, D]."""
    tokens = images.tokens([position])[0].numpy()
    with np.errstate(over="ignore"):  # seen by the next line
        half = tokens.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(f"{images.ids[position]}: its image tokens do not fit float16, the type of WebDataset tars")
    buffer = io.BytesIO()
    np.save(buffer, half, allow_pickle=False)
    return buffer.getvalue()


def _captions(captions: CaptionTokens, row_id: str) -> bytes:
    try:
        return json.dumps(captions.captions(row_id)).encode()
    except KeyError:
        raise UserError(f"{row_id}: has image tokens, but no caption tokens; run `dvc repro`") from None


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # its time, owner and mode are constants: the same bytes each time
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
