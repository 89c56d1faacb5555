"""What every loader of a language model is: where its files are, and what is wrong with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from pipeline.config import LLM, components
from pipeline.errors import UserError
from pipeline.needs import Fault, Need
from pipeline.weights import told_in_one_line


class Loader(ABC):
    """How the files of a language model come into the form that transformers loads. A subclass has to have `source`."""

    Settings: ClassVar[type[LLM]] = LLM

    def __init__(self, settings: Any):
        self.settings = settings

    @staticmethod
    def of(llm: LLM) -> Loader:
        """The loader that params.llm names. Raises ValueError when there is none by this name."""
        loader: type[Loader] = components.find("loader", llm.loader)
        return loader(llm)

    @abstractmethod
    def source(self, *, tokenizer: bool = True) -> tuple[str, str | None]:
        """A folder in transformers' format, or a hub id, and its revision.

        `tokenizer`: whether that is needed, too. Raises UserError, with the remedy, when files are missing or damaged.
        """

    def fault(self) -> Fault | None:
        """What keeps the model from being loaded, or None; looks at the files' headers, and never downloads."""
        return None

    def place(self) -> str:
        """Where a model without a fault is."""
        return "left to its class"

    def need(self) -> Need:
        """Whether the model is there, and how to get it."""
        title, fault = f"weights of {self.settings.model}", self.fault()
        return Need(title, False, fault.found, fault.remedy) if fault else Need(title, True, self.place())

    def shape(self) -> tuple[float, int, int] | None:
        """Parameters, width and layers; None where only loading the model can tell."""
        return None

    def is_text_alone(self) -> bool:
        """Whether the model is known to have no parts for pictures or sound beside its language model."""
        return False

    def remedy(self) -> str:
        """What to do when a library fails over files in which no fault is found."""
        return "its files may be of another version of transformers, or incomplete; copy the whole model again"

    def loading(self) -> AbstractContextManager[None]:
        """Turns what libraries raise over the model's files into one line with its remedy."""

        def tell(error: Exception, reason: str) -> UserError:
            remedy = "install the package it names" if isinstance(error, ImportError) else self.remedy()
            return UserError(f"llm.model {self.settings.model} cannot be loaded", reason, remedy)

        return told_in_one_line(tell)
