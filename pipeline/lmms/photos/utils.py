"""What the task photos asks of a picture and its folder's name."""

from __future__ import annotations

from typing import Any


def process_docs(dataset: Any) -> Any:
    """Each picture with the names of all classes, in the order of the labels."""
    names = [name.replace("_", " ") for name in dataset.features["label"].names]
    return dataset.add_column("choices", [names] * len(dataset))


def doc_to_visual(doc: Any) -> list[Any]:
    return [doc["image"].convert("RGB")]
