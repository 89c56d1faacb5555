"""What every objective is."""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar

from pipeline.config.schema import ObjectiveSettings


class Objective(ABC):
    """A loss between image tokens and captions."""

    Settings: ClassVar[type[ObjectiveSettings]] = ObjectiveSettings
    needs_llm: ClassVar[bool] = False

    def __init__(self, settings: Any):
        self.settings = settings
