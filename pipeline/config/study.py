"""study.yaml: which trainings `terraalign study` compares, and the parameters that make them stages of the graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from pipeline.config import components
from pipeline.config.base import Positive, Section, Seed
from pipeline.config.messages import message_of
from pipeline.config.params import merged
from pipeline.config.schema import Key, Keys
from pipeline.config.yaml12 import read_yaml
from pipeline.errors import UserError

ENDLESS = 100_000  # epochs: the time ends the training


class Method(Section):
    """A way to train: overrides of pretrain.* and finetune.recipes.<recipe>.*, as in adapters.<name>."""

    pretrain: dict[str, Any] = Field(default_factory=dict)
    finetune: dict[Key, dict[str, Any]] = Field(default_factory=dict)
    adapters: Keys | None = Field(None, description="those that it is for; null: all of the study")


class Study(Section):
    """The whole of study.yaml: each adapter by each method with each seed, after equal steps and equal seconds."""

    adapters: Keys
    methods: Annotated[dict[Key, Method], Field(min_length=1)]
    seeds: Annotated[list[Seed], Field(min_length=1)]
    # Of params.yaml by their names, or new ones: `of` names the one that the other keys change.
    recipes: Annotated[dict[Key, dict[str, Any]], Field(min_length=1)]
    # For the comparison at equal steps and at equal time; null: none, but one of them there has to be.
    steps: Positive | None = Field(None, description="of pre-training")
    seconds: Positive | None = Field(None, description="of pre-training, validation apart")
    parameters: dict[str, Any] = Field(default_factory=dict, description="what else the study changes in params.yaml")

    @model_validator(mode="after")
    def _compares_something(self) -> Study:
        if self.steps is None and self.seconds is None:
            raise ValueError("steps or seconds of pre-training are needed, or both")
        return self

    def cells(self) -> list[Cell]:
        """All trainings, those of the first seed first."""
        return [
            Cell(adapter, method, seed, seconds)
            for seed in self.seeds
            for seconds in ([None] if self.steps else []) + ([self.seconds] if self.seconds else [])
            for method, settings in self.methods.items()
            for adapter in self.adapters
            if settings.adapters is None or adapter in settings.adapters
            # What takes no step takes no time either: it is in both comparisons.
            if seconds is None or settings.pretrain.get("max_steps") != 0 or not self.steps
        ]


@dataclass(frozen=True)
class Cell:
    """A training of a study; its name is that of an adapter in the parameters. `seconds` None: of equal steps."""

    adapter: str
    method: str
    seed: int
    seconds: int | None = None

    @property
    def name(self) -> str:
        return "_".join([self.adapter, self.method, str(self.seed), *([f"{self.seconds}s"] if self.seconds else [])])

    @property
    def parts(self) -> set[str]:
        """What it can be asked for by."""
        budget = f"{self.seconds}s" if self.seconds else "steps"
        return {self.name, self.adapter, self.method, str(self.seed), budget}

    def stages(self, recipes: Iterable[str]) -> Iterator[str]:
        """Its own stages of dvc.yaml, in their order."""
        yield from (f"pretrain@{self.name}", f"name@{self.name}")
        yield from (f"{stage}@{self.name}-{recipe}" for recipe in recipes for stage in ("finetune", "evaluate"))


def parse_study(text: str, name: str) -> Study:
    """A study from a file's text. Raises UserError naming the key that is at fault."""
    try:
        study = Study.model_validate(read_yaml(text, name))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise UserError(name, f"{where}: {message_of(dict(fault), Study, {})}") from None
    names = [cell.name for cell in study.cells()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(name, f"two trainings would be called {twice}", "rename a method")
    return study


def fitted(study: Study, values: dict[str, Any]) -> tuple[Study, list[str]]:
    """A study of what a parameter file has sections for, and what of it is left out, with what would have it in.

    Adapters that TerraAlign knows and recipes may be missing; where all recipes are, those that the file runs take
    their place. Whatever else is not there stays, and `parameters_of` refuses it.
    """
    has, recipes = values["adapters"], values["finetune"]["recipes"]
    missing = [name for name in study.adapters if name not in has and name in components.known("adapter")]
    adapters = [name for name in study.adapters if name not in missing]
    said = [f"adapter {name} (to have it, add a section adapters.{name} to params.yaml)" for name in missing]
    if not adapters:
        return study, []
    kept = {name: own for name, own in study.recipes.items() if own.get("of", name) in recipes}
    lacking = ", ".join(name for name in study.recipes if name not in kept)
    if lacking:
        taken = "" if kept else f"; instead: {', '.join(values['run']['recipes'])}"
        said.append(f"recipe {lacking} (params.yaml has {', '.join(recipes)}{taken})")
    kept = kept or {name: {} for name in values["run"]["recipes"]}
    return study.model_copy(update={"adapters": adapters, "recipes": kept}), said


def parameters_of(study: Study, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a parameter file with the study's trainings as its adapters, as a profile of its own.

    Raises UserError for an adapter or a recipe that the file does not have.
    """
    values = merged(values, study.parameters)
    known, recipes, names = values["adapters"], values["finetune"]["recipes"], list(study.recipes)
    based = {name: changes.get("of", name) for name, changes in study.recipes.items()}
    for kind, wanted, there in (("adapters", study.adapters, known), ("recipes", based.values(), recipes)):
        for name in wanted:
            if name not in there:
                raise UserError(f"{kind}: {name}", f"params.yaml has only {', '.join(there)}", "add a section there")
    cells = study.cells()
    run = values["run"] | {
        "adapters": [cell.name for cell in cells],
        "recipes": names,
        "scratch": [],
        "scratch_recipes": [],
    }
    changed = {
        name: merged(recipes[based[name]], {key: value for key, value in changes.items() if key != "of"})
        for name, changes in study.recipes.items()
    }
    return values | {
        "profile": profile_of(values["profile"]),
        "run": run,
        "adapters": {cell.name: _section(study, cell, known[cell.adapter]) for cell in cells},
        "finetune": values["finetune"] | {"recipes": changed},
        "pca": values["pca"] | {"recipe": names[0]},
    }


def profile_of(profile: str) -> str:
    """What a study of a profile is called, and so where its results are."""
    return f"{profile}-study"


def _section(study: Study, cell: Cell, base: dict[str, Any]) -> dict[str, Any]:
    """The section of a training, as adapters.<name>."""
    method, seed = study.methods[cell.method], {"seed": cell.seed}
    budget: dict[str, Any] = {"max_steps": study.steps, "epochs": ENDLESS}
    if cell.seconds:
        budget |= {"max_steps": None, "max_seconds": cell.seconds}
    if method.pretrain.get("max_steps") == 0:
        budget = {}
    finetune = {
        recipe: merged(merged(base["finetune"].get(recipe, {}), method.finetune.get(recipe, {})), seed)
        for recipe in study.recipes
    }
    return {
        "architecture": {"kind": cell.adapter} | base["architecture"],
        "pretrain": merged(merged(base["pretrain"], method.pretrain), {**seed, **budget, "validations": 1}),
        "finetune": finetune,
    }
