"""The best set of tokens that sees no image: a baseline, and where training may start."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.devices import exact_products
from pipeline.transport.emd import barycentric_weights

if TYPE_CHECKING:
    from pipeline.objectives.emd import EMD

SAMPLE, PART = 512, 128  # images that a constant set is fitted on, and how many at a time
NEARNESS = 0.2  # of its start to words: the share of the way from their mean
SETTLED = 2e-4  # a fit ends when its EMD falls by less than this share


def fit_constant_set(objective: EMD, count: int) -> Tensor:
    """The best image-blind set of `count` tokens on (a sample of) the training captions, [count, D].

    A free-support barycentre (Cuturi & Doucet 2014): exact plans and the tokens that are best for them take turns,
    until the EMD falls by less than SETTLED. It starts near the mean word, a little towards `count` frequent words: a
    token that is a word would stay there (Kuhn 1973).
    """
    pairs, generator = objective.pairs, torch.Generator().manual_seed(objective.means.seed)
    counts = torch.bincount(torch.tensor([r for i in pairs.train for c in pairs.captions[i] for r in c])).float()
    weight = counts * objective.ground.word_weights[: len(counts)]
    weight = weight if weight.any() else counts  # all pictures have the same words, such as the name of an only class
    start = torch.multinomial(weight, count, replacement=count > int((weight > 0).sum()), generator=generator)
    order = torch.randperm(len(pairs.train), generator=generator)[:SAMPLE].tolist()
    parts = [[pairs.train[i] for i in order[at : at + PART]] for at in range(0, len(order), PART)]
    mean = weight.to(pairs.device) @ pairs.table[: len(weight)] / weight.sum()
    best, tokens = float("inf"), torch.lerp(mean, pairs.table[start.to(pairs.device)], NEARNESS)
    while True:
        values, sums, weights = zip(*(_better(objective, tokens, part) for part in parts), strict=True)
        if sum(values) > (1 - SETTLED) * best:
            return tokens
        best, mass = sum(values), torch.stack(weights).sum(0)
        tokens = torch.where(mass > 0, torch.stack(sums).sum(0) / mass, tokens)


def _better(objective: EMD, tokens: Tensor, positions: list[int]) -> tuple[float, Tensor, Tensor]:
    """One set of tokens [M, D] against some images' captions: EMD summed over the images, and a better set.

    That is words' sums by weight, [M, D], and the weights' sums, [M, 1]: of several parts they add up.
    """
    pairs, ground, own = objective.pairs, objective.ground, objective.settings
    captions, index = pairs.captions_of(positions)
    words, image = ground.words_of(captions), torch.tensor(index, device=pairs.device)
    value, weights = barycentric_weights(
        ground.place(tokens), words.places, words.offsets, torch.bincount(image)[image].reciprocal(), cost=own.cost,
        word_weights=words.weights, center=ground.center, unmatched=own.unmatched, solver=own.solver,
        threads=objective.means.threads,
    )  # fmt: skip
    with exact_products():
        return value, weights @ pairs.table[words.rows], weights.sum(1, keepdim=True)
