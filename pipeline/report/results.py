"""Everything that the stages of a profile measured, read back. No key is demanded: what is not there is not shown."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.metrics.base import FIGURES, Figure, read_figures
from pipeline.metrics.speeds import read_speeds
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
    speeds: dict[str, float]  # images per second by rule, "" for answers; none where the stage did not run here

    def figure(self, key: str) -> Figure | None:
        """The figure of a key; None when it was not measured."""
        return next((figure for figure in self.figures if figure.key == key), None)


@dataclass(frozen=True)
class WithoutLLM:
    """What a pre-trained adapter came to on a data set of classes without the LLM."""

    data: str
    adapter: str
    figures: list[Figure]
    val_loss: float  # minus the mean log-probability of the right names by the rule `namer`
    speeds: dict[str, float]


@dataclass(frozen=True)
class Results:
    """All results of a profile; those of fine-tuning by data set, adapter and recipe."""

    params: Params
    pretrain: dict[str, dict[str, Any]]  # by adapter
    pca: dict[str, dict[str, dict[str, Any]]]  # by adapter and state
    without_llm: list[WithoutLLM]
    outcomes: list[Outcome]
    tuned: dict[str, dict[str, dict[str, Any]]]  # what fine-tuning wrote, by adapter and recipe
    seconds: dict[str, float | None]  # None: the stage was restored from DVC's cache and never ran here
    memory: dict[str, str]  # what a stage held at most, in words; nothing where it is not known

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
        return min(self.of(data), key=_loss)

    def best_without_llm(self, data: str) -> WithoutLLM | None:
        """The one with the lowest validation loss, by which `terraalign classify` answers."""
        return min(self.without_llm_on(data), key=_loss, default=None)

    def without_llm_on(self, data: str) -> list[WithoutLLM]:
        """What was measured on one data set without the LLM."""
        return [found for found in self.without_llm if found.data == data]

    def name(self, outcome: Outcome) -> str:
        """What tells an outcome from the others on its data set: the adapter, and the recipe where there are more."""
        recipes = {other.recipe for other in self.of(outcome.data)}
        return outcome.adapter if len(recipes) == 1 else f"{outcome.adapter} on {outcome.recipe}"

    def baselines(self, data: str) -> list[Figure]:
        """The figures of a data set that are the same for every adapter and recipe."""
        found: dict[str, Figure] = {}
        measured: list[Outcome | WithoutLLM] = [*self.of(data), *self.without_llm_on(data)]
        for figure in (figure for one in measured for figure in one.figures if figure.baseline):
            found.setdefault(figure.key, figure)
        return list(found.values())


def _loss(found: Outcome | WithoutLLM) -> float:
    """Its validation loss; one that is no number is the worst."""
    return found.val_loss if found.val_loss is not None and math.isfinite(found.val_loss) else math.inf


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
        [found for data in params.run.data for adapter in params.run.adapters for found in _named(run, data, adapter)],
        outcomes,
        {
            adapter: {recipe: _metrics(run.finetuned(adapter, recipe)) for recipe in params.run.recipes}
            for adapter in params.run.adapters
        },
        {stage: timed(run.seconds(stage)).get("seconds") for stage in stages(params)},
        {stage: _memory(timed(run.seconds(stage))) for stage in stages(params)},
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
            data, adapter, recipe, read_figures(run.evaluated(adapter, recipe), data), of(losses, data),
            of(scratch, data), read_speeds(run, f"evaluate@{adapter}-{recipe}", data),
        )
        for data in sets
    ]  # fmt: skip


def _named(run: Run, data: str, adapter: str) -> list[WithoutLLM]:
    """What stage `name` measured; nothing where it did not: a data set without classes has no names."""
    folder = run.named(adapter)
    if not (folder / data / FIGURES).exists():
        return []
    figures = [_of_data_alone(figure) for figure in read_figures(folder, data)]
    path = require(folder / data / "namer.json")
    try:
        loss = float(json.loads(path.read_text(encoding="utf-8"))["val_loss"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(path, f"not what `name` writes ({error!r})", remedy(folder, force=True)) from None
    return [WithoutLLM(data, adapter, figures, loss, read_speeds(run, f"name@{adapter}", data))]


def _of_data_alone(figure: Figure) -> Figure:
    """Discriminant analysis sees the encoder's tokens: it gets the same whatever the adapter, and is a baseline."""
    if not figure.key.endswith("/discriminant"):
        return figure
    if figure.key == "acc/discriminant":
        return replace(figure, key="discriminant", label="discriminant analysis", baseline=True)
    return replace(figure, baseline=True)


def _metrics(folder: Path) -> dict[str, Any]:
    path = require(folder / "metrics.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(path, "not valid JSON", remedy(folder, force=True)) from None
    if not isinstance(values, dict):
        raise UserError(path, "not figures by name", remedy(folder, force=True))
    return values


def timed(path: Path) -> dict[str, float]:
    """A stage's seconds and bytes; nothing when it did not run here or its file is not readable: a timing is worth no
    failure."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {key: float(value) for key, value in values.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _memory(measured: dict[str, float]) -> str:
    """What a stage held at most, e.g. '1.3 GB', on a GPU '3.1 GB, GPU 7.5 GB'."""
    kinds = (("peak_bytes", ""), ("peak_gpu_bytes", "GPU "))
    return ", ".join(f"{name}{measured[key] / 1e9:.1f} GB" for key, name in kinds if key in measured)
