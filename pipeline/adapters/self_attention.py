"""SelfAttention."""

from __future__ import annotations

from pipeline.adapters import base


class SelfAttention(base.Adapter):
    """SelfAttention."""

    Settings = base.TransformerSettings
