"""The contrast: a second loss, by how badly EMD tells the captions of a batch apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.devices import to_device
from pipeline.started import Started

if TYPE_CHECKING:
    from pipeline.objectives.emd import EMD

CONTRASTED = 32  # images of a batch at most: the contrast costs their number squared


def start_contrast(objective: EMD, tokens: Tensor, positions: list[int]) -> Started:
    """How badly EMD tells the captions of a batch apart: InfoNCE (van den Oord et al. 2018), started; a scalar.

    tokens [B, N, D] of the images at `positions`, one random caption each; both ways, from image to caption and from
    caption to image, as in CLIP (Radford et al. 2021). A caption that another image has too (a class name) is no wrong
    answer there.
    """
    positions = positions[:CONTRASTED]  # a batch is in random order
    count, of = len(positions), objective.pairs.captions
    captions = objective.pairs.one_caption_each(positions)
    distances = objective.start_distances(tokens[:count], captions, None)
    shared = [[i != j and captions[j] in of[p] for j in range(count)] for i, p in enumerate(positions)]
    no_answer = to_device(torch.tensor(shared), tokens.device)

    def cross_entropy(distances: Tensor) -> Tensor:
        logits = -distances.view(count, count) / objective.settings.temperature
        logits = logits.masked_fill(no_answer, -torch.inf)
        own = torch.arange(count, device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    return distances.then(cross_entropy)
