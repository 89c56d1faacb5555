"""Sinkhorn divergence (Feydy et al. 2019): entropic transport without its bias, between MMD and EMD."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.config.base import AboveZero
from pipeline.objectives.bags import BagSettings, BetweenBags

if TYPE_CHECKING:
    from torch import Tensor


class SinkhornSettings(BagSettings):
    """The divergence at this temperature."""

    epsilon: AboveZero = Field(
        0.1, description="the temperature, times the mean distance between words of the captions; towards 0: EMD"
    )


class SinkhornDivergence(BetweenBags):
    """OT(a, b) - (OT(a, a) + OT(b, b)) / 2 of entropic transport OT by the Euclidean distance (theirs, equation 3)."""

    Settings = SinkhornSettings
    settings: SinkhornSettings

    @cached_property
    def temperature(self) -> float:
        """In units of the distance; one for all pairs, or the three terms would not cancel."""
        return self.settings.epsilon * self.distances_of_words().mean().item()

    def between(self, apart: Tensor, a: Tensor, b: Tensor) -> Tensor:
        from pipeline.transport.entropic import entropic_cost

        return entropic_cost(apart, a, b, self.temperature)

    def to_itself(self, apart: Tensor, a: Tensor) -> Tensor:
        from pipeline.transport.entropic import entropic_cost

        return entropic_cost(apart, a, None, self.temperature)
