"""What objectives without transport share: captions as bags of weighed words, and distances between two bags."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from pydantic import Field

from pipeline.config.schema import ObjectiveSettings
from pipeline.objectives.base import Captions, Objective
from pipeline.objectives.emd import EMD, ClosedForm, EMDSettings, Start

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.adapters.module import Adapter

SAMPLED = 1000  # words at most that scales are measured on
EXACT = "donot_use_mm_for_euclid_dist"  # squares that cancel would leave no distance between a point and itself


class BagSettings(ObjectiveSettings):
    """The keys of EMD that make sense without transport."""

    word_weights: Literal["uniform", "idf", "idf_squared"] = "uniform"
    start: Start = Field("random", description="as EMD's, so that objectives start alike")
    closed_form: ClosedForm = "best"


class Bags(NamedTuple):
    """Captions as bags of words, each filled up with words of no weight."""

    rows: Tensor  # [P, W] int64, of the table
    weights: Tensor  # [P, W] float32, sum to 1 in each caption


class BagObjective(Objective):
    """An objective that sees all words of a caption at once; it starts where EMD does, if asked to."""

    Settings: ClassVar[type[ObjectiveSettings]] = BagSettings
    settings: BagSettings

    @cached_property
    def emd(self) -> EMD:
        """Plain EMD with the same words and start."""
        own = self.settings.model_dump(include={"word_weights", "start", "closed_form"})
        return EMD(EMDSettings.model_validate({"cost": "euclidean"} | own), self.pairs, self.means)

    def initialise(self, adapter: Adapter, tokens: Tensor) -> None:
        self.emd.initialise(adapter, tokens)

    def bags(self, captions: Captions) -> Bags:
        """Captions as bags, on the table's device."""
        from torch.nn.utils.rnn import pad_sequence

        from pipeline.devices import to_device

        words, lengths = self.emd.ground.words_of(captions), [len(caption) for caption in captions]
        weights = pad_sequence(words.weights.split(lengths), batch_first=True)
        weights = to_device(weights / weights.sum(1, keepdim=True), self.pairs.device)
        return Bags(pad_sequence(words.rows.split(lengths), batch_first=True), weights)


class BetweenBags(BagObjective):
    """A distance made of one between the two sides, less the mean of those of each side to itself.

    One is a class with `between`. Both sides are points with weights; the distance of a side to itself is then 0.
    """

    @abstractmethod
    def between(self, apart: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """What is between two sides of weights a [P, N] and b [P, W] by their distances [P, N, W]: [P]."""

    def to_itself(self, apart: Tensor, a: Tensor) -> Tensor:
        """The same of a side and itself: for one that has a quicker way."""
        return self.between(apart, a, a)

    def distances(self, tokens: Tensor, captions: Captions, image: Sequence[int]) -> Tensor:
        import torch

        bags, at = self.bags(captions), torch.as_tensor(image, device=tokens.device)
        apart = torch.cdist(tokens[at], self.pairs.table[bags.rows], compute_mode=EXACT)
        mass = _alike(tokens)
        own = self._own(tokens, mass)[at] + self._own(self.pairs.table[bags.rows], bags.weights)
        return self.between(apart, mass[at], bags.weights) - own / 2

    def all_distances(self, tokens: Tensor, captions: Captions) -> Tensor:
        import torch

        bags, mass = self.bags(captions), _alike(tokens)
        words = self.pairs.table[bags.rows]
        count, (others, slots) = len(tokens), bags.rows.shape
        apart = torch.cdist(tokens.flatten(0, 1), words.flatten(0, 1), compute_mode=EXACT)
        apart = apart.view(count, -1, others, slots).transpose(1, 2).flatten(0, 1)
        found = self.between(apart, mass.repeat_interleave(others, 0), bags.weights.repeat(count, 1))
        own = self._own(tokens, mass)[:, None] + self._own(words, bags.weights)
        return found.view(count, others) - own / 2

    def _own(self, points: Tensor, weights: Tensor) -> Tensor:
        import torch

        return self.to_itself(torch.cdist(points, points, compute_mode=EXACT), weights)

    def distances_of_words(self) -> Tensor:
        """Distances between (a sample of) the words of the training captions, each pair once."""
        import torch

        used = self.pairs.document_frequencies(self.pairs.train).nonzero()[:, 0]
        some = used[:: -(-len(used) // SAMPLED)]
        return torch.pdist(self.pairs.table[some.to(self.pairs.device)])


def _alike(tokens: Tensor) -> Tensor:
    """The weights of an image's tokens, [B, N]."""
    return tokens.new_full(tokens.shape[:2], 1 / tokens.shape[1])
