"""Stage extract_images@<data>."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.params import Dataset, load_params
from stages import timed


def extract_images(data: Annotated[Dataset, typer.Argument(help="captions or classes.")]) -> None:
    """Run the frozen vision encoder over all pictures once and keep their image tokens in data/store.

    Writes data/<profile>/images/<data>/manifest.json, which names the shards. Shards that exist are not computed
    again, so an interrupted run goes on, and switching encoders and back costs nothing.
    """
    params = load_params()
    with timed(params, f"extract_images@{data}"):
        from pipeline import sources
        from pipeline.backbones.vision import load_vision_encoder
        from pipeline.extract import extract_images
        from pipeline.progress import progress_bar
        from pipeline.store.reader import usable_rows

        base = Path("data") / params.profile
        sources.ensure_rendered(params, data)  # DVC may have restored the manifest alone
        encoder = load_vision_encoder(params.vision, params.runtime.device)
        with progress_bar(f"image tokens of {data}", len(usable_rows(base, data)), "images") as advance:
            manifest = extract_images(params, data, encoder, advance)
        manifest.write(base / "images" / data / "manifest.json")
