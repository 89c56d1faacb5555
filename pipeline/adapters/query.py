"""A transformer of learned queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.adapters.base import Architecture, TransformerSettings
from pipeline.config.base import Positive

if TYPE_CHECKING:
    from torch import nn


class QuerySettings(TransformerSettings):
    queries: Positive = 128


class Query(Architecture):
    """Learned queries that look at the image tokens (thesis, table 3)."""

    Settings = QuerySettings
    settings: QuerySettings

    def body(self, d_in: int, d_out: int) -> tuple[nn.Module, int]:
        from pipeline.adapters.blocks import QueryBody

        own, (width, feed_forward) = self.settings, self.settings.widths(d_in)
        return QueryBody(d_in, width, own.queries, own.blocks, own.heads, feed_forward), width

    def tokens(self, count: int) -> int:
        return self.settings.queries

    def parameters(self, d_in: int, d_out: int) -> int:
        width, feed_forward = self.settings.widths(d_in)
        return self.settings.blocks * width * (8 * width + 2 * feed_forward) + width * (d_in + d_out)
