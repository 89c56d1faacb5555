"""Every parameter of every stage: one typed model per section of params.yaml; unknown keys are errors.

The sections of exchangeable parts (a source, an encoder, ...) hold here what all parts of a kind share; what only one
of them knows is in that part's own Settings, which derive from these.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from pipeline.config import components
from pipeline.config.base import (
    DEVICE,
    KEY,
    AboveZero,
    Folder,
    Name,
    NotNegative,
    Number,
    Positive,
    Prompt,
    Rate,
    Section,
    Seed,
    Share,
    Whole,
    whole,
)

DEFAULTS: dict[str, Any] = yaml.safe_load(resources.files(__package__).joinpath("defaults.yaml").read_text("utf-8"))
# Parts of the names of stages and folders, as in finetune@mlp-captions; without a hyphen, to be told apart.
Key = Annotated[str, StringConstraints(pattern=KEY)]


_Text = TypeVar("_Text", bound=str)


def default(key: str) -> Any:
    """The default of a key, as defaults.yaml has it."""
    value: Any = DEFAULTS
    for part in key.split("."):
        value = value[part]
    return Field(value)


def _distinct(names: list[_Text]) -> list[_Text]:
    if len(set(names)) != len(names):
        raise ValueError("each name once")
    return names


Keys = Annotated[list[Key], Field(min_length=1), AfterValidator(_distinct)]


class Part(Section):
    """What the parts of one kind share; the key NAMED names the part, whose own settings are then the section's."""

    KIND: ClassVar[str]
    NAMED: ClassVar[str]
    PART: ClassVar[str | None] = None  # the part where none is named

    @classmethod
    def chosen(cls, values: object) -> type[Section]:
        """The settings of the part that a section names; ValueError when it names none that there is."""
        name = values.get(cls.NAMED, cls.PART) if isinstance(values, Mapping) else None
        return components.settings_of(cls.KIND, name) if isinstance(name, str) else cls


def part(base: type[Part]) -> BeforeValidator:
    """Has a section checked by the settings of the part that it names."""

    def check(value: object) -> object:
        if not isinstance(value, Mapping):
            return value  # what is wrong with it, the section itself says
        name = value.get(base.NAMED, base.PART)
        if not isinstance(name, str):
            missing = "missing" if name is None else PydanticCustomError("part", "a text is expected here")
            raise _faults(base, missing, base.NAMED, value if name is None else name)
        try:
            settings = base.chosen(value)
        except ValueError as error:
            found = PydanticCustomError("part", "{message}", {"message": str(error)})
            raise _faults(base, found, base.NAMED, name) from None
        return settings.model_validate(value)

    return BeforeValidator(check)


def _faults(base: type[Section], what: Any, key: str, value: Any) -> ValidationError:
    return ValidationError.from_exception_data(base.__name__, [InitErrorDetails(type=what, loc=(key,), input=value)])


class DataSettings(Part):
    """One data set: where its pictures come from, and what is asked of them."""

    KIND, NAMED = "source", "source"

    task: Name = Field(description="what its texts are: caption, classify, or an own package.module:Class")
    source: Name = Field(description="the layout of its files")
    max_broken: Share = default("data.max_broken")
    # How parts are carved that its files do not give; blocks: of consecutive pictures, and groups whole.
    split: Literal["hash", "blocks"] = default("data.split")
    # A CSV file of the columns id and group, for blocks; `terraalign series` writes one.
    groups: Folder | None = default("data.groups")
    # Any text, for DVC, which does not watch pictures: with another one `prepare` reads them again.
    seen: str | None = default("data.seen")

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str) -> str:
        components.find("task", value)
        return value

    @field_validator("source")
    @classmethod
    def _holds_task(cls, value: str, info: ValidationInfo) -> str:
        task, held = info.data.get("task"), components.find("source", value).tasks
        if task is not None and task not in held:
            raise ValueError(f"has no texts for task {task}, only for {', '.join(held)}; take another source or task")
        return value


class Vision(Part):
    """The frozen vision encoder."""

    KIND, NAMED = "encoder", "encoder"

    encoder: Name
    model: str | None = default("vision.model")
    pretrained: str | None = default("vision.pretrained")
    dtype: Literal["auto", "float32", "bfloat16"] = default("vision.dtype")  # auto: bfloat16 where it is computed in
    # Who decodes plain JPEGs; auto: nvjpeg on a GPU, torchvision on a CPU. docs/store.md has the errors.
    decoder: Literal["auto", "pil", "torchvision", "nvjpeg"] = default("vision.decoder")
    batch: Positive = default("vision.batch")
    # What of a picture is kept beside its tokens, for training to draw from; not in `cache`, which no stage watches
    # whole. docs/store.md has what they are.
    views: Annotated[list[Literal["flip", "crop"]], AfterValidator(_distinct)] = default("vision.views")


class LLM(Part):
    """The frozen language model."""

    KIND, NAMED = "loader", "loader"

    loader: Name
    model: Name = Field(description="hub id or folder; gguf: a file, or the name of an installed package holding one")
    revision: Name | None = default("llm.revision")  # commit of the hub repository
    quantization: Literal["none", "nf4"] = default("llm.quantization")
    dtype: Literal["auto", "float32", "bfloat16"] = default("llm.dtype")
    system_prompt: str | None = default("llm.system_prompt")  # null: what the chat template says on its own
    max_caption_tokens: Positive = default("llm.max_caption_tokens")  # and never beyond the LLM's context


class Cache(Section):
    """The feature store."""

    shards: Positive
    dtype: Literal["float16", "bfloat16", "float32", "int8"]  # int8: with a scale per token
    reader: Literal["arrow", "webdataset"] = Field(
        default="arrow", description="what pretrain reads: the store, or the tars of `terraalign store export`"
    )
    tars: Name | None = Field(
        default=None,
        description="where the exports, a folder per data set, are: a folder or an fsspec URL; "
        "null: data/PROFILE/webdataset",
    )


class Optimisation(Section):
    """What pre-training and fine-tuning share: AdamW, warm-up then cosine decay, clipping."""

    epochs: Positive
    batch: Positive
    lr: Rate
    # Of this training alone, e.g. of one adapter of several that are alike; null: `seed`, which also splits the data.
    seed: Seed | None = default("pretrain.seed")
    max_steps: Positive | None = default("pretrain.max_steps")  # stop after this many optimiser steps
    # Batches a step; pre-training on a GPU solves one while the next runs, which takes 2 or more.
    accumulate: Positive = default("pretrain.accumulate")
    weight_decay: NotNegative = default("pretrain.weight_decay")
    warmup: Share = default("pretrain.warmup")  # share of the steps
    clip: AboveZero = default("pretrain.clip")
    validation_images: Positive = default("pretrain.validation_images")


class ObjectiveSettings(Part):
    """What pre-training minimises."""

    KIND, NAMED, PART = "objective", "name", "emd"

    name: Name = "emd"


class Pretrain(Optimisation):
    data: Keys = default("pretrain.data")  # data sets to learn from; the held-out figures are of the first
    objective: Annotated[SerializeAsAny[ObjectiveSettings], part(ObjectiveSettings)]
    candidates: Positive = default("pretrain.candidates")  # captions to choose from in retrieval
    validations: Positive | None = default("pretrain.validations")  # points over the run; null: after every epoch
    # Stop at the first step after so many seconds of training (on a CPU processor time by thread), validation apart;
    # what is learned then depends on the machine. To compare objectives that cost differently.
    max_seconds: AboveZero | None = default("pretrain.max_seconds")
    # 0: the start is the result
    max_steps: Annotated[Whole, Field(ge=0)] | None = default("pretrain.max_steps")


class LoRA(Section):
    r: Positive = default("finetune.lora.r")
    alpha: Positive = default("finetune.lora.alpha")
    dropout: Share = default("finetune.lora.dropout")
    modules: Annotated[list[Name], Field(min_length=1)] = default("finetune.lora.modules")


class Recipe(Optimisation):
    """One fine-tuning: on which data sets, in which mixture, with which prompts."""

    data: Keys
    mixture: dict[Key, AboveZero] | None = default("finetune.recipe.mixture")  # shares of the batches; null: by size
    prompts: dict[Key, Annotated[list[Prompt], Field(min_length=1)]]
    adapter_lr: Annotated[Number, Field(ge=0, le=1, description="of the adapter, lr is LoRA's; 0: it stays as it is")]
    # The likeliest names of a picture, as stage `name` found them without the LLM, that are written into the prompt,
    # in fine-tuning and for answers; 0: none. At most 10; of data sets of classes alone.
    hints: Annotated[Whole, Field(ge=0, le=10)] = default("finetune.recipe.hints")
    # The share of training pictures with hints that get the image tokens of a picture of one of these names. An adapter
    # knows training pictures by heart: without decoys its tokens would be trusted above the hints with new ones, too.
    decoys: Share = default("finetune.recipe.decoys")
    # Of an adapter that was not pre-trained; null: the same.
    scratch_adapter_lr: Rate | None = default("finetune.recipe.scratch_adapter_lr")
    validations: Positive = default("finetune.recipe.validations")  # validation points over the run, besides the first
    seed: Seed | None = default("finetune.recipe.seed")
    max_steps: Positive | None = default("finetune.recipe.max_steps")
    accumulate: Positive = default("finetune.recipe.accumulate")
    weight_decay: NotNegative = default("finetune.recipe.weight_decay")
    warmup: Share = default("finetune.recipe.warmup")
    clip: AboveZero = default("finetune.recipe.clip")
    validation_images: Positive = default("finetune.recipe.validation_images")  # of each data set

    @model_validator(mode="after")
    def _of_its_data(self) -> Recipe:
        for key, named in (("prompts", self.prompts), ("mixture", self.mixture)):
            if named is not None and set(named) != set(self.data):
                raise ValueError(f"{key} has to name exactly the data sets of data: {', '.join(self.data)}")
        return self


class Finetune(Section):
    lora: LoRA
    recipes: Annotated[dict[Key, Recipe], Field(min_length=1)]


class MetricSettings(Part):
    """A figure that is measured on the answers to test pictures."""

    KIND, NAMED = "metric", "metric"

    metric: Name


def _by_name(value: object) -> object:
    return {"metric": value} if isinstance(value, str) else value


class Evaluate(Section):
    """What all tasks share; the keys of each task are in its own Settings."""

    batch: Positive = default("evaluate.batch")
    metrics: list[Annotated[SerializeAsAny[MetricSettings], part(MetricSettings), BeforeValidator(_by_name)]] = Field(
        default_factory=lambda: [_metric(name) for name in DEFAULTS["evaluate"]["metrics"]],
        description="a name, or {metric: name, its settings}",
    )


def _metric(name: str) -> MetricSettings:
    return cast(MetricSettings, components.settings_of("metric", name).model_validate({"metric": name}))


class PCA(Section):
    data: Key  # the data set whose validation pictures and captions are looked at
    recipe: Key  # the fine-tuning that is looked at
    images: Positive = default("pca.images")
    vocabulary: Positive = default("pca.vocabulary")  # rows of the vocabulary to draw


class AdapterSection(Section):
    """One adapter: its architecture and its own values of pretrain.* and finetune.recipes.<recipe>.*.

    All three have to be there, empty where there is nothing to say: DVC watches each.
    """

    # Beside the architecture's own keys `kind`, a name or an own package.module:Class, where that is not the adapter's.
    architecture: dict[str, Annotated[Any, BeforeValidator(whole)]]
    pretrain: dict[str, Any]
    finetune: dict[Key, dict[str, Any]]


class Run(Section):
    """What the graph does: with which data sets, adapters and recipes, and what of it also without pre-training."""

    data: Keys
    adapters: Keys
    recipes: Keys
    scratch: Annotated[list[Key], AfterValidator(_distinct)]
    scratch_recipes: Annotated[list[Key], AfterValidator(_distinct)]


class Runtime(Section):
    """What does not decide the result; DVC does not track it."""

    device: Annotated[str, Field(pattern=DEVICE)] = "auto"
    engine: Literal["local", "ray"] = Field(
        default="local", description="where images are extracted: here, or a Ray cluster"
    )
    decode_threads: Positive = Field(
        default=2,
        description="threads that read and decode pictures; in extraction on a CPU at least as many as torch has",
    )
    emd_threads: Positive = 2
    activations: Literal["keep", "recompute"] = Field(
        default="keep",
        description="of the LLM in fine-tuning; recompute: a fraction of the memory, more time (checkpointing)",
    )


@cache
def evaluate_model(tasks: frozenset[str]) -> type[Evaluate]:
    """The section evaluate: its own keys and those of some tasks; those of our other tasks may be there."""
    own = dict.fromkeys(components.settings_of("task", name) for name in sorted(tasks))
    bases = [one for one in own if not any(other is not one and issubclass(other, one) for other in own)]
    known = {key for base in bases for key in base.model_fields}
    idle = [components.settings_of("task", name) for name in components.known("task") if name not in tasks]
    rest: dict[str, Any] = {key: (Any, None) for part in idle for key in part.model_fields if key not in known}
    return cast(type[Evaluate], create_model("Evaluate", __base__=cast(Any, (Evaluate, *bases)), **rest))
