"""What every loader of a language model is."""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar

from pipeline.config import LLM


class Loader(ABC):
    """A way to load a language model."""

    Settings: ClassVar[type[LLM]] = LLM

    def __init__(self, settings: Any):
        self.settings = settings
