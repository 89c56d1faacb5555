"""The classes of a data set, and which of its pictures have one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.store.reader import ImageTokens


def labelled(images: ImageTokens, *splits: str) -> list[int]:
    """Positions of the pictures of some splits whose class has a name: one without words is no answer."""
    return [i for split in splits for i in images.split(split) if str(images.rows["label"].iloc[i]).strip()]


def class_names(images: ImageTokens) -> list[str]:
    """The names of all classes, sorted."""
    return sorted({label for label in images.rows["label"] if str(label).strip()})


def numbers(images: ImageTokens, positions: list[int], names: list[str]) -> list[int]:
    """Of each picture the place of its class among the names."""
    place = {name: i for i, name in enumerate(names)}
    return [place[label] for label in images.rows["label"].iloc[positions]]
