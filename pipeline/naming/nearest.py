"""The nearest class name by Earth Mover's Distance, without the LLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from pipeline.transport.costs import Cost
from pipeline.transport.emd import emd

if TYPE_CHECKING:
    from pipeline.adapters.module import Adapter
    from pipeline.objectives.emd import EMD

PART = 64  # pictures at a time


@dataclass(frozen=True)
class Nearest:
    """The names of C classes as the words [T, D] that EMD measures on, and how far pictures are from each on average.

    `weights` [T] float32 on the CPU; name c is words[offsets[c]:offsets[c + 1]]; `bias` [C] is subtracted (debiased: a
    name of frequent words is near every picture); `into_space` [D, D] is the objective's, or None.
    """

    words: Tensor
    weights: Tensor
    offsets: list[int]
    center: Tensor
    into_space: Tensor | None
    bias: Tensor
    cost: str
    unmatched: float
    threads: int = 1

    @classmethod
    def of(cls, objective: EMD, names: Sequence[list[int]]) -> Nearest:
        """Of an objective, and names as rows of its table of words; nothing is subtracted yet."""
        ground, own = objective.ground, objective.settings
        words = ground.words_of(names)
        return cls(
            words.places, words.weights, words.offsets, ground.center, ground.into_space,
            torch.zeros(len(names)), own.cost, own.unmatched, objective.means.threads,
        )  # fmt: skip

    def debiased(self, adapted: Callable[[list[int]], Tensor], positions: list[int]) -> Nearest:
        """With what some pictures are off on average subtracted; `adapted` gives their tokens [B, M, D]."""
        return replace(self, bias=-many(self.scores, adapted, positions).mean(0) + self.bias)

    @torch.no_grad()
    def scores(self, tokens: Tensor) -> Tensor:
        """Minus the debiased EMD to each name, [B, C] on the CPU, from adapted tokens [B, M, D]."""
        placed = tokens if self.into_space is None else tokens @ self.into_space.to(tokens.device)
        found = emd(
            placed, self.words.to(tokens.device), self.offsets, None, cost=cast(Cost, self.cost),
            word_weights=self.weights, center=self.center.to(tokens.device), unmatched=self.unmatched,
            threads=self.threads,
        )  # fmt: skip
        return self.bias - found.view(len(tokens), -1).cpu()


def many(scores: Callable[[Tensor], Tensor], tokens: Callable[[list[int]], Tensor], positions: list[int]) -> Tensor:
    """Scores of many pictures, part by part: [n, C]."""
    return torch.cat([scores(tokens(positions[at : at + PART])) for at in range(0, len(positions), PART)])


def adapted_by(adapter: Adapter, tokens: Callable[[list[int]], Tensor]) -> Callable[[list[int]], Tensor]:
    """The adapted tokens of some pictures, without a gradient."""

    @torch.no_grad()
    def adapted(positions: list[int]) -> Tensor:
        found: Tensor = adapter(tokens(positions))
        return found

    return adapted
