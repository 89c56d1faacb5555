"""EMD, its contrast and its starts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.base import AboveZero, NotNegative, Share
from pipeline.config.schema import ObjectiveSettings
from pipeline.objectives.base import Objective


class EMDSettings(ObjectiveSettings):
    """EMD with this ground cost, marginal, start and solver."""

    cost: Literal["euclidean", "sqeuclidean", "cosine"]
    space: Literal["plain", "whitened"] = Field(
        "plain", description="whitened: costs where the words of the training captions spread alike in all directions"
    )
    word_weights: Literal["uniform", "idf", "idf_squared"]
    start: Literal["random", "constant_set"]
    contrast: NotNegative = Field(
        0.0, description="weight of a second loss: telling the batch's own captions from the others by EMD; 0: none"
    )
    temperature: AboveZero = Field(
        0.1, description="of the contrast, in units of the EMD: about what it differs by between pictures"
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
