"""Timm."""

from __future__ import annotations

from pipeline.encoders.base import Encoder, NamedModel


class Timm(Encoder):
    """Timm."""

    Settings = NamedModel
