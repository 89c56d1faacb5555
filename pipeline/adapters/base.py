"""What every architecture of an adapter is."""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar

from pydantic import model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError

from pipeline.config.base import Name, Positive, Section, Share


class Settings(Section):
    """Keys of adapters.<name>.architecture that every adapter has."""

    kind: Name | None = None
    pool: Positive | None = None
    dropout: Share = 0.0


class TransformerSettings(Settings):
    """Those of the transformers."""

    width: Positive | None = None
    blocks: Positive = 4
    heads: Positive = 4
    feed_forward: Positive | None = None

    @model_validator(mode="after")
    def _heads_fit(self) -> TransformerSettings:
        if self.width is not None and self.width % self.heads:
            fault = PydanticCustomError("width", "should be a multiple of heads, {heads}", {"heads": self.heads})
            raise ValidationError.from_exception_data(
                "architecture", [InitErrorDetails(type=fault, loc=("width",), input=self.width)]
            )
        return self


class Adapter(ABC):
    """An architecture: what stands between image tokens and the last layer."""

    Settings: ClassVar[type[Settings]] = Settings

    def __init__(self, settings: Any):
        self.settings = settings

    def tokens(self, count: int) -> int:
        """How many tokens it gives for `count` image tokens."""
        return count if self.settings.pool is None else int(self.settings.pool) ** 2
