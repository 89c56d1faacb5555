"""LLaVA's adapter: the last layer alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.adapters.base import Architecture

if TYPE_CHECKING:
    from torch import nn


class Linear(Architecture):
    """H = W Z (Liu et al. 2023)."""

    def body(self, d_in: int, d_out: int) -> tuple[nn.Module, int]:
        from torch import nn

        return nn.Identity(), d_in

    def parameters(self, d_in: int, d_out: int) -> int:
        return d_in * d_out
