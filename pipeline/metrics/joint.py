"""Test pictures in the space that an encoder's two towers share, computed once for all adapters."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.devices import pick_device
from pipeline.encoders.base import Encoder
from pipeline.encoders.vision import TwoTowers
from pipeline.extraction.reading import batches
from pipeline.metrics.base import Tested
from pipeline.progress import progress_bar
from pipeline.training.checkpoint import Checkpoint


def pictures_of(tested: Tested, towers: TwoTowers, positions: list[int]) -> Tensor:
    """Embeddings float32 [n, E] of some pictures of a data set, read and prepared as extraction does it.

    Raises UserError as extraction does, naming a picture that is gone or has changed since.
    """
    params, data, run = tested.params, tested.data, tested.run
    rows = tested.images.rows.iloc[positions]
    decoder = Encoder.of(params.vision).decoder(towers.preprocess, pick_device(params.runtime.device))
    decides = [*sorted({**towers.identity, **decoder.identity}.items()), params.vision.batch, list(rows["id"])]
    kept = Checkpoint.of(run, f"joint-{data}", decides, [run.manifest(data)], __name__)
    state = kept.load()
    if state is None:
        found = []
        with progress_bar(f"{data}: test pictures and texts", len(rows), "pictures") as advance:
            for pixels, count in batches(rows, decoder, params.vision.batch, params.runtime.decode_threads):
                found.append(towers.pictures(pixels)[:count])
                advance(count)
        state = {"pictures": torch.cat(found)}
        kept.save(state)
    pictures: Tensor = state["pictures"]
    return pictures
