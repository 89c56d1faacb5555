"""OpenClip."""

from __future__ import annotations

from pipeline.encoders.base import Encoder, NamedModel


class OpenClip(Encoder):
    """OpenClip."""

    Settings = NamedModel
