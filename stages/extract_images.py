"""Stage extract_images@<data>."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.params import Dataset, Params, load_params
from stages import timed

if TYPE_CHECKING:
    from pipeline.store.shards import Manifest


def extract_images(data: Annotated[Dataset, typer.Argument(help="captions or classes.")]) -> None:
    """Run the frozen vision encoder over all pictures once and keep their image tokens in data/store.

    Writes data/<profile>/images/<data>/manifest.json, which names the shards. Shards that exist are not computed
    again, so an interrupted run goes on, and switching encoders and back costs nothing; of a shard that changed, only
    the pictures that changed are encoded.
    """
    params = load_params()
    with timed(params, f"extract_images@{data}"):
        from pipeline.store.shards import in_use, manifest_path

        with in_use():
            make(params, data).write(manifest_path(Path("data") / params.profile, "images", data))


def make(params: Params, data: Dataset, repair: Manifest | None = None) -> Manifest:
    """The features of a data set, in the store; `repair`: the manifest whose missing shards to make."""
    from pipeline import sources
    from pipeline.backbones.vision import load_vision_encoder
    from pipeline.extract import extract_images
    from pipeline.progress import progress_bar
    from pipeline.store.reader import usable_rows

    sources.ensure_rendered(params, data)  # DVC may have restored the manifest alone
    encoder = load_vision_encoder(params.vision, params.runtime.device)
    rows = usable_rows(Path("data") / params.profile, data)
    with progress_bar(f"image tokens of {data}", len(rows), "images") as advance:
        return extract_images(params, data, encoder, advance, repair)
