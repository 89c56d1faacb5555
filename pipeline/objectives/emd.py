"""EMD between an image's tokens and a caption's words, its contrast and its starts (docs/emd.md)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pipeline.config.base import AboveZero, NotNegative, Share
from pipeline.config.schema import ObjectiveSettings
from pipeline.objectives.base import Captions, Means, Objective

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.adapters.module import Adapter
    from pipeline.objectives.ground import Ground
    from pipeline.objectives.pairs import Pairs
    from pipeline.started import Started


Start = Literal["random", "constant_set", "closed_form"]
ClosedForm = Literal["best", "ridge", "procrustes", "cca"]


class EMDSettings(ObjectiveSettings):
    """EMD with this ground cost, marginal, start and solver."""

    cost: Literal["euclidean", "sqeuclidean", "cosine"]
    space: Literal["plain", "whitened"] = Field(
        "plain", description="whitened: costs where the words of the training captions spread alike in all directions"
    )
    word_weights: Literal["uniform", "idf", "idf_squared"]
    start: Start = Field(
        description="closed_form: the constant set, and a linear map from image to words that needs no training"
    )
    closed_form: ClosedForm = Field(
        "best", description="kind of that map; best: ridge or procrustes, the one that ranks held-out captions better"
    )
    tokens: Literal["free", "mixture"] = Field(
        "free", description="mixture: convex mixtures of the words of the captions, as the adapter chooses"
    )
    contrast: NotNegative = Field(
        0.0, description="weight of a second loss: telling the batch's own captions from the others by EMD; 0: none"
    )
    temperature: AboveZero = Field(
        0.1, description="of the contrast, in units of the EMD: about what it differs by between pictures"
    )
    names: NotNegative = Field(
        0.0, description="weight of a third loss: telling a picture's class from all classes by EMD to their names"
    )
    unmatched: Share = Field(0.0, description="share of the image tokens' mass that need not become a word")
    solver: Literal["exact", "pot", "sinkhorn"] = Field(
        "exact", description="pot: exact too, by the library POT; sinkhorn: approximate, for comparison"
    )

    @model_validator(mode="after")
    def _partial_is_exact(self) -> EMDSettings:
        if self.unmatched and self.solver == "sinkhorn":
            raise ValueError("unmatched mass needs an exact solver: set solver to exact, or unmatched to 0")
        return self


class EMD(Objective):
    """Exact Earth Mover's Distance."""

    Settings = EMDSettings
    settings: EMDSettings

    def __init__(self, settings: EMDSettings, pairs: Pairs, means: Means | None = None):
        super().__init__(settings, pairs, means)
        self.in_flight = 3 if pairs.device.type == "cuda" else 1  # on the GPU, at the solver, on the way

    @cached_property
    def ground(self) -> Ground:
        """Where words lie and what they weigh."""
        from pipeline.objectives.ground import Ground

        return Ground(self.settings, self.pairs)

    def distances(self, tokens: Tensor, captions: Captions, image: Sequence[int] | None) -> Tensor:
        """EMD of P pairs, [P]; image None: of each caption with each image, all captions of the first image first."""
        return self.start_distances(tokens, captions, image).result()

    def start_distances(self, tokens: Tensor, captions: Captions, image: Sequence[int] | None) -> Started:
        from pipeline.transport.emd import start_emd

        own, ground = self.settings, self.ground
        words = ground.words_of(captions)
        return start_emd(
            ground.place(tokens), words.places, words.offsets, image, cost=own.cost, word_weights=words.weights,
            center=ground.center, unmatched=own.unmatched, solver=own.solver, threads=self.means.threads,
            background=self.in_flight > 1,
        )  # fmt: skip

    def all_distances(self, tokens: Tensor, captions: Captions) -> Tensor:
        return self.distances(tokens, captions, None).view(len(tokens), -1)

    def start(self, tokens: Tensor, positions: list[int]) -> Started:
        """The mean over the images of their EMD, with the contrast and the loss of names where they have a weight."""
        import torch

        from pipeline.objectives.contrast import start_contrast
        from pipeline.objectives.names import start_names
        from pipeline.started import Started

        own, losses = self.settings, [(1.0, super().start(tokens, positions))]
        if own.contrast:
            # A picture with a name is told from the names of all classes, where these have a loss: each picture counts
            # once.
            rows = [i for i, p in enumerate(positions) if not (own.names and self.pairs.is_named(p))]
            if len(rows) > 1:
                contrast = start_contrast(self, tokens[rows], [positions[i] for i in rows])
                losses.append((own.contrast * len(rows) / len(positions), contrast))
        if own.names:
            losses.append((own.names, start_names(self, tokens, positions)))
        return Started(lambda: torch.stack([weight * loss.result() for weight, loss in losses]).sum())

    def initialise(self, adapter: Adapter, tokens: Tensor) -> None:
        if self.settings.start != "random":
            adapter.start_at(self.constant_set(adapter(tokens[:1]).shape[1]), tokens)
        if self.settings.start == "closed_form":
            from pipeline.objectives.closed_form import fit_closed_form

            decides = [self.settings.word_weights, adapter.pool, self.settings.closed_form]
            name, fit = f"closed-form-{adapter.pool}", lambda: fit_closed_form(self, adapter.pooled)
            adapter.skip_by(self.means.keep(name, decides, fit).to(self.pairs.device))
        if self.settings.tokens == "mixture":
            adapter.mix(self.pairs.table)

    def baselines(self, count: int) -> dict[str, float]:
        """EMD of the best constant token, and of the best constant set, on held-out images."""
        return {"const_token": self._blind(1), "const_set": self._blind(count)}

    def constant_set(self, count: int) -> Tensor:
        """The best image-blind set of `count` tokens, [count, D]: adapters that give equally many share it."""
        from pipeline.objectives.constant_set import fit_constant_set

        undecided = {"start", "closed_form", "tokens", "solver", "contrast", "temperature", "names"}
        decides = self.settings.model_dump(exclude=undecided)
        fitted = self.means.keep(f"constant-set-{count}", [decides], lambda: fit_constant_set(self, count))
        return fitted.to(self.pairs.device)

    def _blind(self, count: int) -> float:
        tokens = self.constant_set(count)[None]
        return self.held_out(lambda _: tokens).mean().item()
