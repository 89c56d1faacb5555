"""Image tokens: the frozen encoder run over a data set once, its tokens kept shard by shard."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

import pandas as pd
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from pipeline import versions
from pipeline.config import Params
from pipeline.devices import pick_device
from pipeline.encoders.base import Encoder
from pipeline.encoders.vision import VisionEncoder
from pipeline.errors import UserError
from pipeline.extraction.reading import does_not_decode, read_picture
from pipeline.extraction.views import views_of
from pipeline.extraction.work import Advance, Clock, Make, build_missing, check_repair, parts_of, usable
from pipeline.files import atomically
from pipeline.media.decoding import Broken, Loaded, padded, say_once
from pipeline.runs import STORE
from pipeline.store import schema
from pipeline.store.donors import Donors
from pipeline.store.dtypes import Columns, DoesNotFit, pack
from pipeline.store.shards import (
    Manifest,
    Shard,
    ShardFile,
    write_record,
)


def extract_images(
    params: Params,
    data: str,
    encoder: VisionEncoder,
    advance: Advance,
    repair: Manifest | None = None,
    make: Make | None = None,
) -> Manifest:
    """Image tokens of all usable pictures of a data set, in the store.

    Shards that are there are kept, so an interrupted run loses at most the shard in work; of a shard that has to be
    made, rows of pictures that other shards hold are copied. The bytes are those of an extraction from nothing.
    `repair`: make only what this manifest names. `make`: how, unless in this process. Raises UserError when a picture
    changed since `prepare`, its tokens do not fit cache.dtype, or parameters and pictures are not those of `repair`.
    """
    work = ImageShards(params, data, encoder)
    check_repair("images", data, work.fingerprint, work.parts, repair)
    shards = build_missing(work.parts, make or work.build_all, advance)
    return Manifest("images", work.fingerprint, shards, encoder=encoder.identity)


@dataclass
class Part:
    """A shard in work: its rows, those that have to be encoded, and what it takes."""

    rows: pd.DataFrame
    fresh: list[int] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)


class ImageShards:
    """The shards of image tokens that a data set needs from an encoder, and how a single one is made.

    Raises UserError when the data set has no usable picture.
    """

    def __init__(self, params: Params, data: str, encoder: VisionEncoder):
        self.params, self.encoder, self.size = params, encoder, params.vision.batch
        place, decoders = pick_device(params.runtime.device), params.runtime.decode_threads
        self.decoder, device = Encoder.of(params.vision).decoder(encoder.preprocess, place), place.type
        if params.vision.decoder == "auto" and multiprocessing.parent_process() is None:
            say_once(f"vision.decoder auto: {self.decoder.name}")
        made_by = {**encoder.identity, **self.decoder.identity}
        if params.vision.views:
            made_by["views"] = f"{' '.join(params.vision.views)} {versions.VIEWS}"
        self.fingerprint = schema.fingerprint(
            **made_by, stored=params.cache.dtype, batch=self.size, version=versions.IMAGES
        )
        rows = usable(params, data)
        self.parts = parts_of("images", self.fingerprint, params, rows, list(rows["sha256"]))
        self.donors = Donors(STORE / "images" / self.fingerprint)
        # A GPU encodes two at a time, so that one is copied while the other is computed; it decodes a third meanwhile.
        self.passes = {"cpu": torch.get_num_threads(), "cuda": 3}.get(device, 1)
        self.on_gpu = device == "cuda"
        # Reading alone is mostly Python, of which one thread runs at a time: few threads, and long turns.
        self.together, decoders = (self.size, 1) if self.decoder.light else (1, decoders)
        self.threads = max(self.passes, decoders) if device == "cpu" else self.passes + decoders
        self._encoding = threading.BoundedSemaphore(self.passes)

    def part(self, number: int, of: int) -> list[Path]:
        """Every `of`-th shard, from `number` on, whether it is in the store or not.

        So `of` processes that know nothing of one another, on machines that share the store, make each shard once.
        """
        return list(self.parts)[number::of]

    def build_missing(self, paths: list[Path], advance: Advance) -> None:
        """Make those of some shards that are not in the store yet."""
        build_missing({path: self.parts[path] for path in paths}, self.build_all, advance)

    def build(self, path: Path, advance: Advance) -> Shard:
        """Make one shard. Whoever makes a single one calls this, in another process or on another machine."""
        return self.build_all([path], advance)[path]

    def build_all(self, paths: list[Path], advance: Advance) -> dict[Path, Shard]:
        """Make some shards in order: rows are copied from other shards where their picture is there, else encoded.

        While a shard is brought to the disk the next one is in work, so that nothing stands still between them.
        """
        parts = {path: Part(self.parts[path]) for path in paths}
        with closing(self.tokens(list(parts.values()))) as tokens:
            made = {path: self._write(path, part, tokens, advance) for path, part in parts.items()}
        if refused := self.decoder.take_refused():
            print(f"{refused} JPEGs that {self.decoder.name} refuses were decoded by PIL", file=sys.stderr)
        return made

    def _write(self, path: Path, part: Part, tokens: Iterator[tuple[list[int], Columns]], advance: Advance) -> Shard:
        """Write a shard, batch by batch as its tokens come: memory does not grow with it."""
        missing, clock = len(part.rows), part.clock
        with clock("all"):
            with atomically(path) as stream:
                file = None
                while missing:
                    at, values = next(tokens)
                    with clock("write"):
                        file = file or self._file(stream, part.rows, values["tokens"].shape[1:])
                        file.put(at, values)
                    missing -= len(at)
                    advance(len(at))
                with clock("write"):
                    assert file is not None, "a part has at least one row"
                    sha256 = file.finish()
        shard = Shard(path.name, sha256, len(part.rows), path.stat().st_size)
        encoded = len(part.fresh)
        write_record(path, shard, encoded=encoded, copied=shard.rows - encoded, seconds=clock.seconds())
        return shard

    def _file(self, stream: BinaryIO, rows: pd.DataFrame, shape: tuple[int, ...]) -> ShardFile:
        arrow = schema.image_schema(shape, self.params.cache.dtype, self.fingerprint, self.params.vision.views)
        return ShardFile(stream, arrow, [pa.array(rows["id"]), pa.array(rows["sha256"])])

    def tokens(self, parts: list[Part]) -> Generator[tuple[list[int], Columns], None, None]:
        """Positions and columns of all rows, part by part, a batch at a time; in each part copies come first.

        On a CPU a pass on one thread beside others is faster than all threads in one pass: nobody waits for anybody.
        The same threads decode, so that no more are at work than torch has. On a GPU those that encode wait for it.
        """
        with one_thread_each(self.threads) as pool:
            ahead: deque[tuple[list[int], Future[Columns]]] = deque()
            for at, columns in self._started(pool, parts):
                ahead.append((at, columns))
                if len(ahead) > 2 * self.passes + 2:
                    at, columns = ahead.popleft()
                    yield at, columns.result()
            while ahead:
                at, columns = ahead.popleft()
                yield at, columns.result()

    def _started(self, pool: ThreadPoolExecutor, parts: list[Part]) -> Iterator[tuple[list[int], Future[Columns]]]:
        """The same, as the pool begins with it. It takes tasks in order, so a pass finds its pictures loaded."""
        for part in parts:
            for row, sha256 in enumerate(part.rows["sha256"]):
                with part.clock("copy"):
                    found = self.donors.find(sha256)
                if found is not None and self._rows_stand_alone:
                    there = Future[Columns]()
                    there.set_result(found)
                    yield [row], there
                else:
                    part.fresh.append(row)
            for start in range(0, len(part.fresh), self.size):
                at = part.fresh[start : start + self.size]
                turns = [at[i : i + self.together] for i in range(0, len(at), self.together)]
                pictures = [pool.submit(self._load, part, turn) for turn in turns]
                yield at, pool.submit(self._pass, part, at, pictures)

    @cached_property
    def _rows_stand_alone(self) -> bool:
        """Whether a picture has the same bits in every place of a batch, whatever else is in it.

        Some encoders fail this at some batch sizes. Then no row is copied: in an extraction from nothing it would stand
        in another place.
        """
        picture = self.encoder.preprocess(Image.radial_gradient("L").convert("RGB"))
        with one_thread_each(1) as pool:
            batches = torch.stack([picture] * self.size), padded([picture], self.size)
            everywhere, alone = pool.map(partial(self.encode, exact=True), batches)
        same = all(torch.equal(alone[0], tokens) for tokens in everywhere)
        if not same:
            print("tokens depend on the place in the batch: shards are made whole, no row is copied", file=sys.stderr)
        return same

    def _load(self, part: Part, rows: list[int]) -> list[Loaded]:
        return [self._load_one(part, row) for row in rows]

    def _load_one(self, part: Part, row: int) -> Loaded:
        name = part.rows["image"][row]
        with part.clock("read"):
            content = read_picture(name, part.rows["sha256"][row])
        with part.clock("decode"):
            try:
                return self.decoder.load(content)
            except ValueError as error:
                raise does_not_decode(name, error) from None

    def _pass(self, part: Part, at: list[int], pictures: list[Future[list[Loaded]]]) -> Columns:
        """The columns of the rows `at`. Every batch has the same shape: one of another size would give other bits."""
        loaded = [picture for some in pictures for picture in some.result()]
        with self._encoding:
            with part.clock("decode"):
                try:
                    pixels = self.decoder.batch(loaded, self.size)
                except Broken as error:
                    raise does_not_decode(part.rows["image"][at[error.row]], error) from None
            with part.clock("encode"):
                tokens = self.encode(pixels)[: len(at)]
        dtype = self.params.cache.dtype
        try:
            return pack(tokens, dtype)
        except DoesNotFit as fault:
            finite = self.encode(pixels, exact=True)[: len(at)].isfinite().all()
            mend = "set cache.dtype: float32" if finite else "the encoder gives no finite numbers"
            raise UserError(part.rows["image"][at[fault.row]], f"tokens do not fit {dtype}", mend) from None

    def encode(self, pixels: Tensor, exact: bool = False) -> Tensor:
        """Tokens of a batch, [B, N, D]; of several views of its pictures, each a pass of its own, [B, V, N, D].

        Unless `exact`, they come from a GPU in the type that is stored: half the bytes. int8 is scaled on the CPU.
        """
        dtype = self.params.cache.dtype
        stored = [getattr(torch, dtype)] if self.on_gpu and dtype != "int8" and not exact else []
        found = [self.encoder.encode(view, *stored) for view in views_of(pixels, self.params.vision.views)]
        return found[0] if len(found) == 1 else torch.stack(found, 1)


@contextmanager
def one_thread_each(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads to compute side by side, each on itself alone: so no bit depends on how many threads torch has.

    After an error what has not begun is not done any more.
    """
    whole, pool = torch.get_num_threads(), ThreadPoolExecutor(count, initializer=_alone)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(whole)  # the last one set is also the default of threads to come


def _alone() -> None:
    """Compute on this thread alone: in OpenMP and MKL the number is that of the thread that sets it."""
    torch.get_num_threads()  # a thread's first call takes the default, and would do so after it was set
    torch.set_num_threads(1)
