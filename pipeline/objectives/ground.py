"""What EMD measures on: where words and tokens lie, and what the words of a caption weigh."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.devices import exact_products, to_device
from pipeline.objectives.base import Captions
from pipeline.objectives.pairs import Pairs

if TYPE_CHECKING:
    from pipeline.objectives.emd import EMDSettings

WHITENING_RIDGE = 0.1  # of the mean variance


class CaptionWords(NamedTuple):
    """The words of some captions, one caption after the other."""

    rows: Tensor  # [T] int64, of the table
    places: Tensor  # [T, D]
    weights: Tensor  # [T] float32 on the CPU, not normalised
    offsets: list[int]  # caption p is from offsets[p] to before offsets[p + 1]


class Ground:
    """The space of an objective's costs, its centre of words, and the weights of words."""

    def __init__(self, settings: EMDSettings, pairs: Pairs):
        self.table, self.into_space = pairs.table, None
        self.word_weights = weights_of_words(settings.word_weights, pairs)
        counts = pairs.document_frequencies(pairs.train).to(pairs.device)
        if settings.space == "whitened":
            self.into_space = whitening(pairs.table, counts)
        self.words = self.place(self.table)
        self.center = counts @ self.words / counts.sum()

    def place(self, tokens: Tensor) -> Tensor:
        """Where tokens [..., D] of the LLM's embedding space lie."""
        if self.into_space is None:
            return tokens
        with exact_products():
            return tokens @ self.into_space

    def words_of(self, captions: Captions) -> CaptionWords:
        """The words of some captions; those of a caption of nothing but ubiquitous words weigh alike."""
        flat = [row for caption in captions for row in caption]
        lengths = torch.tensor([len(caption) for caption in captions])
        weights, caption_of = self.word_weights[flat], torch.repeat_interleave(torch.arange(len(captions)), lengths)
        mass = weights.new_zeros(len(captions)).index_add(0, caption_of, weights)
        weights = torch.where(mass[caption_of] > 0, weights, 1.0)
        rows = to_device(torch.tensor(flat), self.words.device)
        return CaptionWords(rows, self.words[rows], weights, np.cumsum([0, *map(len, captions)]).tolist())


def weights_of_words(kind: str, pairs: Pairs) -> Tensor:
    """The weight of each word in a caption's marginal, [T]: 1, or the (squared) inverse document frequency.

    Squared, as in a product of two tf-idf vectors (Salton & Buckley 1988), function words weigh next to nothing, so no
    token is spent on them. Frequencies are those of the first data set: names have no function words.
    """
    if kind == "uniform":
        return torch.ones(len(pairs.table))
    captioned = [position for position in pairs.train if position < pairs.first]
    idf = torch.log((len(captioned) + 1) / (pairs.document_frequencies(captioned) + 1))
    return idf.square() if kind == "idf_squared" else idf.clamp_min(0)  # rounding may leave log 1 below zero


def whitening(table: Tensor, counts: Tensor) -> Tensor:
    """The symmetric map [D, D] after which words spread alike in all directions: ZCA (Bell & Sejnowski 1997).

    table [T, D] are words, counts [T] how often each occurs. A tenth of the mean variance is added in every direction,
    since words may span fewer than D; the map keeps the words' total variance.
    """
    weights = counts / counts.sum()
    spread = (table - weights @ table).double() * weights.double().sqrt()[:, None]
    variances, axes = torch.linalg.eigh(spread.T @ spread)
    scales = (variances + WHITENING_RIDGE * variances.mean()).rsqrt()
    kept = variances.sum() / (variances * scales.square()).sum()
    return ((axes * (scales * kept.sqrt())) @ axes.T).to(table)
