"""What every task is: the answers to learn, the loss, and the answers to test pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pipeline.config import components
from pipeline.config.base import Section

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from pipeline.config.schema import Evaluate
    from pipeline.naming.table import Named
    from pipeline.store.reader import ImageTokens
    from pipeline.vlm import VLM


SPEEDS = "speeds"  # in the attributes of a table of answers: images per second by rule, "" for the answers themselves


class Models(Protocol):
    """The models that a task may ask; each is loaded when it is entered, and gone afterwards."""

    def pretrained(self) -> AbstractContextManager[VLM]:
        """The pre-trained adapter and the frozen LLM."""

    def finetuned(self) -> AbstractContextManager[VLM]:
        """The fine-tuned adapter and the LLM with its LoRA."""

    def named(self) -> Named | None:
        """What stage `name` found without the LLM, where the data set has classes."""

    @property
    def hints(self) -> int:
        """How many of these names the recipe writes into the prompt."""


class Task(ABC):
    """One kind of question about pictures.

    Settings are its own keys of the section evaluate: they are for questions and answers in evaluation, and fine-tuning
    does not watch them, so neither `answers` nor `loss` may depend on one.
    """

    Settings: ClassVar[type[Section]]

    def __init__(self, settings: Any):
        self.settings = settings

    @staticmethod
    def of(name: str, evaluate: Evaluate) -> Task:
        """The task that data.<name>.task names, with its keys of the section evaluate."""
        task: type[Task] = components.find("task", name)
        keys = task.Settings.model_fields
        return task(task.Settings.model_validate({key: getattr(evaluate, key) for key in keys}))

    @property
    @abstractmethod
    def prompt(self) -> str:
        """What a fine-tuned model is asked of a picture."""

    @property
    def prompts(self) -> list[str]:
        """All that it asks in evaluation."""
        return [self.prompt]

    @property
    @abstractmethod
    def max_tokens(self) -> int:
        """How long an answer may be."""

    def decoding(self, model: VLM, captions: Sequence[Sequence[str]]) -> dict[str, Any]:
        """How a fine-tuned model's answers are decoded: what `VLM.generate` takes besides; nothing: greedily.

        `captions` are those of each of at most reader.COUNTED training pictures.
        """
        return {}

    @abstractmethod
    def answers(self, rows: pd.DataFrame) -> list[list[str]]:
        """The right answers to each picture of a manifest; one without words is no answer."""

    def hint(self, names: list[str]) -> str:
        """How the likeliest names of a picture, found without the LLM, stand in the prompt, behind the picture."""
        return f"It may be: {', '.join(names)}." if names else ""

    def loss(
        self, model: VLM, tokens: Tensor, prompt: str, answers: list[str], hints: list[str] | None = None
    ) -> tuple[Tensor, int]:
        """What fine-tuning minimises: a sum over parts of answers, and their number. Here next-token cross-entropy."""
        return model.loss(tokens, prompt, answers, hints)

    @abstractmethod
    def predict(self, models: Models, images: ImageTokens, batch: int, seed: int) -> pd.DataFrame:
        """Answers to test pictures: a row each, with the columns id, image, and what the task's metrics need."""

    @abstractmethod
    def write(self, predictions: pd.DataFrame, folder: Path) -> None:
        """Keep them as files for people and for the report."""

    @classmethod
    @abstractmethod
    def read(cls, folder: Path) -> pd.DataFrame:
        """What `write` wrote. Raises UserError naming the file that is missing or is not what was written."""
