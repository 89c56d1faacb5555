"""Everything that the stages of a profile measured, read back. No key is demanded: what is not there is not shown."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.metrics.base import Figure, read_figures
from pipeline.runs import Run, remedy, require, stages


@dataclass(frozen=True)
class Outcome:
    """What an adapter, fine-tuned by a recipe, came to on one of the recipe's data sets."""

    data: str
    adapter: str
    recipe: str
    figures: list[Figure]
    val_loss: float | None
    scratch_val_loss: float | None  # None: without pre-training it was not run

    def figure(self, key: str) -> Figure | None:
        """The figure of a key; None when it was not measured."""
        return next((figure for figure in self.figures if figure.key == key), None)


@dataclass(frozen=True)
class Results:
    """All results of a profile; those of fine-tuning by data set, adapter and recipe."""

    params: Params
    pretrain: dict[str, dict[str, Any]]  # by adapter
    pca: dict[str, dict[str, dict[str, Any]]]  # by adapter and state
    outcomes: list[Outcome]
    seconds: dict[str, float | None]  # None: the stage was restored from DVC's cache and never ran here

    @property
    def run(self) -> Run:
        return Run.of(self.params)

    @property
    def measured(self) -> list[str]:
        """The data sets that a recipe is on."""
        return [data for data in self.params.run.data if self.of(data)]

    def of(self, data: str) -> list[Outcome]:
        """The outcomes on one data set."""
        return [outcome for outcome in self.outcomes if outcome.data == data]

    def best(self, data: str) -> Outcome:
        """The outcome with the lowest validation loss: the test part has no say in the choice."""

        def loss(outcome: Outcome) -> float:
            found = outcome.val_loss
            return found if found is not None and math.isfinite(found) else math.inf

        return min(self.of(data), key=loss)

    def name(self, outcome: Outcome) -> str:
        """What tells an outcome from the others on its data set: the adapter, and the recipe where there are more."""
        recipes = {other.recipe for other in self.of(outcome.data)}
        return outcome.adapter if len(recipes) == 1 else f"{outcome.adapter} on {outcome.recipe}"

    def baselines(self, data: str) -> list[Figure]:
        """The figures of a data set that are the same for every adapter and recipe."""
        found: dict[str, Figure] = {}
        for figure in (figure for outcome in self.of(data) for figure in outcome.figures if figure.baseline):
            found.setdefault(figure.key, figure)
        return list(found.values())


def read_results(params: Params) -> Results:
    """What every stage measured. Raises UserError naming a file that is missing or broken, and its stage."""
    run = Run.of(params)
    outcomes = [
        outcome
        for adapter in params.run.adapters
        for recipe in params.run.recipes
        for outcome in _outcomes(params, adapter, recipe)
    ]
    return Results(
        params,
        {adapter: _metrics(run.pretrained(adapter)) for adapter in params.run.adapters},
        {adapter: _metrics(run.pca(adapter)) for adapter in params.run.adapters},
        outcomes,
        {stage: _seconds(run.seconds(stage)) for stage in stages(params)},
    )


def _outcomes(params: Params, adapter: str, recipe: str) -> list[Outcome]:
    run, sets = Run.of(params), params.finetune.recipes[recipe].data
    losses = _metrics(run.finetuned(adapter, recipe))
    compared = adapter in params.run.scratch and recipe in params.run.scratch_recipes
    scratch = _metrics(run.finetuned(adapter, recipe, scratch=True)) if compared else {}

    def of(found: dict[str, Any], data: str) -> float | None:
        """The loss on one data set; that of a whole mixture is none."""
        return found.get(f"val_loss/{data}" if len(sets) > 1 else "val_loss")

    return [
        Outcome(
            data, adapter, recipe, read_figures(run, adapter, recipe, data), of(losses, data), of(scratch, data)
        )
        for data in sets
    ]  # fmt: skip


def _metrics(folder: Path) -> dict[str, Any]:
    path = require(folder / "metrics.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(path, "not valid JSON", remedy(folder, force=True)) from None
    if not isinstance(values, dict):
        raise UserError(path, "not figures by name", remedy(folder, force=True))
    return values


def _seconds(path: Path) -> float | None:
    """A stage's seconds; None when it did not run here or its file is not readable: a timing is worth no failure."""
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
