"""The pictures of a prepared manifest, read again: the same files, decoded the same way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.media.decoding import Broken, Decoder, Loaded
from pipeline.media.pictures import read

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor


def read_picture(name: str, sha256: str) -> bytes:
    """A picture file that still has the content `prepare` saw."""
    try:
        content = read(name)
    except OSError as error:
        raise UserError(
            name, f"cannot be read ({error.strerror})", "run `dvc repro --force` for the prepare stage"
        ) from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(name, "changed since it was prepared", "run `dvc repro --force` for the prepare stage")
    return content


def does_not_decode(name: str, error: ValueError) -> UserError:
    return UserError(name, error, "run `dvc repro --force` for the prepare stage")


def batches(rows: pd.DataFrame, decoder: Decoder, size: int, threads: int) -> Iterator[tuple[Tensor, int]]:
    """Pictures of some rows in their order, [size, 3, H, W], and how many there are in each: as in extraction, the last
    is filled up. While one is worked on, threads read the next.

    Raises UserError naming a picture that is gone, has changed since `prepare` or does not decode.
    """
    names, digests = list(rows["image"]), list(rows["sha256"])

    def load(at: int) -> Loaded:
        try:
            return decoder.load(read_picture(names[at], digests[at]))
        except ValueError as error:
            raise does_not_decode(names[at], error) from None

    def batch(start: int, pictures: list[Future[Loaded]]) -> tuple[Tensor, int]:
        try:
            return decoder.batch([picture.result() for picture in pictures], size), len(pictures)
        except Broken as error:
            raise does_not_decode(names[start + error.row], error) from None

    with ThreadPoolExecutor(threads) as pool:
        ahead: list[tuple[int, list[Future[Loaded]]]] = []
        for start in range(0, len(names), size):
            ahead.append((start, [pool.submit(load, at) for at in range(start, min(start + size, len(names)))]))
            if len(ahead) > 1:
                yield batch(*ahead.pop(0))
        yield from (batch(*last) for last in ahead)
