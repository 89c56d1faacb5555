"""What both extractions share: which shards a data set needs, which of them are missing, and how long things take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.runs import STORE, Run
from pipeline.store import schema
from pipeline.store.reader import usable_rows
from pipeline.store.shards import Manifest, Shard, recorded

Advance = Callable[[int], None]
Parts = dict[Path, pd.DataFrame]
"""The shards a data set needs, in the order of its manifest, and the rows of each."""
Make = Callable[[list[Path], Advance], dict[Path, Shard]]
"""Makes some shards: in this process, or by many (distribute.py)."""


class Clock:
    """Seconds by kind of work. Those of threads side by side add up, to more than passed on the wall."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, work: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        with self._lock:
            self._seconds[work] = self._seconds.get(work, 0) + time.perf_counter() - began

    def seconds(self) -> dict[str, float]:
        return {work: round(seconds, 4) for work, seconds in self._seconds.items()}


def usable(params: Params, data: str) -> pd.DataFrame:
    """The rows of a data set that have a usable picture; UserError when there is none."""
    rows = usable_rows(Run.of(params), data)
    if rows.empty:
        raise UserError(data, "no usable picture", "see the quarantine column of the prepared manifest")
    return rows


def parts_of(kind: str, print_: str, params: Params, rows: pd.DataFrame, digests: Sequence[str]) -> Parts:
    """The shards that some rows need; `digests` say what each row's features are made from."""
    numbers = rows["id"].map(lambda row_id: schema.shard_of(row_id, params.cache.shards))
    rows = rows.assign(digest=digests)
    parts = {}
    for _, part in rows.groupby(numbers, sort=True):
        part = part.reset_index(drop=True)
        key = schema.shard_key(zip(part["id"], part.pop("digest"), strict=True))
        parts[STORE / kind / print_ / f"{key}.arrow"] = part
    return parts


def check_repair(kind: str, data: str, print_: str, parts: Parts, repair: Manifest | None) -> None:
    wanted = (print_, [path.name for path in parts])
    if repair is not None and wanted != (repair.fingerprint, [shard.name for shard in repair.shards]):
        raise UserError(f"{kind} of {data}", "its manifest is of other parameters or pictures", "run `dvc repro`")


def build_missing(parts: Parts, make: Make, advance: Advance) -> list[Shard]:
    """All shards of some parts; `make` makes those that are not in the store yet."""
    there = {path: recorded(path) if path.exists() else None for path in parts}
    advance(sum(len(parts[path]) for path, shard in there.items() if shard is not None))
    made = make([path for path, shard in there.items() if shard is None], advance)
    return [shard or made[path] for path, shard in there.items()]
