"""Linear."""

from __future__ import annotations

from pipeline.adapters import base


class Linear(base.Adapter):
    """Linear."""

    Settings = base.Settings
