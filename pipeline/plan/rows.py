"""How much there is of each data set: counted where it is prepared, else by a first look at its files."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Params
from pipeline.plan.costs import pictures
from pipeline.runs import Run

HELD_OUT = 0.15  # share of val, and of test
# Characters of a token: captions are of common words, names of rarer ones (3.1 in the demo, 4.1 of groceries).
CHARACTERS = {"caption": 4.3, "classify": 3.6}
# What a caption or a name is like where nothing is prepared: captions of a picture, tokens of each.
ASSUMED = {"caption": (5, 14.0), "classify": (1, 3.0)}


@dataclass(frozen=True)
class Rows:
    """Pictures of each part, texts of a picture, tokens of a text, and classes."""

    train: int
    val: int
    test: int
    texts: float
    tokens: float
    classes: int
    counted: bool

    @property
    def pictures(self) -> int:
        return self.train + self.val + self.test


def rows_of(params: Params, name: str) -> Rows:
    """Those of a data set."""
    path = Run.of(params).manifest(name)
    if not path.is_file():
        return _assumed(params, name)
    import pyarrow.parquet as pq

    return counted(pq.read_table(path, columns=["captions", "label", "split", "quarantine"]).to_pylist())


def counted(records: list[dict[str, Any]]) -> Rows:
    """From the rows of a manifest."""
    used = [row for row in records if not row["quarantine"]]
    classes = {row["label"] for row in used if row["label"] is not None}
    texts = [text for row in used for text in row["captions"]]
    letters = sum(map(len, texts)) / max(1, len(texts))
    tokens = letters / CHARACTERS["classify" if classes else "caption"]
    parts = Counter(row["split"] for row in used)
    return Rows(
        parts["train"], parts["val"], parts["test"], len(texts) / max(1, len(used)), tokens, len(classes), counted=True
    )


def _assumed(params: Params, name: str) -> Rows:
    task, root = params.data[name].task, getattr(params.data[name], "root", None)
    count = pictures(params, name)
    texts, tokens = ASSUMED.get(task, ASSUMED["caption"])
    classes = 0
    if task == "classify":
        inner = Path(root, "images") if root and Path(root, "images").is_dir() else root
        each = getattr(params.data[name], "count", None)
        names = [entry.name for entry in os.scandir(inner) if entry.is_dir()] if inner else []
        classes = len(names) if inner else count // each if each else 100
        tokens = sum(map(len, names)) / len(names) / CHARACTERS[task] if names else tokens
        count = min(count, classes * each) if each else count
    held = round(HELD_OUT * count)
    return Rows(count - 2 * held, held, held, texts, tokens, classes, counted=False)
