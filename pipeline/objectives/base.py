"""What every objective is: distances between an image's tokens and captions, and what is made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.config.schema import ObjectiveSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipeline.adapters.module import Adapter
    from pipeline.llms.load import LanguageModel
    from pipeline.objectives.pairs import Pairs
    from pipeline.started import Started

Captions = Sequence[list[int]]  # each as rows of the table of words
PART = 32  # held-out images at a time
Keep = Callable[[str, Sequence[object], Callable[[], "Tensor"]], "Tensor"]


def at_once(name: str, decides: Sequence[object], compute: Callable[[], Tensor]) -> Tensor:
    """Keep nothing."""
    return compute()


@dataclass(frozen=True)
class Means:
    """What an objective may use besides the pairs.

    `threads` of the CPU. `keep` gives a tensor by a name: computed, unless another run with the same data and seed has,
    and the same values that `decide` it. `llm` is there for an objective that needs it: frozen, in eval mode.
    """

    seed: int = 0
    threads: int = 1
    keep: Keep = at_once
    llm: LanguageModel | None = None


class Objective(ABC):
    """A loss between image tokens and captions, and the measure of the held-out figures.

    One of an own package is a class with `distances`, and with `Settings` where it has keys of its own. Tokens
    [B, N, D] are those that the adapter gives; positions are those of pictures in `pairs`.
    """

    Settings: ClassVar[type[ObjectiveSettings]] = ObjectiveSettings
    needs_llm: ClassVar[bool] = False
    # What an objective learns besides the adapter: trained, checkpointed and switched to eval mode with it, then left.
    module: nn.Module | None = None

    def __init__(self, settings: Any, pairs: Pairs, means: Means | None = None):
        self.settings, self.pairs, self.means = settings, pairs, means or Means()
        self.in_flight = 1  # batches that may have been started before the first is finished

    @property
    def llm(self) -> LanguageModel:
        """The frozen LLM of an objective with `needs_llm`."""
        assert self.means.llm is not None, "an objective that uses the LLM says so by needs_llm"
        return self.means.llm

    @abstractmethod
    def distances(self, tokens: Tensor, captions: Captions, image: Sequence[int]) -> Tensor:
        """How far P captions are from their images, [P], differentiable in the tokens; image [P] are rows of these."""

    def start_distances(self, tokens: Tensor, captions: Captions, image: Sequence[int]) -> Started:
        """The same, started: for an objective that has something done elsewhere meanwhile."""
        from pipeline.started import Started

        found = self.distances(tokens, captions, image)
        return Started(lambda: found)

    def all_distances(self, tokens: Tensor, captions: Captions) -> Tensor:
        """How far each of C captions is from each of B images, [B, C]."""
        image = [i for i in range(len(tokens)) for _ in captions]
        return self.distances(tokens, [*captions] * len(tokens), image).view(len(tokens), -1)

    def start(self, tokens: Tensor, positions: list[int]) -> Started:
        """Start the loss of a batch, a scalar; all that is random is drawn here, and not when the result is asked for.

        Here the mean over the images of the mean over their captions.
        """
        return self.start_per_image(tokens, positions).then(lambda values: values.mean())

    def start_per_image(self, tokens: Tensor, positions: list[int]) -> Started:
        """Start the distances of some images, [B], each averaged over the captions of the picture at its position.

        tokens [B, N, D] may be of other images, or [1, N, D] the same for all.
        """
        captions, image = self.pairs.captions_of(positions)
        distances = self.start_distances(tokens, captions, image if len(tokens) > 1 else [0] * len(image))
        return distances.then(self.pairs.mean_by_image(image))

    def held_out(self, tokens: Callable[[list[int]], Tensor]) -> Tensor:
        """Distances of the held-out images, [V], without a gradient; `tokens` gives those of some positions."""
        import torch

        val = self.pairs.val
        parts = [val[at : at + PART] for at in range(0, len(val), PART)]
        with torch.no_grad():
            return torch.cat([self.start_per_image(tokens(part), part).result() for part in parts])

    def initialise(self, adapter: Adapter, tokens: Tensor) -> None:  # noqa: B027
        """Set where an adapter starts, in place; tokens [B, N, D_img] are a sample of its input. Here: at random."""

    def baselines(self, count: int) -> dict[str, float]:
        """Figures of what sees no image, with `count` tokens as the adapter gives; they stand beside all others."""
        return {}
