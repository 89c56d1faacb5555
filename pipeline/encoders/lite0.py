"""Lite0."""

from __future__ import annotations

from pipeline.config import Vision
from pipeline.encoders.base import Encoder


class Lite0(Encoder):
    """Lite0."""

    Settings = Vision
