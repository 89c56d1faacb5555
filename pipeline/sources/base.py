"""What every layout of a data set is: settings, what it needs, and how its pictures are found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from pipeline.config.base import Folder, Number, Positive
from pipeline.config.schema import DataSettings

if TYPE_CHECKING:
    from rich.progress import Progress

    from pipeline.sources.manifest import Found

Carved = Annotated[Number, Field(gt=0, lt=0.5)]  # share of the training pictures that becomes the validation part


class FolderSettings(DataSettings):
    """A data set that is a folder."""

    root: Folder = Field(None, validate_default=True, description="folder of the data set")
    count: Positive | None = Field(
        None, description="at most this many pictures, of each class where there are classes"
    )

    @field_validator("root", mode="before")
    @classmethod
    def _named(cls, value: object, info: ValidationInfo) -> object:
        if value is None:
            raise ValueError(
                f"source {info.data.get('source')} needs the folder of the data set; write it here or use "
                "`terraalign profile use NAME --set {key}=FOLDER`"
            )
        return value


class RenderedSettings(DataSettings):
    """A data set that is drawn here."""

    count: Positive = Field(None, validate_default=True, description="pictures to render, of each class")

    @field_validator("count", mode="before")
    @classmethod
    def _given(cls, value: object, info: ValidationInfo) -> object:
        if value is None:
            raise ValueError(f"source {info.data.get('source')} needs a count: how many pictures to render")
        return value


class Source(ABC):
    """The pictures of a data set in one layout, with the texts that its tasks need.

    `name` is the data set's, as in data.<name>; `workers` threads may be used.
    """

    Settings: ClassVar[type[DataSettings]]
    tasks: ClassVar[tuple[str, ...]]
    """The tasks whose texts it holds."""

    def __init__(self, name: str, settings: Any, seed: int, workers: int):
        self.name, self.settings, self.seed, self.workers = name, settings, seed, workers

    @property
    def key(self) -> str:
        """The section of params.yaml."""
        return f"data.{self.name}"

    @abstractmethod
    def read(self, progress: Progress) -> Found:
        """All pictures, and what is left out. Raises UserError for a fault in the data set."""

    def restore(self, progress: Progress) -> None:  # noqa: B027
        """Make the pictures that a manifest names where they can be made, e.g. after it came from DVC's cache."""
