"""What every vision encoder is."""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar

from pydantic import model_validator

from pipeline.config.schema import Vision


class NamedModel(Vision):
    """An encoder of a library, by its model's name."""

    @model_validator(mode="after")
    def _model_named(self) -> NamedModel:
        if not self.model:
            raise ValueError(f"encoder {self.encoder} needs model: the name of the architecture")
        if not self.pretrained:
            raise ValueError(
                f"encoder {self.encoder} needs pretrained: a tag of open_clip, hub for timm, a weights file, "
                "or random for an untrained network"
            )
        return self


class Encoder(ABC):
    """A frozen network that gives image tokens."""

    Settings: ClassVar[type[Vision]] = Vision

    def __init__(self, settings: Any):
        self.settings = settings
