"""The loss of names: by how badly EMD tells the name of a picture's class from those of all classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.devices import to_device
from pipeline.started import Started

if TYPE_CHECKING:
    from pipeline.objectives.emd import EMD
    from pipeline.objectives.pairs import Names

NAMED = 256  # names of a data set at most: of more a random choice, with those of the batch


def start_names(objective: EMD, tokens: Tensor, positions: list[int]) -> Started:
    """Cross-entropy over minus the EMD to the names of all classes, started; a scalar, by the number of all pictures.

    tokens [B, N, D] of the images at `positions`; those whose data set has no names add nothing.
    """
    parts: list[Started] = []
    for names in objective.pairs.names:
        rows = [row for row, position in enumerate(positions) if position in names.of]
        if rows:
            parts.append(_start_of_one(objective, tokens[rows], [positions[row] for row in rows], names))
    return Started(lambda: sum((part.result().sum() for part in parts), tokens.new_zeros(())) / len(positions))


def _start_of_one(objective: EMD, tokens: Tensor, positions: list[int], names: Names) -> Started:
    """Cross-entropies of the pictures of one data set, [B]."""
    own = torch.tensor([names.of[position] for position in positions])
    chosen = torch.arange(len(names.captions))
    if len(chosen) > NAMED:
        chosen = torch.unique(torch.cat([own, torch.randperm(len(chosen))[:NAMED]]))
    places = to_device(torch.searchsorted(chosen, own), tokens.device)
    distances = objective.start_distances(tokens, [names.captions[i] for i in chosen.tolist()], None)
    temperature = objective.settings.temperature
    return distances.then(
        lambda found: F.cross_entropy(-found.view(len(own), -1) / temperature, places, reduction="none")
    )
