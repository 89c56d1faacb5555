"""Whether a picture is like those that a model was trained on."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.extraction.near import read_sample
from pipeline.runs import Run
from pipeline.store.reader import training_digests

FEWEST = 20  # held-out pictures; fewer say nothing of what is usual
STRANGE = 0.99
MARGIN = 2  # over the number of held-out pictures: by this share further than any of them is strange, if few they are


@dataclass(frozen=True)
class Familiar:
    """How far pictures are from the nearest training picture, set beside held-out ones of the same data sets.

    Distances are 1 - cosine of mean tokens, to the nearest (Sun et al. 2022, "Out-of-Distribution Detection with Deep
    Nearest Neighbors", with k = 1 and at most 1,000). What it finds, and misses: docs/benchmarks.md. Less the mean of
    all, with k = 5, or by Mahalanobis distance it found as many or fewer.

    1 - strangeness is the p-value of conformal prediction (Vovk et al. 2005): of m < 99 held-out pictures not even the
    furthest is strange. What lies beyond it by 2 / m of its distance is, too: with m = 20 that were 0.5 to 2.1 % of a
    data set's own pictures, with m = 50 0.4 to 1.4 %.
    """

    known: Tensor
    """Mean tokens of training pictures, of length 1: [n, D]."""
    usual: Tensor
    """Distances of held-out pictures, in their order: [m]."""

    @classmethod
    def of(cls, run: Run, sets: list[str]) -> Familiar:
        """Of some data sets whose images are extracted.

        Raises UserError when they are not, or too few pictures are held out.
        """
        samples = [read_sample(run, data) for data in sets]
        known, held_out = (torch.cat([sample[key] for sample in samples]) for key in ("known", "held_out"))
        if not len(known) or len(held_out) < FEWEST:
            what = f"{len(held_out)} pictures are held out, fewer than the {FEWEST} that tell what is usual"
            raise UserError("", what if len(known) else "there are no training pictures")
        return cls(known, distances(held_out, known).sort().values)

    def strangeness(self, tokens: Tensor) -> list[float]:
        """Of pictures, tokens [B, N, D]: the share of m held-out ones that are nearer to a training picture, of m + 1.

        Of one that is further than any of these by a share of MARGIN / m it is 1.
        """
        return self.of_means(torch.nn.functional.normalize(tokens.float().mean(1), dim=1))

    def of_means(self, pictures: Tensor) -> list[float]:
        """The same from mean tokens of length 1, [B, D]."""
        found = distances(pictures, self.known)
        shares = torch.searchsorted(self.usual, found).double() / (len(self.usual) + 1)
        told: list[float] = shares.where(found <= (1 + MARGIN / len(self.usual)) * self.usual[-1], 1.0).tolist()
        return told


def unlike(adapter: str, strangeness: float | None) -> str:
    """What is said of an answer about a strange picture."""
    held_out = "any" if strangeness is None or strangeness > 0.9995 else f"{100 * strangeness:.1f} %"
    known = f"the pictures that {adapter} was trained on for this (further from them than {held_out} of those held out)"
    return f"unlike {known}: expect nothing of the answer"


def familiar_with(run: Run, sets: list[str]) -> Familiar | None:
    """The same, or None where it cannot be told, and why on stderr."""
    try:
        return Familiar.of(run, sets)
    except UserError as fault:
        print(f"whether pictures are like those trained on is not told: {fault}", file=sys.stderr)
        return None


def digests_of(params: Params) -> set[str] | None:
    """SHA-256 of the files that a run trains on, or None where a list of them cannot be read, and why on stderr."""
    sets = {data for name in params.run.adapters for data in params.pretrain_for(name).data}
    sets |= {data for recipe in params.run.recipes for data in params.finetune.recipes[recipe].data}
    try:
        return {digest for data in sorted(sets) for digest in training_digests(Run.of(params), data)}
    except UserError as fault:
        print(f"whether pictures were trained on is not told: {fault}", file=sys.stderr)
        return None


def distances(pictures: Tensor, known: Tensor) -> Tensor:
    """1 - cosine of mean tokens, to the nearest known one: [B]."""
    return 1 - (pictures @ known.T).amax(1)
