"""Labelled pictures in the Food-101 layout: images/<class>/<id>.jpg, meta/{classes,labels,train,test}.txt."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.errors import UserError
from pipeline.sources import texts
from pipeline.sources.base import Carved, FolderSettings, FolderSource
from pipeline.sources.folders import SUFFIXES, LeftOut, unnamed
from pipeline.sources.rows import Found, Row, below, order, warn
from pipeline.sources.texts import by_reason

if TYPE_CHECKING:
    from rich.progress import Progress


class Food101Settings(FolderSettings):
    validation: Carved = Field(0.1, description="share of train that is carved from it")


class Food101(FolderSource):
    """A folder in the Food-101 layout."""

    Settings, tasks = Food101Settings, ("classify",)
    assumed = 101_000
    settings: Food101Settings

    @property
    def lists(self) -> list[str]:
        return [f"meta/{name}.txt" for name in ("classes", "labels", "train", "test")]

    @property
    def images(self) -> str:
        return "images"

    def read(self, progress: Progress) -> Found:
        return read(self.folder(), self.settings.validation, self.settings.count, self.key)


def read(root: Path, validation: float, count: int | None, section: str) -> Found:
    """One row per line of meta/train.txt and meta/test.txt; `validation` of train becomes val.

    `count` keeps at most that many pictures of a class in each of the two files. Pictures that no line names are left
    out. Raises UserError, naming file and line, for a missing file, an unknown or repeated class, or a picture that is
    in both parts.
    """
    labels = _labels(root / "meta", section)
    left_out: list[LeftOut] = []
    train = _part(root, "train", labels, left_out, section)
    test = _part(root, "test", labels, left_out, section)
    if both := sorted(train.keys() & test.keys()):
        raise UserError(root / "meta", f"{both[0]} is in both train.txt and test.txt ({len(both)} in all)")
    left_out += unnamed(root / "images", [*train.values(), *test.values()], "named by neither train.txt nor test.txt")
    rows = [_row(train, key, labels, None) for key in _cut(train, count)]
    rows += [_row(test, key, labels, "test") for key in _cut(test, count)]
    return Found(rows, left_out, {"val": validation, "train": 1 - validation})


def _row(files: dict[str, Path], key: str, labels: dict[str, str], split: str | None) -> Row:
    label = labels[_class_of(key)]
    return Row(key, files[key], [label], label, split)


def _class_of(key: str) -> str:
    return key.split("/", 1)[0]


def _labels(meta: Path, section: str) -> dict[str, str]:
    """Class name -> display name: line i of labels.txt belongs to line i of classes.txt."""
    classes, names = _lines(meta / "classes.txt", section), [text for _, text in _lines(meta / "labels.txt", section)]
    if len(classes) != len(names) or not classes:
        raise UserError(meta, f"classes.txt has {len(classes)} lines, labels.txt {len(names)}", "they belong together")
    labels: dict[str, str] = {}
    for (number, name), label in zip(classes, names, strict=True):
        if name in labels:
            where = f"{meta / 'classes.txt'}:{number}"
            raise UserError(where, f"the class {name!r} is there twice", "keep one, in labels.txt as well")
        labels[name] = label
    joined = [(name, f"called {label!r}") for name, label in labels.items() if names.count(label) > 1]
    if joined:
        warn(f"{meta / 'labels.txt'}: classes of one name are one class: {by_reason(joined)}")
    return labels


def _part(root: Path, part: str, labels: dict[str, str], left_out: list[LeftOut], section: str) -> dict[str, Path]:
    """Key `class/id` -> picture, for one of the two parts."""
    path = root / "meta" / f"{part}.txt"
    files: dict[str, Path] = {}
    for number, line in _lines(path, section):
        key = line.replace("\\", "/") if "/" not in line else line
        if "/" not in key or _class_of(key) not in labels:
            absolute = "an absolute path, and " if PurePosixPath(key).is_absolute() else ""
            raise UserError(f"{path}:{number}", f"{line!r} is {absolute}not class/id with a class of classes.txt")
        try:
            key, picture = _picture(root / "images", key)
        except ValueError as fault:
            raise UserError(f"{path}:{number}", fault, "mend that line") from None
        if key in files:
            left_out.append(LeftOut(f"{part}.txt:{number}", "a repetition of an earlier line", id=key))
        files[key] = picture
    return files


def _picture(folder: Path, key: str) -> tuple[str, Path]:
    """The key without .jpg, and its picture: <key>.jpg, or the key itself where it ends as a picture's name does."""
    picture = below(folder, f"{key}.jpg")
    suffix = PurePosixPath(key).suffix
    if suffix.lower() not in SUFFIXES or picture.is_file():
        return key, picture
    return (key.removesuffix(suffix) if suffix == ".jpg" else key), below(folder, key)


def _cut(keys: dict[str, Path], count: int | None) -> list[str]:
    """At most `count` keys of each class, first by hash order."""
    by_class = groupby(sorted(keys), key=_class_of)
    return [key for _, group in by_class for key in sorted(group, key=order)[:count]]


def _lines(path: Path, section: str) -> list[tuple[int, str]]:
    """(number, text) of the lines that are not blank."""
    try:
        text = texts.decode(path.read_bytes())
    except OSError as error:
        raise UserError(path, error.strerror, f"{section}.root must be in the Food-101 layout") from None
    except ValueError as error:
        raise UserError(path, error) from None
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
