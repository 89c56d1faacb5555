"""Captions of held-out pictures, before and after fine-tuning, and a count of those that name a right thing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch

from pipeline.store.reader import ImageTokens

COMMON = 0.1
"""A word in the captions of more than this share of pictures (a, on, background) is no thing of a picture."""


def choose(images: ImageTokens, count: int, seed: int) -> list[int]:
    """A seeded choice of test pictures."""
    test = images.split("test")
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(test[i] for i in order[:count])


class Things:
    """Which words are the things of a picture: those that most of its captions use and most pictures' do not."""

    def __init__(self, captions: Sequence[Sequence[str]]):
        counts = Counter(word for texts in captions for word in {w for text in texts for w in words(text)})
        self._common = {word for word, count in counts.items() if count > COMMON * len(captions)}

    def of(self, references: Sequence[str]) -> set[str]:
        """The things of one picture, from its reference captions."""
        counts = Counter(word for text in references for word in words(text))
        return {word for word, count in counts.items() if 2 * count > len(references)} - self._common

    def names_one(self, text: str, references: Sequence[str]) -> bool:
        """Whether a caption names at least one of them."""
        return not self.of(references).isdisjoint(words(text))

    def share(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """The share of captions that do."""
        return sum(map(self.names_one, texts, references)) / len(texts)


def words(text: str) -> set[str]:
    """Lower-case words, a plural s cut off."""
    return {re.sub(r"(?<=[a-z]{2}[^s])s$", "", word) for word in re.findall(r"[a-z]+", text.lower())}
