"""Features as WebDataset tars, which https://github.com/webdataset/webdataset reads: written, and read back.

A folder of tars `<split>-000000.tar` with the members `<key>.tokens.npy`, [N, D], `<key>.captions.json`, a list of
token-id lists, and, where there are other views of the pictures, `<key>.<view>.npy`, as tokens.npy; beside them
`token_ids.npy`, int32 [V], sorted, `embeddings.npy`, float32 [V, D]: their rows of the LLM's input embeddings, and
`index.parquet`: a row per picture, with its captions and the place of its tokens. The owner's name of each member is
the identity of the export, so a tar of another one is noticed wherever it is read.
docs/webdataset.md shows how others read them.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.files import atomic_folder, foreign_faults
from pipeline.runs import Run
from pipeline.store.dtypes import Columns
from pipeline.store.reader import CaptionTokens, ImageTokens
from pipeline.store.schema import shard_of
from pipeline.store.shards import sha256_of

FORMAT = "terraalign-webdataset/1"
INDEX = pa.schema(
    [
        ("id", pa.string()), ("split", pa.string()), ("captions", pa.list_(pa.list_(pa.int32()))),
        ("tar", pa.string()), ("offset", pa.int64()), ("size", pa.int64()),
    ]
)  # fmt: skip
"""A row per picture; offset and size are those of <key>.tokens.npy in its tar, in bytes."""
OTHERS = pa.field("views", pa.list_(pa.int64()))
"""Where pictures have other views: their offsets; their size is that of the tokens."""


def identity(run: Run, data: str) -> str:
    """Hash of the manifests that say what the features of a data set are, and so what tars of them hold.

    Raises UserError when one of them is missing.
    """
    paths = [
        run.features("images", data),
        run.features("text", data),
        run.manifest(data),
    ]
    for path in paths:
        if not path.exists():
            raise UserError(path, "no such manifest", "run `dvc repro`, or `dvc pull`")
    return hashlib.sha256(json.dumps([FORMAT, *map(sha256_of, paths)]).encode()).hexdigest()[:24]


def export(
    images: ImageTokens,
    captions: CaptionTokens,
    identity: str,
    destination: Path,
    per_shard: int,
    advance: Callable[[int], None],
) -> list[Path]:
    """Write the features of one data set to a new folder and return its tars, at most `per_shard` pictures in each.

    Numbers are those of the store: float16 if it keeps float16, else float32. Within a split the order is that of the
    ids' hashes, so neighbours are not of one class. The same features give the same bytes. Raises UserError when the
    folder is not empty or a picture has no caption tokens; then, and when interrupted, no folder is left.
    """
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise UserError(destination, "there already", "name a new folder, or delete this one first")
    with atomic_folder(destination) as folder:
        order = np.argsort(captions.token_ids)
        np.save(folder / "token_ids.npy", captions.token_ids[order].astype(np.int32), allow_pickle=False)
        np.save(folder / "embeddings.npy", captions.table.numpy()[order], allow_pickle=False)
        rows = [
            row
            for split in ("train", "val", "test")
            for row in _write_split(images, captions, identity, folder, split, per_shard, advance)
        ]
        _write_index(folder, identity, images, rows)
    return [destination / name for name in dict.fromkeys(row["tar"] for row in rows)]


def key_of(row_id: str) -> str:
    """The id as a WebDataset key, which must have no dot in its last part; urllib.parse.unquote gives the id back."""
    key = quote(row_id, safe="/ ").replace(".", "%2E")
    return "%2F" + key[1:] if key.startswith("/") else key


def _write_split(
    images: ImageTokens,
    captions: CaptionTokens,
    identity: str,
    folder: Path,
    split: str,
    per_shard: int,
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    """The tars of one split; returns their rows of the index."""
    positions = sorted(images.split(split), key=lambda position: shard_of(images.ids[position], 2**64))
    rows = []
    for number, start in enumerate(range(0, len(positions), per_shard)):
        name = f"{split}-{number:06d}.tar"
        with tarfile.open(folder / name, "w") as tar:
            for position in positions[start : start + per_shard]:
                row_id = images.ids[position]
                key, token_ids = key_of(row_id), _captions(captions, row_id)
                place = _add(tar, f"{key}.tokens.npy", _tokens(images, position), identity)
                _add(tar, f"{key}.captions.json", json.dumps(token_ids).encode(), identity)
                views = [
                    _add(tar, f"{key}.{view}.npy", _tokens(images, position, number), identity)["offset"]
                    for number, view in enumerate(images.others, 1)
                ]
                rows.append({"id": row_id, "split": split, "captions": token_ids, "tar": name, "views": views, **place})
                advance(1)
    return rows


def _write_index(folder: Path, identity: str, images: ImageTokens, rows: list[dict[str, Any]]) -> None:
    about = {
        "format": FORMAT, "identity": identity, "shape": json.dumps(images.shape), "dtype": _exact(images.dtype),
        "bytes": json.dumps({path.name: path.stat().st_size for path in sorted(folder.iterdir())}),
    }  # fmt: skip
    if images.others:
        about["views"] = json.dumps(images.others)
    schema = _index_schema(images.others).with_metadata(about)
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "index.parquet")


def _index_schema(others: list[str]) -> pa.Schema:
    return INDEX.append(OTHERS) if others else INDEX


def _exact(dtype: str) -> str:
    """The type in which a .npy file keeps the numbers of a cache.dtype as they are; numpy knows no bfloat16."""
    return "float16" if dtype == "float16" else "float32"


def _tokens(images: ImageTokens, position: int, view: int = 0) -> bytes:
    """The image tokens of a picture, in a view, as a .npy file [N, D]."""
    buffer = io.BytesIO()
    tokens = images.tokens([position], views=[view])[0].numpy()
    np.save(buffer, tokens.astype(_exact(images.dtype)), allow_pickle=False)
    return buffer.getvalue()


def _captions(captions: CaptionTokens, row_id: str) -> list[list[int]]:
    try:
        return captions.captions(row_id)
    except KeyError:
        raise UserError(row_id, "has image tokens, but no caption tokens", "run `dvc repro`") from None


def _add(tar: tarfile.TarFile, name: str, content: bytes, identity: str) -> dict[str, int]:
    """Append a member and return its place."""
    member = tarfile.TarInfo(name)  # its time and mode are constants: the same bytes each time
    member.size, member.uname = len(content), identity
    tar.addfile(member, io.BytesIO(content))
    blocks = -(-len(content) // tarfile.BLOCKSIZE)
    return {"offset": tar.offset - blocks * tarfile.BLOCKSIZE, "size": len(content)}


def open_tars(params: Params, data: str) -> tuple[ImageTokens, CaptionTokens]:
    """The features of a data set from the tars at cache.tars, local or remote, as the store would give them.

    They are those that the profile's manifests describe, which is checked; the store itself is not needed. Raises
    UserError when a file is missing, cut short or of another export.
    """
    run = Run.of(params)
    folder = f"{f'{params.cache.tars}/{data}' if params.cache.tars else run.tars(data)}"
    if "://" in folder:
        mend = f"run `terraalign store export {data} FOLDER` where the store is, and copy it there"
    else:
        mend = f"delete {folder}, if it is there, and run `terraalign store export {data} {folder}`"
    return read_tars(folder, identity(run, data), mend)


def read_tars(folder: str, identity: str, mend: str) -> tuple[ImageTokens, CaptionTokens]:
    """What `export` wrote to a folder or fsspec URL under this identity; `mend` ends every UserError."""
    files = _Files(folder, mend)
    try:
        index = pq.read_table(files.whole("index.parquet"))
        about = {key.decode(): value.decode() for key, value in (index.schema.metadata or {}).items()}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise files.fault("index.parquet", f"not a whole Parquet file ({error})") from None
    others = json.loads(about.get("views", "[]"))
    if not index.schema.equals(_index_schema(others)) or about.get("format") != FORMAT:
        raise files.fault("index.parquet", "written by another program or version")
    if about["identity"] != identity:
        raise files.fault("index.parquet", "of other features than the profile's manifests name")
    files.check_sizes(json.loads(about["bytes"]))
    index = index.sort_by("id")
    rows = index.select(["id", "split"]).to_pandas()
    shape, dtype = tuple(json.loads(about["shape"])), about["dtype"]
    images = ImageTokens(rows, shape, dtype, _Members(files, index, identity, shape, dtype, others), others)
    captions = dict(zip(index["id"].to_pylist(), index["captions"].to_pylist(), strict=True))
    table = torch.from_numpy(files.numbers("embeddings.npy"))
    return images, CaptionTokens(captions, files.numbers("token_ids.npy"), table)


class _Files:
    """The files of an export in a folder or at an fsspec URL; every failure is a UserError that names the file."""

    def __init__(self, folder: str, mend: str):
        self.folder, self.mend = folder, mend
        with self._reading(""):
            self._system, self._root = fsspec.url_to_fs(folder)

    def fault(self, name: str, what: str) -> UserError:
        return UserError(f"{self.folder}/{name}", what, self.mend)

    def _reading(self, name: str) -> AbstractContextManager[None]:
        return foreign_faults(
            lambda reason: self.fault(name, f"cannot be read ({reason})"), lambda _: self.fault(name, "no such file")
        )

    def whole(self, name: str) -> BinaryIO:
        with self._reading(name):
            return io.BytesIO(self._system.cat_file(f"{self._root}/{name}"))

    def numbers(self, name: str) -> np.ndarray[Any, Any]:
        try:
            return np.load(self.whole(name), allow_pickle=False)
        except ValueError as error:
            raise self.fault(name, f"not a whole .npy file ({error})") from None

    def check_sizes(self, expected: dict[str, int]) -> None:
        """Raises UserError when a file is missing or of another size."""
        for name, size in expected.items():
            with self._reading(name):
                found = self._system.size(f"{self._root}/{name}")
            if found != size:
                raise self.fault(name, f"has {found} bytes instead of {size}")

    def ranges(self, names: list[str], starts: list[int], ends: list[int]) -> list[bytes]:
        """Parts of files, fetched at once where the file system can."""
        found = self._system.cat_ranges([f"{self._root}/{name}" for name in names], starts, ends)
        for name, content in zip(names, found, strict=True):
            if isinstance(content, Exception):
                with self._reading(name):
                    raise content
        return list(found)


class _Members:
    """Reads image tokens out of tars, each by its place: any order costs the same, and nothing is unpacked.

    By row, as ImageTokens has them: those of a picture, one for each of its views, are neighbours.
    """

    def __init__(
        self, files: _Files, index: pa.Table, identity: str, shape: tuple[int, ...], dtype: str, others: list[str]
    ):
        self._files, self._identity = files, identity.encode()
        keys, views = [key_of(row_id) for row_id in index["id"].to_pylist()], ["tokens", *others]
        self._names = [f"{key}.{view}.npy".encode()[:100] for key in keys for view in views]
        plain, rest = index["offset"].to_pylist(), index["views"].to_pylist() if others else [[]] * len(keys)
        self._offsets = [offset for first, more in zip(plain, rest, strict=True) for offset in (first, *more)]
        self._tars, self._sizes = ([x for x in index[of].to_pylist() for _ in views] for of in ("tar", "size"))
        self._blank = np.empty(shape, dtype)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(self._blank))
        self._header = header.getvalue()

    def __call__(self, rows: list[int]) -> Columns:
        """tokens [B, N, D] of some rows; raises UserError when a member is not the one the index names."""
        starts = [self._offsets[i] - tarfile.BLOCKSIZE for i in rows]  # from the tar's own header on
        ends = [self._offsets[i] + self._sizes[i] for i in rows]
        parts = self._files.ranges([self._tars[i] for i in rows], starts, ends)
        tokens = np.empty((len(rows), *self._blank.shape), self._blank.dtype)
        for number, (row, part) in enumerate(zip(rows, parts, strict=True)):
            name, owner = part[:100].rstrip(b"\0"), part[265:297].rstrip(b"\0")  # as POSIX ustar has them
            numbers = tarfile.BLOCKSIZE + len(self._header)
            whole = len(part) == numbers + self._blank.nbytes and part[tarfile.BLOCKSIZE : numbers] == self._header
            if not whole or name != self._names[row] or owner != self._identity:
                raise self._files.fault(self._tars[row], f"damaged or of another export at {self._names[row].decode()}")
            tokens[number] = np.frombuffer(part, tokens.dtype, offset=numbers).reshape(self._blank.shape)
        return {"tokens": tokens}
