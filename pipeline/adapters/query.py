"""Query."""

from __future__ import annotations

from pipeline.adapters import base
from pipeline.config.base import Positive


class Settings(base.TransformerSettings):
    """Keys of its architecture."""

    queries: Positive = 128


class Query(base.Adapter):
    """Query."""

    Settings = Settings

    def tokens(self, count: int) -> int:
        return int(self.settings.queries)
