"""Two layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.adapters.base import Architecture, ArchitectureSettings
from pipeline.config.base import Positive

if TYPE_CHECKING:
    from torch import nn


class MLPSettings(ArchitectureSettings):
    """`positions`, the number of tokens, gives fc1 a further bias for each token, so that it knows them apart."""

    hidden: Positive | None = None
    positions: Positive | None = None


class MLP(Architecture):
    """fc1, GELU, and fc2 as the last layer; hidden = 2 x output (thesis, equation 3.1)."""

    Settings = MLPSettings
    settings: MLPSettings

    def body(self, d_in: int, d_out: int) -> tuple[nn.Module, int]:
        from torch import nn

        from pipeline.adapters.blocks import Positions

        hidden, count = self._hidden(d_out), self.settings.positions
        own = [] if count is None else [Positions(count, hidden)]
        return nn.Sequential(nn.Linear(d_in, hidden), *own, nn.GELU()), hidden

    def parameters(self, d_in: int, d_out: int) -> int:
        return self._hidden(d_out) * (d_in + d_out)

    def _hidden(self, d_out: int) -> int:
        return self.settings.hidden or 2 * d_out
