"""The whole of params.yaml, and what only a look at several of its sections can check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import Field, SerializeAsAny, ValidationError, ValidationInfo, field_validator, model_validator

from pipeline.config import components
from pipeline.config.base import PROFILE, Section, Seed, fault_at
from pipeline.config.messages import message_of
from pipeline.config.schema import (
    LLM,
    PCA,
    AdapterSection,
    Cache,
    DataSettings,
    Evaluate,
    Finetune,
    Key,
    Pretrain,
    Recipe,
    Run,
    Runtime,
    Vision,
    evaluate_model,
    part,
)
from pipeline.errors import UserError


class Params(Section):
    """The whole of params.yaml."""

    profile: Annotated[str, Field(pattern=PROFILE)]
    seed: Seed
    run: Run
    data: Annotated[dict[Key, Annotated[SerializeAsAny[DataSettings], part(DataSettings)]], Field(min_length=1)]
    vision: Annotated[SerializeAsAny[Vision], part(Vision)]
    llm: Annotated[SerializeAsAny[LLM], part(LLM)]
    cache: Cache
    adapters: dict[Key, AdapterSection]
    pretrain: Pretrain
    finetune: Finetune
    evaluate: SerializeAsAny[Evaluate]
    pca: PCA
    runtime: Runtime = Runtime()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by value, for processes that share the work: the sections of some parts are classes made here."""
        return Params.model_validate, (self.model_dump(),)

    @field_validator("profile")
    @classmethod
    def _own_folder(cls, value: str) -> str:
        if value in ("store", "raw", "models"):
            raise ValueError("data/store, data/raw and data/models are shared by all profiles; take another name")
        return value

    @field_validator("evaluate", mode="before")
    @classmethod
    def _of_tasks(cls, value: object, info: ValidationInfo) -> object:
        if "data" not in info.data:  # at fault itself, and so which tasks there are is not known
            return Evaluate.model_construct()
        sets: dict[str, DataSettings] = info.data["data"]
        return evaluate_model(frozenset(entry.task for entry in sets.values())).model_validate(value)

    @model_validator(mode="after")
    def _names_fit(self) -> Params:
        self._check_data()
        self._check_metrics()
        for name, section in self.adapters.items():
            self._check_adapter(name, section)
        for name in {**dict.fromkeys(self.run.adapters), **dict.fromkeys(self.run.scratch)}:
            if name not in self.adapters:
                raise fault_at(("run",), f"names the adapter {name}; add a section adapters.{name}")
        _check_among("run.scratch", self.run.scratch, "run.adapters", self.run.adapters, "which {} does not train")
        return self

    def _check_data(self) -> None:
        """Every name of a data set or recipe is that of one that there is, and that the graph makes."""
        run, recipes = self.run, self.finetune.recipes
        _check_among("run.data", run.data, "data", self.data, "which {} does not have")
        _check_among("run.recipes", run.recipes, "finetune.recipes", recipes, "which {} does not have")
        _check_among("run.scratch_recipes", run.scratch_recipes, "run.recipes", run.recipes, "which {} does not have")
        for name in run.recipes:
            key = f"finetune.recipes.{name}.data"
            _check_among(key, recipes[name].data, "run.data", run.data, "which {} does not have")
            if recipes[name].hints and not any(self.data[data].task == "classify" for data in recipes[name].data):
                where = ("finetune", "recipes", name, "hints")
                raise fault_at(where, "is for data sets with the task classify, which have names; leave it out here")
        _check_among("pretrain.data", self.pretrain.data, "run.data", run.data, "which {} does not have")
        _check_among("pca.data", [self.pca.data], "run.data", run.data, "which {} does not have")
        _check_among("pca.recipe", [self.pca.recipe], "run.recipes", run.recipes, "which {} does not have")

    def _check_metrics(self) -> None:
        encoder, name = components.find("encoder", self.vision.encoder), self.vision.encoder
        for at, metric in enumerate(self.evaluate.metrics):
            if components.find("metric", metric.metric).needs_text_tower and not encoder.has_text_tower():
                why = f"vision.encoder {name} has no text tower; take {metric.metric} out of evaluate.metrics"
                raise fault_at(("evaluate", "metrics", str(at)), why, metric.metric)

    def _check_adapter(self, name: str, section: AdapterSection) -> None:
        where = ("adapters", name)
        try:
            settings = components.settings_of("adapter", self.kind_of(name))
        except ValueError as error:
            key = ("architecture", "kind") if "kind" in section.architecture else ()
            raise fault_at((*where, *key), str(error), self.kind_of(name)) from None
        _validated(settings, section.architecture, (*where, "architecture"))
        self.pretrain_for(name)
        _check_among(
            f"adapters.{name}.finetune",
            section.finetune,
            "finetune.recipes",
            self.finetune.recipes,
            "which {} does not have",
        )
        for recipe in section.finetune:
            self.finetune_for(name, recipe)

    def data_set(self, name: str) -> DataSettings:
        """A data set by its name; UserError when there is none."""
        if name not in self.data:
            raise UserError("", f"params.yaml has no data set {name}", f"it has {', '.join(self.data)}")
        return self.data[name]

    def adapter(self, name: str) -> AdapterSection:
        """The section of an adapter; UserError when there is none."""
        if name not in self.adapters:
            raise UserError(
                "", f"params.yaml has no section adapters.{name}", "add one, and the adapter to run.adapters"
            )
        return self.adapters[name]

    def kind_of(self, adapter: str) -> str:
        """The architecture of an adapter: its own name, if it names no other."""
        return str(self.adapter(adapter).architecture.get("kind") or adapter)

    def pretrain_for(self, adapter: str) -> Pretrain:
        """The pretrain section with this adapter's overrides; UserError when there is no such adapter."""
        return _override(self.pretrain, self.adapter(adapter).pretrain, ("adapters", adapter, "pretrain"))

    def seeded(self, settings: Pretrain | Recipe) -> Params:
        """The same with the seed of one training, where that has its own."""
        return self if settings.seed is None else self.model_copy(update={"seed": settings.seed})

    def finetune_for(self, adapter: str, recipe: str) -> Recipe:
        """A recipe with this adapter's overrides; UserError when there is no such adapter or recipe."""
        if recipe not in self.finetune.recipes:
            names = ", ".join(self.finetune.recipes)
            raise UserError("", f"params.yaml has no recipe {recipe} under finetune.recipes", f"it has {names}")
        overrides = self.adapter(adapter).finetune.get(recipe, {})
        return _override(self.finetune.recipes[recipe], overrides, ("adapters", adapter, "finetune", recipe))


def _check_among(key: str, names: Any, owner: str, known: Any, otherwise: str) -> None:
    for name in names:
        if name not in known:
            raise fault_at(tuple(key.split(".")), f"names {name}, {otherwise.format(owner)}: {', '.join(known)}")


_S = TypeVar("_S", bound=Section)


def _override(section: _S, changes: dict[str, Any], where: tuple[str, ...]) -> _S:
    if changes.get("data") is not None:
        raise fault_at((*where, "data"), "is the same for all adapters; leave it out here", changes["data"])
    values, objective = section.model_dump(), changes.get("objective")
    if isinstance(objective, dict) and "name" in objective and objective["name"] != values["objective"]["name"]:
        values["objective"] = {}  # the keys of another part are none of this one's
    return _validated(type(section), merged(values, changes), where) if changes else section


def _validated(settings: type[_S], values: dict[str, Any], where: tuple[str, ...]) -> _S:
    """The values as `settings` has them; the first fault is told at its key below `where`."""
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = tuple(str(part) for part in first["loc"])
        raise fault_at((*where, *key), message_of(dict(first), settings, values), first["input"]) from None


def merged(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `changes`, section by section."""
    nested = {
        key: merged(values[key], new)
        for key, new in changes.items()
        if isinstance(new, dict) and isinstance(values.get(key), dict)
    }
    return {**values, **changes, **nested}
