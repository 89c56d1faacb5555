"""Labelled pictures in a plain folder of class folders; the folder's name is the display name."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Set
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.errors import UserError
from pipeline.sources.base import Carved, FolderSettings, FolderSource
from pipeline.sources.folders import Tree, pictures_below
from pipeline.sources.labels import clean
from pipeline.sources.rows import Found, Row, order, warn
from pipeline.sources.split import by_hash
from pipeline.sources.texts import listed

if TYPE_CHECKING:
    from rich.progress import Progress

TEST = 0.15
# Folders of class folders that are the parts of a data set, if nothing else lies beside them
PARTS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip


class ImageFolderSettings(FolderSettings):
    without: list[str] = Field([], description="folders in root that are no classes")
    validation: Carved = Field(0.1, description="share of train that is carved from it")


class ImageFolder(FolderSource):
    """A folder of class folders."""

    Settings, tasks = ImageFolderSettings, ("classify",)
    settings: ImageFolderSettings

    def read(self, progress: Progress) -> Found:
        own = self.settings
        return read(self.folder(), own.validation, own.count, self.key, own.split, own.without)

    def in_class(self, path: PurePath) -> bool:
        return super().in_class(path) and path.parts[0] not in self.settings.without


def read(
    root: Path, validation: float, count: int | None, section: str, how: str, without: Collection[str] = ()
) -> Found:
    """One row per picture below each class folder; 15 % test, `validation` val, the rest train.

    Class folders may lie in folders train, val and test (PARTS): then these are the splits, and one that is not there
    is carved from train. `count` keeps at most that many pictures per class folder; the folders `without` are not
    looked at. The id is the path below `root`. Pictures beside the class folders, and class folders without pictures,
    are left out. Raises UserError if there is no class folder, or parts without train or without class folders.
    """
    tree = pictures_below(root, without=without)
    parts = _parts(root, tree.files)
    depth = 2 if parts else 1
    classes: defaultdict[str, list[str]] = defaultdict(list)
    for key in tree.files:
        *folders, _ = key.split("/")
        if len(folders) < depth:
            tree.leave(key, "beside the class folders")
        else:
            classes["/".join(folders[:depth])].append(key)
    if not classes and (depth == 2 or not any("/" not in folder for folder in tree.folders)):
        raise UserError(root, "no class folder in it", f"{section}.root must hold one folder of pictures per class")
    _name_empty(tree, classes, depth)
    _name_joined(root, classes)
    given = {parts[folder.split("/")[0]] for folder in classes} if parts else set()
    rows = [
        _row(tree.files[key], key, folder, parts.get(key.split("/")[0]))
        for folder, keys in classes.items()
        for key in sorted(keys, key=order)[:count]
    ]
    if parts:
        _tell_parts(parts, shares_of(validation, given), section, how)
    else:
        _tell_inner_parts(root, tree.files)
    return Found(rows, tree.left_out, shares_of(validation, given))


def split_of(key: str, validation: float) -> str:
    """train, val or test (15 %; val: `validation` of all) by the hash of the key."""
    return by_hash(key, shares_of(validation))


def shares_of(validation: float, given: Set[str] = frozenset()) -> dict[str, float]:
    """The shares of the parts that training pictures come into: those that have no folder are carved from them."""
    carved = {part: size for part, size in (("test", TEST), ("val", validation)) if part not in given}
    return {**carved, "train": 1 - sum(carved.values())}


def _row(path: Path, key: str, folder: str, part: str | None) -> Row:
    """`part` is that whose folder holds the picture, if there are such folders; from train others are carved."""
    label = clean(folder.rpartition("/")[2])
    return Row(key, path, [label], label, None if part == "train" else part)


def _parts(root: Path, keys: Iterable[str]) -> dict[str, str]:
    """Folder -> split, if all folders with pictures are parts of the data set, and hold class folders; else none.

    Raises UserError when that would leave no training pictures, or pictures without classes.
    """
    deep = {key.split("/")[0] for key in keys if key.count("/") > 1}
    tops = {key.split("/")[0] for key in keys if "/" in key}
    parts = {top: PARTS[top.casefold()] for top in sorted(tops) if top.casefold() in PARTS}
    names = ", ".join(parts)
    if len(parts) < len(tops):
        if len({parts[top] for top in parts if top in deep}) > 1:
            others = listed(sorted(tops - parts.keys()), 3)
            warn(f"{root}: {names} are taken as classes, as {others} lie beside them; move these if they are the parts")
        return {}
    if not deep:
        if len(parts) > 1:
            raise UserError(root, f"{names} hold pictures, and no class folders", "put the pictures into one per class")
        return {}
    if "train" not in {parts[top] for top in deep}:
        raise UserError(root, f"{names} hold class folders, but there is none for training", "name one of them train")
    return parts


def _tell_parts(parts: dict[str, str], shares: dict[str, float], section: str, how: str) -> None:
    carved = [(part, size) for part, size in sorted(shares.items(), reverse=True) if part != "train"]
    rest = "".join(f"; {part} is {100 * size:.0f} % of train, by {how}" for part, size in carved)
    print(f"{section}: the folders {', '.join(parts)} are taken as the parts{rest}", file=sys.stderr)


def _tell_inner_parts(root: Path, keys: Iterable[str]) -> None:
    """Folders train and test within the class folders are no parts: say so, as one may think they are."""
    inner = {folders[1] if len(folders) > 1 else "" for folders in (key.split("/")[:-1] for key in keys)}
    if len(inner) > 1 and all(folder.casefold() in PARTS for folder in inner):
        names = ", ".join(sorted(inner))
        warn(
            f"{root}: the folders {names} within the class folders are not taken as the parts; "
            f"put the class folders into {names} to have them so"
        )


def _name_empty(tree: Tree, classes: Iterable[str], depth: int) -> None:
    """Leave out, by name, the class folders that hold no picture and were not left out already."""
    named = {one.name for one in tree.left_out}
    full = set(classes)
    for folder in tree.folders:
        if folder.count("/") == depth - 1 and folder not in full and str(tree.root / folder) not in named:
            tree.leave(folder, "a class folder without a picture")


def _name_joined(root: Path, classes: Iterable[str]) -> None:
    """Say which folders are one class, as their names give the same words."""
    folders: defaultdict[str, set[str]] = defaultdict(set)
    for folder in classes:
        name = folder.rpartition("/")[2]
        folders[clean(name)].add(name)
    joined = [
        f"{' and '.join(sorted(names))} ({label})"
        for label, names in sorted(folders.items())
        if label and len(names) > 1
    ]
    if joined:
        warn(f"{root}: folders that are one class: {len(joined)}: {listed(joined)}")
