"""What every layout of a data set is: settings, what it needs, and how its pictures are found."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from pipeline.config.base import Folder, Number, Positive
from pipeline.config.schema import DataSettings
from pipeline.errors import UserError
from pipeline.files import Damaged, refuse_pointer
from pipeline.needs import Need
from pipeline.sources.rows import Found

if TYPE_CHECKING:
    from rich.progress import Progress

    from pipeline.sources.manifest import Check

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
    assumed: ClassVar[int] = 100_000
    """Pictures to reckon with where only `prepare` can tell."""

    def __init__(self, name: str, settings: Any, seed: int, workers: int):
        self.name, self.settings, self.seed, self.workers = name, settings, seed, workers

    @property
    def key(self) -> str:
        """The section of params.yaml."""
        return f"data.{self.name}"

    @property
    def title(self) -> str:
        """The data set and its layout, for people."""
        return f"{self.key} ({self.settings.source})"

    @abstractmethod
    def read(self, progress: Progress) -> Found:
        """All pictures, and what is left out. Raises UserError for a fault in the data set."""

    def check(self, image: str) -> Check:
        """Whether one of its files, as its rows name it, can be used: decoded once. Here a picture."""
        from pipeline.sources.manifest import check_picture

        return check_picture(image)

    def takes(self, paths: Sequence[Path]) -> set[Path]:
        """Those of some files that are its own, so that another data set in the same folder has not lost them."""
        return set()

    def restore(self, progress: Progress) -> None:  # noqa: B027
        """Make the pictures that a manifest names where they can be made, e.g. after it came from DVC's cache."""

    def need(self) -> Need:
        """Whether its files are there, and whole at a first look: seconds at most, and no network."""
        return Need(self.title, True, f"looked at by `terraalign prepare {self.name}` only")

    def pictures(self) -> int | None:
        """How many pictures it has at a first look, as `need`; None where only `prepare` can tell."""
        return None

    def settings_for_use(self, missing: bool) -> list[str]:
        """What `terraalign profile use` has to --set, KEY=VALUE, so that a profile has this data set.

        `missing`: what names its files is still to be found, and stands there as FOLDER.
        """
        return []


class FolderSource(Source):
    """A data set that is a folder: files that name its pictures, and a folder of pictures or of class folders."""

    settings: FolderSettings
    has_classes: ClassVar[bool] = True

    @property
    def lists(self) -> list[str]:
        """The files that name its pictures, relative to root."""
        return []

    @property
    def images(self) -> str:
        """The folder of pictures, relative to root."""
        return ""

    def takes(self, paths: Sequence[Path]) -> set[Path]:
        root = self.settings.root
        inside = [path for path in paths if path.is_relative_to(root)]
        own = ({root / name for name in self.lists} | self.named()) if inside else set()
        there = root / self.images
        return {
            one for one in inside if one in own or (one.is_relative_to(there) and self.in_class(one.relative_to(there)))
        }

    def named(self) -> set[Path]:
        """The pictures that its lists name, where these decide."""
        return set()

    def in_class(self, path: PurePath) -> bool:
        """Whether a path below its folder of pictures lies in a class folder."""
        return self.has_classes and len(path.parts) > 1

    def folder(self) -> Path:
        """Its root. Raises UserError when that is no folder."""
        if not self.settings.root.is_dir():
            raise UserError(self.settings.root, "no such folder", self._how_to_set())
        return self.settings.root

    def _how_to_set(self) -> str:
        return f"set {self.key}.root in params.yaml to the folder of the data set"

    def need(self) -> Need:
        root = self.settings.root
        missing = [str(root / part) for part in [*self.lists, self.images] if not (root / part).exists()]
        if missing:
            return Need(self.title, False, f"missing: {', '.join(missing)}", self._how_to_set())
        try:
            self.look()
        except Damaged as fault:
            found = str(fault)
        except OSError as error:
            found = f"{error.filename}: cannot be read ({error.strerror})"
        else:
            return Need(self.title, True, str(root))
        return Need(self.title, False, found, f"fetch or write it again in {root}")

    def look(self) -> None:
        """Raises Damaged, or OSError, when something that is there cannot be it; of lists the beginnings are read."""
        for name in self.lists:
            refuse_pointer(self.settings.root / name)
        folder = self.settings.root / self.images
        with os.scandir(folder) as entries:
            if not any(entry.is_dir() or not self.has_classes for entry in entries):
                raise Damaged(f"{folder}: no {'folder of a class' if self.has_classes else 'picture'} in it")

    def pictures(self) -> int | None:
        """As many as there are files in the folder of pictures."""
        return sum(len(files) for _, _, files in os.walk(self.settings.root / self.images)) or None

    def settings_for_use(self, missing: bool) -> list[str]:
        return [f"{self.key}.root={'FOLDER' if missing else self.settings.root}"]
