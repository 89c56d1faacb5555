"""What every vision encoder is: how to build it, what it needs, and what of it decides a token."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pipeline.config import components
from pipeline.config.schema import Vision
from pipeline.needs import Need

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor, nn

    from pipeline.media.decoding import Decoder

RANDOM = "random"
"""vision.pretrained of an untrained network."""
_PLACE_IN_MEMORY = re.compile(r" at 0x[0-9a-fA-F]+")


class Parts(NamedTuple):
    """What an encoder is built of; dtype, device and gradients are seen to by whoever has it built."""

    network: nn.Module
    """All its weights, on the CPU."""
    tokens: Callable[[Tensor], Tensor]
    """What `preprocess` gives, normalised, [B, 3, H, W] in the network's dtype, to image tokens [B, N, D]."""
    preprocess: Callable[[Image.Image], Tensor]
    """An RGB picture of any size to [3, H, W]: a Preprocess, torchvision's transforms, or a function to float32."""


class Towers(NamedTuple):
    """A model that puts pictures and texts into one space; what it gives need not have length 1."""

    parts: Parts
    """As for image tokens, but all weights of the model; `tokens` gives the pictures' embeddings, [B, 1, E]."""
    texts: Callable[[list[str]], Tensor]
    """Texts, by the model's own tokenizer, to [B, E] on the network's device."""


class Encoder(ABC):
    """A frozen network that gives image tokens. A subclass has to have `build`; its Settings may add keys to vision."""

    Settings: ClassVar[type[Vision]] = Vision

    def __init__(self, settings: Any):
        self.settings = settings

    @staticmethod
    def of(vision: Vision) -> Encoder:
        """The encoder that params.vision names. Raises ValueError when there is none by this name."""
        encoder: type[Encoder] = components.find("encoder", vision.encoder)
        return encoder(vision)

    @abstractmethod
    def build(self) -> Parts:
        """The network with its weights, as it is in every process.

        Raises UserError, with the remedy, when they cannot be found or read.
        """

    def decoder(self, preprocess: Callable[[Image.Image], Tensor], device: torch.device) -> Decoder:
        """What makes network inputs of files; `preprocess` is that of its parts. Here pictures, as vision.decoder says.

        An encoder of something else than pictures, such as sound, has a decoder of its own.
        """
        from pipeline.media.decoding import decoder_for

        return decoder_for(self.settings.decoder, preprocess, device)

    def two_towers(self) -> Towers | None:
        """The whole model, where it was trained to put pictures and texts into one space; raises as `build`."""
        return None

    @classmethod
    def has_text_tower(cls) -> bool:
        """Whether `two_towers` gives any; builds nothing."""
        return cls.two_towers is not Encoder.two_towers

    def need(self) -> Need:
        """Whether its weights are there, and how to get them; looks, and never downloads."""
        return Need(self.title, True, "left to its class")

    def text_need(self) -> Need | None:
        """What its text tower needs besides the weights; looks, and never downloads."""
        return None

    def tokens(self) -> tuple[int, int] | None:
        """N and D of its image tokens; None where only building it can tell."""
        return None

    @property
    def title(self) -> str:
        """What it needs, for people."""
        return f"weights of {self.settings.model or self.settings.encoder}"

    def identity(self, parts: Parts, weights: str, dtype: torch.dtype) -> dict[str, str]:
        """All that decides the bytes of a token, for fingerprints; `weights` is the hash of those in `parts`.

        Of a user's own class that is also its code, and settings that it adds.
        """
        name, added = self.settings.encoder, sorted(set(self.Settings.model_fields) - set(Vision.model_fields))
        found = {
            "encoder": name,
            "model": self.settings.model or "",
            "weights": weights,
            "preprocess": _PLACE_IN_MEMORY.sub("", " ".join(repr(parts.preprocess).split())),
            "dtype": str(dtype),
        }
        if added:
            values = self.settings.model_dump(mode="json", include=set(added))
            found["settings"] = json.dumps(values, sort_keys=True)
        if components.is_foreign(name):
            [source] = components.sources_of([("encoder", name)])
            found["code"] = hashlib.sha256(source.read_bytes()).hexdigest()
        return found
