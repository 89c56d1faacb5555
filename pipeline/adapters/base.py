"""What every architecture of an adapter is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from pipeline.config import components
from pipeline.config.base import Name, Positive, Section, Share
from pipeline.config.messages import message_of
from pipeline.errors import UserError

if TYPE_CHECKING:
    from torch import nn


class ArchitectureSettings(Section):
    """Keys of adapters.<name>.architecture that every architecture has."""

    kind: Name | None = None
    pool: Positive | None = None
    dropout: Share = 0.0


class TransformerSettings(ArchitectureSettings):
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

    def widths(self, d_in: int) -> tuple[int, int]:
        """Of the tokens between the blocks, and inside the blocks' feed-forward layers."""
        width = self.width or d_in
        return width, self.feed_forward or 4 * width


class Architecture(ABC):
    """The body of an adapter: what stands between the image tokens and the last layer, which is linear for all.

    One of an own package is a class with `body`, with `Settings` where it has keys of its own, and with `tokens` where
    it gives another number of tokens than it takes.
    """

    Settings: ClassVar[type[ArchitectureSettings]] = ArchitectureSettings

    def __init__(self, settings: Any):
        self.settings = settings

    @staticmethod
    def of(kind: str, values: dict[str, Any]) -> Architecture:
        """The architecture of a kind, with the keys of adapters.<name>.architecture; UserError naming what is wrong."""
        try:
            found: type[Architecture] = components.find("adapter", kind)
        except ValueError as error:
            raise UserError(f"adapters.*.architecture.kind is {kind}", error) from None
        try:
            settings = found.Settings.model_validate(values)
        except ValidationError as error:
            fault = error.errors()[0]
            key = ".".join(["adapters.*.architecture", *map(str, fault["loc"])])
            raise UserError(f"{key} is {fault['input']}", message_of(dict(fault), found.Settings, values)) from None
        return found(settings)

    @abstractmethod
    def body(self, d_in: int, d_out: int) -> tuple[nn.Module, int]:
        """A module from [B, N, d_in] to [B, M, width], and that width; d_out is that of the last layer."""

    def tokens(self, count: int) -> int:
        """How many tokens it gives for `count` image tokens."""
        return count if self.settings.pool is None else int(self.settings.pool) ** 2

    def parameters(self, d_in: int, d_out: int) -> int:
        """About how many parameters the adapter has: here counted, which takes torch seconds to import."""
        import torch

        with torch.device("meta"):
            body, width = self.body(d_in, d_out)
        return sum(parameter.numel() for parameter in body.parameters()) + (width + 1) * d_out
