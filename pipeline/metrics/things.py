"""Captions that name a right thing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from pipeline.metrics.base import Figure, Metric, Tested, share_of

COMMON = 0.1
"""A word in the captions of more than this share of pictures (a, on, background) is no thing of a picture."""


class NamedThings(Metric):
    """right: the share of captions that name at least one thing that most of the picture's references name."""

    tasks = ("caption",)

    def figures(self, tested: Tested) -> list[Figure]:
        rows = tested.predictions
        references = list(rows["references"])
        things = Things([list(texts) for texts in tested.images.rows["captions"]])

        def right(texts: Sequence[str], of: Sequence[Sequence[str]]) -> list[bool]:
            return list(map(things.names_one, texts, of))

        others = [*references[1:], references[0]]
        return [
            share_of("right", right(rows["finetuned"], references), "captions that name a right thing"),
            share_of("right_pretrained", right(rows["pretrained"], references), "the same before fine-tuning"),
            # The same captions held against the next picture's references: what saying likely things would get.
            share_of("right_shuffled", right(rows["finetuned"], others), "captions that name another picture's thing"),
            Figure("captioned", len(rows), "captioned test pictures", kind="count"),
        ]


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


def words(text: str) -> set[str]:
    """Lower-case words, a plural s cut off."""
    return {re.sub(r"(?<=[a-z]{2}[^s])s$", "", word) for word in re.findall(r"[a-z]+", text.lower())}
