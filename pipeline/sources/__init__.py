"""Data sets of every layout, read into one manifest: `prepare` is the whole of it.

A new layout is a module with a function that returns what it Found, and an entry in READERS.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from rich.progress import Progress

from pipeline.config.params import Dataset, Params
from pipeline.files import check_writable
from pipeline.sources import coco, food101, imagefolder, manifest, openmoji
from pipeline.sources import tars as webdataset
from pipeline.sources.manifest import SCHEMA, Found, check_splits, write

__all__ = [
    "READERS",
    "SCHEMA",
    "check_splits",
    "ensure_rendered",
    "manifest_path",
    "prepare",
    "quarantine_path",
    "write",
]

Reader = Callable[[Params, Progress], Found]


def _coco(params: Params, progress: Progress) -> Found:
    section = params.data.captions
    root = manifest.existing_folder(section.root, "data.captions.root")
    return coco.read(root, section.captions, section.images, section.count)


def _food101(params: Params, progress: Progress) -> Found:
    section = params.data.classes
    root = manifest.existing_folder(section.root, "data.classes.root")
    return food101.read(root, section.validation, section.count)


def _imagefolder(params: Params, progress: Progress) -> Found:
    section = params.data.classes
    root = manifest.existing_folder(section.root, "data.classes.root")
    return imagefolder.read(root, section.validation, section.count)


def _openmoji_scenes(params: Params, progress: Progress) -> Found:
    root = openmoji.render_scenes(params.seed, params.data.captions.count or 0, params.runtime.decode_threads, progress)
    return coco.read(root, "captions.json", "images", count=None)


def _openmoji_food(params: Params, progress: Progress) -> Found:
    root = openmoji.render_food(params.seed, params.data.classes.count or 0, params.runtime.decode_threads, progress)
    return food101.read(root, params.data.classes.validation, count=None)


def _captioned_shards(params: Params, progress: Progress) -> Found:
    section = params.data.captions
    return webdataset.read_captions(str(section.shards), section.count, params.runtime.decode_threads, progress)


def _labelled_shards(params: Params, progress: Progress) -> Found:
    section, workers = params.data.classes, params.runtime.decode_threads
    return webdataset.read_classes(str(section.shards), section.validation, section.count, workers, progress)


READERS: dict[Dataset, dict[str, Reader]] = {
    "captions": {"coco": _coco, "webdataset": _captioned_shards, "openmoji_scenes": _openmoji_scenes},
    "classes": {
        "food101": _food101,
        "imagefolder": _imagefolder,
        "webdataset": _labelled_shards,
        "openmoji_food": _openmoji_food,
    },
}


def prepare(params: Params, data: Dataset, progress: Progress | None = None) -> pa.Table:
    """The manifest of a data set (columns: SCHEMA, sorted by id), every picture checked by decoding it.

    Renders the pictures first where the source is a rendered one. Broken pictures are quarantined; these and whatever
    else is not used are counted and named on stderr, and quarantine_path lists all of it. Raises UserError for a fault
    in the data set, more broken pictures than max_broken allows, or a folder in data/ that can't be written to.
    """
    section = params.data.captions if data == "captions" else params.data.classes
    progress = progress or Progress(disable=True)
    listing = quarantine_path(params, data)
    for path in (manifest_path(params, data), listing):
        check_writable(path.parent)
    found = READERS[data][section.source](params, progress)
    return manifest.build(found, data, section.max_broken, params.runtime.decode_threads, progress, listing)


def ensure_rendered(params: Params, data: Dataset, progress: Progress | None = None) -> None:
    """Render the pictures of a rendered source if they are not there, e.g. after a manifest came from DVC's cache."""
    section = params.data.captions if data == "captions" else params.data.classes
    if section.source in ("openmoji_scenes", "openmoji_food"):
        READERS[data][section.source](params, progress or Progress(disable=True))


def manifest_path(params: Params, data: Dataset) -> Path:
    """Where stage prepare writes the manifest."""
    return Path("data") / params.profile / "prepare" / f"{data}.parquet"


def quarantine_path(params: Params, data: Dataset) -> Path:
    """Where `prepare` lists the pictures it left out, also when they are too many; not an output that DVC knows."""
    return Path("data") / params.profile / "quarantine" / f"{data}.csv"
