"""Labelled pictures in a plain folder of class folders; the folder's name is the display name."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UserError
from pipeline.sources.manifest import Row, order, share, warn

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
TEST = 0.15


def read(root: Path, validation: float, count: int | None) -> list[Row]:
    """One row per picture below each class folder; 15 % test, `validation` val, the rest train, by hash of the id.

    `count` keeps at most that many pictures per class. The id is the path below `root`. Raises UserError if there is
    no class folder.
    """
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if not folders:
        raise UserError(f"{root}: no class folder in it; data.classes.root must hold one folder of pictures per class")
    return [row for folder in folders for row in _class_rows(root, folder, validation, count)]


def _class_rows(root: Path, folder: Path, validation: float, count: int | None) -> list[Row]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    pictures = {path.relative_to(root).as_posix(): path for path in files if path.suffix.lower() in SUFFIXES}
    if len(pictures) < len(files):
        warn(f"{folder}: {len(files) - len(pictures)} files without a picture's suffix left out")
    label = " ".join(folder.name.replace("_", " ").replace("-", " ").split())
    kept = sorted(pictures, key=order)[:count]
    return [Row(key, pictures[key], [label], label, split_of(key, validation)) for key in kept]


def split_of(key: str, validation: float) -> str:
    """train, val or test (15 %; val: `validation` of all) by the hash of the key."""
    place = share(key)
    return "test" if place < TEST else "val" if place < TEST + validation else "train"
