"""A transformer over the image tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.adapters.base import Architecture, TransformerSettings

if TYPE_CHECKING:
    from torch import nn


class SelfAttention(Architecture):
    """Blocks of self-attention and feed-forward over the image tokens (thesis, table 2)."""

    Settings = TransformerSettings
    settings: TransformerSettings

    def body(self, d_in: int, d_out: int) -> tuple[nn.Module, int]:
        from torch import nn

        from pipeline.adapters.blocks import Block

        width, feed_forward = self.settings.widths(d_in)
        enter = nn.Identity() if width == d_in else nn.Linear(d_in, width)
        stack = [Block(width, self.settings.heads, feed_forward, cross=False) for _ in range(self.settings.blocks)]
        return nn.Sequential(enter, *stack, nn.LayerNorm(width)), width

    def parameters(self, d_in: int, d_out: int) -> int:
        width, feed_forward = self.settings.widths(d_in)
        return self.settings.blocks * width * (4 * width + 2 * feed_forward) + width * (d_in + d_out)
