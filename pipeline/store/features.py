"""The features of a data set as a data set of torch: for training of one's own on what was extracted."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from pipeline.errors import UserError
from pipeline.runs import RESULTS, Run, no_results
from pipeline.store.reader import ImageTokens


class Features(Dataset[dict[str, Any]]):
    """Items of one data set of a run: id, tokens (float32 [N, D]), split, and label or captions.

    `folder` is data/<profile> in a project's folder, `data` a name under params.yaml's data, `split` train, val or test
    (default: all). The shards stay mapped: an item is read when it is asked for. Raises UserError where there are none.
    """

    def __init__(self, folder: str | Path, data: str, split: str | None = None):
        folder = Path(folder).resolve()
        if not folder.is_dir() or folder.parent.name != RESULTS.name:
            raise no_results(folder)
        with contextlib.chdir(folder.parents[1]):
            there = sorted(path.stem for path in Run(folder.name).manifest(data).parent.glob("*.parquet"))
            if there and data not in there:
                raise UserError(folder, f"no data set {data} in this run", f"take {' or '.join(there)}")
            self._images = ImageTokens.open(Run(folder.name), data)
        self._at = list(range(len(self._images))) if split is None else self._images.split(split)

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: list[int]) -> list[dict[str, Any]]:
        """As torch's DataLoader asks for a batch: one read for all of it."""
        at = [self._at[item] for item in items]
        rows = self._images.rows.iloc[at]
        tokens = self._images.tokens(at).unbind(0)
        said: list[dict[str, Any]] = [
            {"label": label} if isinstance(label, str) and label else {"captions": list(captions)}
            for label, captions in zip(rows["label"], rows["captions"], strict=True)
        ]
        return [
            {"id": row_id, "tokens": one, "split": split, **text}
            for row_id, one, split, text in zip(rows["id"], tokens, rows["split"], said, strict=True)
        ]
