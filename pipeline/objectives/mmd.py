"""Maximum mean discrepancy (Gretton et al. 2012): how far apart two sets of points are for a Gaussian kernel."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.config.base import AboveZero
from pipeline.objectives.bags import BagSettings, BetweenBags

if TYPE_CHECKING:
    from torch import Tensor


class MMDSettings(BagSettings):
    """MMD with this kernel."""

    bandwidth: AboveZero | None = Field(
        None, description="standard deviation of the kernel; null: the median distance between words of the captions"
    )


class MMD(BetweenBags):
    """Half the squared MMD of an image's tokens and a caption's words, biased (theirs, equation 5, by weights)."""

    Settings = MMDSettings
    settings: MMDSettings

    @cached_property
    def bandwidth(self) -> float:
        """The kernel's standard deviation; by default by the median heuristic (theirs, section 8)."""
        return self.settings.bandwidth or self.distances_of_words().median().item()

    def between(self, apart: Tensor, a: Tensor, b: Tensor) -> Tensor:
        kernel = (apart.square() / (-2 * self.bandwidth**2)).exp()
        return -(a[:, None] @ kernel @ b[..., None]).view(-1)
