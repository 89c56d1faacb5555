"""MLP."""

from __future__ import annotations

from pipeline.adapters import base
from pipeline.config.base import Positive


class Settings(base.Settings):
    """Keys of its architecture."""

    hidden: Positive | None = None
    positions: Positive | None = None


class MLP(base.Adapter):
    """MLP."""

    Settings = Settings
