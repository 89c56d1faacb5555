"""Where the words of each pair stand in the cost matrix of its image: captions of an image stand side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.started import NoPlan
from pipeline.transport.plan import Plan


class Layout:
    """Places of the words of P pairs (image, caption) in costs [B, N, L], one column a word.

    Caption p is words offsets[p] to before offsets[p + 1], and image_index [P] names its image. None: each caption
    with each image, all captions of the first image first; pairs and words are then counted as if each image had
    captions of its own. Raises ValueError naming the pair when a caption has no words.
    """

    offsets: np.ndarray  # [P + 1] int64
    image: np.ndarray  # [P] int64, of each pair
    length: np.ndarray  # [P] int64, words of each pair
    column: np.ndarray  # [P] int64, of a pair's first word in the costs of its image

    def __init__(self, offsets: Sequence[int], image_index: Sequence[int] | None, images: int):
        self.images, self.shared = images, image_index is None  # whether images share the words
        if image_index is None:
            ends = np.asarray(offsets[1:]) + offsets[-1] * np.arange(images)[:, None]
            image_index, offsets = np.repeat(np.arange(images), len(offsets) - 1).tolist(), [0, *ends.ravel().tolist()]
        self.offsets, self.image = np.asarray(offsets, np.int64), np.asarray(image_index, np.int64)
        self.length = np.diff(self.offsets)
        if (self.length < 1).any():
            raise ValueError(f"EMD of pair {self.length.argmin()}: the caption has no words")
        used = np.bincount(self.image, self.length, images).astype(np.int64)  # columns of each image
        self.slots = int(used.max())
        order = np.argsort(self.image, kind="stable")  # pairs by image
        self.column = np.empty_like(self.image)
        self.column[order] = np.cumsum(self.length[order]) - self.length[order]
        self.column -= (np.cumsum(used) - used)[self.image]
        self._column_of_word = np.arange(self.offsets[-1]) - np.repeat(self.offsets[:-1] - self.column, self.length)

    def word_at(self) -> np.ndarray:
        """The word of each column of an image [B, L], -1 where an image has fewer; [1, L] when images share them."""
        if self.shared:
            return np.arange(self.slots)[None]
        word_at = np.full((self.images, self.slots), -1)
        word_at[np.repeat(self.image, self.length), self._column_of_word] = np.arange(self.offsets[-1])
        return word_at

    def places(self, plan: Plan, tokens: int) -> np.ndarray:
        """Of a plan's entries in the flattened costs [B, N, L], N being `tokens`."""
        return (self.image[plan.pair] * tokens + plan.token) * self.slots + self._column_of_word[plan.word]

    def word_mass(self, weights: np.ndarray | None, unmatched: float) -> np.ndarray:
        """Mass of all words, float64, by their weights [T] or alike: [sum of length], not normalised.

        With unmatched mass each caption's words sum to the rest, and a dummy word of `unmatched` is behind them.
        Raises ValueError naming the pair when weights are not finite, negative, or all zero.
        """
        mass = np.ones(self.offsets[-1])
        if weights is not None:
            mass = np.tile(weights, self.images if self.shared else 1).astype(np.float64)
        least, sums = np.minimum.reduceat(mass, self.offsets[:-1]), np.add.reduceat(mass, self.offsets[:-1])
        bad = ~((least >= 0) & (sums > 0) & (sums < np.inf))
        if bad.any():
            raise self.error(int(bad.argmax()), "weights have to be finite, not negative, and not all zero", ValueError)
        if not unmatched:
            return mass
        with_dummies = np.full(len(mass) + len(self.length), unmatched)
        own = np.arange(len(mass)) + np.repeat(np.arange(len(self.length)), self.length)
        with_dummies[own] = mass / np.repeat(sums, self.length) * (1 - unmatched)
        return with_dummies

    def spans(self, count: int) -> list[tuple[int, int]]:
        """The pairs in at most `count` runs (first, last + 1) that take about equally long to solve."""
        if count == 1:
            return [(0, len(self.length))]
        work = np.cumsum(self.length)
        ends = np.searchsorted(work, work[-1] * np.arange(1, count + 1) / count)
        ends = np.unique(np.minimum(ends + 1, len(work)))
        return list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))

    def error(self, pair: int, why: str, kind: type[ValueError] = NoPlan) -> ValueError:
        """What is raised when a pair has no plan."""
        return kind(f"EMD of pair {pair} (image {self.image[pair]}): {why}")
