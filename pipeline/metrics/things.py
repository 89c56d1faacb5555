"""Things that captions name, held against what the references name, and captions that repeat themselves."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pipeline.metrics.base import Figure, Metric, Tested, redrawn, share_of

if TYPE_CHECKING:
    import pandas as pd

COMMON = 0.1
"""A word in the captions of more than this share of pictures (a, on, background) is no thing of a picture."""

FEWEST = 10
"""Fewer pictures with things say nothing: none named of so many, and the share may still be 30 % (3 of n)."""

RUN = 4
"""So many words said twice are a repetition. Three are none: "is at the top and ... is at the bottom"."""


class Judged(NamedTuple):
    """How many things a caption names rightly, wrongly and not at all, and whether it repeats itself."""

    right: int
    wrong: int
    missed: int
    repeats: bool


class NamedThings(Metric):
    """f1, precision and recall of the things that captions name; repeats: the share that say something twice; and
    *_unseen, of the pictures with a thing that stands in no training caption, where there are any. Where fewer than
    FEWEST pictures have a thing in their references, how many do is all that is said of things.

    All pictures' things are counted together (micro): each thing weighs alike, and a caption that names none has its
    place. Intervals are those of drawing the pictures anew (Efron's bootstrap, 1979).
    """

    tasks = ("caption",)

    def figures(self, tested: Tested) -> list[Figure]:
        rows = tested.predictions
        references = list(rows["references"])
        things = Things([list(texts) for texts in tested.images.rows["captions"]])
        train = tested.images.rows["captions"].iloc[tested.images.split("train")]
        own = [things.repeats(text) for texts in references for text in texts]
        repeats = {column: [things.repeats(text) for text in rows[column]] for column in ("finetuned", "pretrained")}
        told = sum(bool(things.of(texts)) for texts in references)
        few = f"test pictures with things in their references, too few for F1 (it takes {FEWEST})"
        measured, new = [Figure("things", told, few, kind="count", baseline=True)], list[Figure]()
        if told >= FEWEST:
            measured, new = _named(things, rows, references), unseen(things, train, references, rows["finetuned"])
        return [
            *measured,
            share_of("repeats", repeats["finetuned"], "captions that repeat themselves"),
            share_of("repeats_pretrained", repeats["pretrained"], "the same before fine-tuning"),
            share_of("repeats_references", own, "references that repeat themselves", baseline=True),
            Figure("captioned", len(rows), "captioned test pictures", kind="count"),
            *new,
        ]


def _named(things: Things, rows: pd.DataFrame, references: list[Sequence[str]]) -> list[Figure]:
    """How far captions name the things of their own picture, and of another."""

    def judged(column: str, of: Sequence[Sequence[str]]) -> list[Judged]:
        return [things.judge(text, texts) for text, texts in zip(rows[column], of, strict=True)]

    after, before = judged("finetuned", references), judged("pretrained", references)
    others = judged("finetuned", [*references[1:], references[0]])
    return [
        f_score("f1", after, 1, 1, "things named, F1"),
        f_score("precision", after, 1, 0, "named things that are there"),
        f_score("recall", after, 0, 1, "things there that are named"),
        f_score("f1_pretrained", before, 1, 1, "F1 before fine-tuning"),
        # The same captions held against the next picture's references: what saying likely things would get.
        f_score("f1_shuffled", others, 1, 1, "F1 against another picture's things"),
    ]


def unseen(
    things: Things, train: Iterable[Sequence[str]], references: Iterable[Sequence[str]], captions: Iterable[str]
) -> list[Figure]:
    """Of the pictures with a thing that no caption of `train` has a word for: are these things named, and all there?"""
    known = {word for texts in train for text in texts for word in spoken(text)}
    new, whole = [], []
    for own, text in zip(references, captions, strict=True):
        if never := things.of(own) - known:
            named = len(never & set(spoken(text)))
            new.append(Judged(named, 0, len(never) - named, False))
            whole.append(things.judge(text, own))
    if not new:
        return []
    return [
        f_score("recall_unseen", new, 0, 1, "things never captioned in training that are named"),
        f_score("f1_unseen", whole, 1, 1, "F1 on pictures with such things"),
        Figure("captioned_unseen", len(new), "test pictures with such things", kind="count"),
    ]


class Things:
    """Which words are the things of a picture: those that most of its captions use and most pictures' do not."""

    def __init__(self, captions: Sequence[Sequence[str]]):
        counts = Counter(word for texts in captions for word in {w for text in texts for w in spoken(text)})
        self._common = {word for word, count in counts.items() if count > COMMON * len(captions)}
        self._all = {word for texts in captions for word in self.of(texts)}

    def of(self, references: Sequence[str]) -> set[str]:
        """The things of one picture, from its reference captions."""
        counts = Counter(word for text in references for word in set(spoken(text)))
        return {word for word, count in counts.items() if 2 * count > len(references)} - self._common

    def judge(self, text: str, references: Sequence[str]) -> Judged:
        """A caption held against the references of its picture.

        Wrong is what is a thing of some picture and in no reference of this one; what only some name does not count.
        """
        here, said = self.of(references), set(spoken(text)) & self._all
        some = {word for reference in references for word in spoken(reference)}
        return Judged(len(said & here), len(said - some), len(here - said), self.repeats(text))

    def repeats(self, text: str) -> bool:
        """Whether a caption says the same thing twice, unless described otherwise, or the same RUN words twice.

        "A dog and a dog", "a dog and a brown dog" do; "a dog and a hot dog", "a red apple and a green apple" do not.
        """
        said = ["a" if word in ("an", "the") else word for word in spoken(text)]
        named = [pair for pair in zip(["a", *said], said, strict=False) if pair[1] in self._all]
        runs = [tuple(said[i : i + RUN]) for i in range(len(said) - RUN + 1)]
        plain = {word for before, word in named if before == "a"}
        same = [before == word or (before in self._common - {"a"} and word in plain) for before, word in named]
        return any(same) or len(set(named)) < len(named) or len(set(runs)) < len(runs)


def spoken(text: str) -> Iterator[str]:
    """Its lower-case words in their order, a plural s cut off."""
    for word in re.findall(r"[a-z]+", text.lower()):
        yield re.sub(r"(?<=[a-z]{2}[^s])s$", "", word)


def f_score(key: str, judged: Sequence[Judged], wrong: int, missed: int, label: str) -> Figure:
    """F1 over all pictures together; precision without what is missed, recall without what is wrong; 0 of nothing."""
    import numpy as np

    counts = np.array([row[:3] for row in judged], float)  # [pictures, 3]
    counts[:, 1:] *= (wrong, missed)
    counts[:, 0] *= wrong + missed
    sums = np.vstack([counts.sum(0), redrawn(len(counts)) @ counts])
    shares = sums[:, 0] / np.maximum(sums.sum(1), 1)
    low, high = np.quantile(shares[1:], (0.025, 0.975))
    return Figure(key, float(shares[0]), label, (float(low), float(high)))
