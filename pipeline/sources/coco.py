"""Pictures with captions in the COCO layout: one JSON of images and annotations, one folder of pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.sources.manifest import Row, below, order, share, warn

TRAIN, VALIDATION = 0.70, 0.15  # the rest is the test part


def read(root: Path, captions: str, images: str, count: int | None) -> list[Row]:
    """One row per entry of "images" in root/captions, with all its captions; at most `count` of them.

    Raises UserError for JSON that is broken, lacks a key or lists an image twice. Annotations of unknown images are
    left out with a warning; images without a caption are quarantined.
    """
    path = root / captions
    content = _load(path)
    files = _image_files(path, _entries(path, content, "images"), root / images)
    texts = _captions_by_image(path, _entries(path, content, "annotations"), set(files))
    kept = sorted(files, key=order)[:count]
    return [_row(image_id, files[image_id], texts.get(image_id, [])) for image_id in kept]


def split_of(image_id: str) -> str:
    """train, val or test (70 : 15 : 15) by the hash of the id."""
    place = share(image_id)
    return "train" if place < TRAIN else "val" if place < TRAIN + VALIDATION else "test"


def _row(image_id: str, image: Path, captions: list[str]) -> Row:
    reason = None if captions else "no caption"
    return Row(image_id, image, captions, label=None, split=split_of(image_id), quarantine=reason)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; set data.captions.root and data.captions.captions") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}; save it as UTF-8") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object with images and annotations, found a {type(content).__name__}")
    return content


def _entries(path: Path, content: dict[str, Any], key: str) -> list[Any]:
    entries = content.get(key)
    if not isinstance(entries, list):
        raise UserError(f"{path}: no list {key!r}; a COCO captions file has the lists images and annotations")
    return entries


def _field(path: Path, where: str, entry: Any, key: str) -> Any:
    if not isinstance(entry, dict) or entry.get(key) is None:
        raise UserError(f"{path}: {where} has no {key!r}; add it or remove the entry")
    return entry[key]


def _text(path: Path, where: str, entry: Any, key: str) -> str:
    value = _field(path, where, entry, key)
    if not isinstance(value, str):
        raise UserError(f"{path}: {where}.{key} is {value!r}; it must be a string")
    return value


def _image_files(path: Path, entries: list[Any], folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for i, entry in enumerate(entries):
        where = f"images[{i}]"
        image_id = str(_field(path, where, entry, "id"))
        if image_id in files:
            raise UserError(f"{path}: {where} has the id {image_id} of an earlier image; ids must be unique")
        files[image_id] = below(folder, _text(path, where, entry, "file_name"), f"{path}: {where}.file_name")
    if not files:
        raise UserError(f"{path}: the list images is empty; nothing to prepare")
    return files


def _captions_by_image(path: Path, entries: list[Any], known: set[str]) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    strangers: list[str] = []
    for i, entry in enumerate(entries):
        image_id = str(_field(path, f"annotations[{i}]", entry, "image_id"))
        caption = _text(path, f"annotations[{i}]", entry, "caption").strip()
        if image_id not in known:
            strangers.append(image_id)
        elif caption:
            texts.setdefault(image_id, []).append(caption)
    if strangers:
        first = ", ".join(dict.fromkeys(strangers[:5]))
        warn(f"{path}: {len(strangers)} annotations name an image that is not listed (first ids: {first}); left out")
    return texts
