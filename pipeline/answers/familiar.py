"""Whether a picture is like those that a model was trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.runs import Run
from pipeline.store.reader import ImageTokens

KNOWN, HELD_OUT = 1000, 500  # pictures looked at: of a large data set every so manyth
FEWEST = 20  # held-out pictures; fewer say nothing of what is usual
STRANGE = 0.99


@dataclass(frozen=True)
class Familiar:
    """How far pictures are from the nearest training picture, set beside held-out ones of the same data sets.

    Distances are 1 - cosine of mean tokens, to the nearest (Sun et al. 2022, "Out-of-Distribution Detection with Deep
    Nearest Neighbors", with k = 1 and at most 1,000). What it finds, and misses: docs/benchmarks.md. Less the mean of
    all, with k = 5, or by Mahalanobis distance it found as many or fewer.
    """

    known: Tensor
    """Mean tokens of training pictures, of length 1: [n, D]."""
    usual: Tensor
    """Distances of held-out pictures, in their order: [m]."""

    @classmethod
    def of(cls, run: Run, sets: list[str]) -> Familiar | None:
        """Of some data sets whose image tokens are in the store; None where too few pictures are held out.

        Raises UserError when there are no tokens.
        """
        images = [ImageTokens.open(run, data) for data in sets]
        known, held_out = (
            torch.cat([means(some, parts, most) for some in images])
            for parts, most in ((("train",), KNOWN), (("val", "test"), HELD_OUT))
        )
        if not len(known) or len(held_out) < FEWEST:
            return None
        return cls(known, distances(held_out, known).sort().values)

    def strangeness(self, tokens: Tensor) -> list[float]:
        """Of pictures, tokens [B, N, D]: the share of held-out pictures that are nearer to a training picture."""
        return self.of_means(_unit(tokens))

    def of_means(self, pictures: Tensor) -> list[float]:
        """The same from mean tokens of length 1, [B, D]."""
        nearer: list[int] = torch.searchsorted(self.usual, distances(pictures, self.known)).tolist()
        return [count / len(self.usual) for count in nearer]


def means(images: ImageTokens, parts: tuple[str, ...], most: int) -> Tensor:
    """Mean tokens, of length 1, of at most so many pictures of some parts."""
    at = [position for part in parts for position in images.split(part)]
    at = at[:: -(-len(at) // most) or 1]
    found = [_unit(images.tokens(at[i : i + 64])) for i in range(0, len(at), 64)]
    return torch.cat(found) if found else torch.zeros(0, images.shape[-1])


def _unit(tokens: Tensor) -> Tensor:
    return torch.nn.functional.normalize(tokens.float().mean(1), dim=1)


def distances(pictures: Tensor, known: Tensor) -> Tensor:
    """1 - cosine of mean tokens, to the nearest known one: [B]."""
    return 1 - (pictures @ known.T).amax(1)
