"""What the task photos asks of a picture, and which answer is right: its folder's name."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any


def process_docs(dataset: Any) -> Any:
    """Each picture with the names of all classes, in the order of the labels."""
    names = [name.replace("_", " ") for name in dataset.features["label"].names]
    return dataset.add_column("choices", [names] * len(dataset))


def doc_to_visual(doc: Any) -> list[Any]:
    return [doc["image"].convert("RGB")]


def process_results(doc: Any, results: Sequence[Any]) -> dict[str, float]:
    """Whether the name that costs least is the right one; lmms-eval 0.7.3 hands on what a model gave as text."""
    costs = [(ast.literal_eval(result) if isinstance(result, str) else result)[0] for result in results]
    return {"acc": float(costs.index(min(costs)) == doc["label"])}
