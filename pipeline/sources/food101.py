"""Labelled pictures in the Food-101 layout: images/<class>/<id>.jpg, meta/{classes,labels,train,test}.txt."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from pipeline.errors import UserError
from pipeline.sources.manifest import Row, below, order, share


def read(root: Path, validation: float, count: int | None) -> list[Row]:
    """One row per line of meta/train.txt and meta/test.txt; `validation` of train becomes val, by hash of the id.

    `count` keeps at most that many pictures of a class in each of the two files. Raises UserError, naming file and
    line, for a missing file, an unknown class, or a picture that is in both parts.
    """
    labels = _labels(root / "meta")
    train = _part(root, "train", labels)
    test = _part(root, "test", labels)
    if both := sorted(train.keys() & test.keys()):
        raise UserError(f"{root / 'meta'}: {both[0]} is in both train.txt and test.txt ({len(both)} in all)")
    rows = [_row(train, key, labels, "val" if share(key) < validation else "train") for key in _cut(train, count)]
    return rows + [_row(test, key, labels, "test") for key in _cut(test, count)]


def _row(files: dict[str, Path], key: str, labels: dict[str, str], split: str) -> Row:
    label = labels[_class_of(key)]
    return Row(key, files[key], [label], label, split)


def _class_of(key: str) -> str:
    return key.split("/", 1)[0]


def _labels(meta: Path) -> dict[str, str]:
    """Class name -> display name: line i of labels.txt belongs to line i of classes.txt."""
    classes = [text for _, text in _lines(meta / "classes.txt")]
    names = [text for _, text in _lines(meta / "labels.txt")]
    if len(classes) != len(names) or not classes:
        raise UserError(f"{meta}: classes.txt has {len(classes)} lines, labels.txt {len(names)}; they belong together")
    return dict(zip(classes, names, strict=True))


def _part(root: Path, part: str, labels: dict[str, str]) -> dict[str, Path]:
    """Key `class/id` -> picture, for one of the two parts."""
    path = root / "meta" / f"{part}.txt"
    files: dict[str, Path] = {}
    for number, key in _lines(path):
        if "/" not in key or _class_of(key) not in labels:
            raise UserError(f"{path}:{number}: {key!r} is not class/id with a class of classes.txt")
        files[key] = below(root / "images", key + ".jpg", f"{path}:{number}")
    return files


def _cut(keys: dict[str, Path], count: int | None) -> list[str]:
    """At most `count` keys of each class, first by hash order."""
    by_class = groupby(sorted(keys), key=_class_of)
    return [key for _, group in by_class for key in sorted(group, key=order)[:count]]


def _lines(path: Path) -> list[tuple[int, str]]:
    """(number, text) of the lines that are not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; data.classes.root must be in the Food-101 layout") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}; save it as UTF-8") from None
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
