"""Every parameter of every stage: one typed model per section of params.yaml; unknown keys are errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from pipeline.errors import UserError

Dataset = Literal["captions", "classes"]
DATASETS: tuple[Dataset, ...] = ("captions", "classes")
AdapterName = Literal["linear", "mlp", "self_attention", "query"]


def _not_empty(path: object) -> object:
    """An empty text would silently be the current folder."""
    if path == "":
        raise ValueError("name the folder; the current one is .")
    return path


def _whole(value: object) -> object:
    """4e3 is as good a count as 4000: YAML knows no whole number in that notation."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# A number in quotes is a text to every key, so that what one of them takes, all do, and DVC sees the same.
Whole = Annotated[int, BeforeValidator(_whole), Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
Positive = Annotated[Whole, Field(gt=0)]
Rate = Annotated[Number, Field(gt=0, le=1)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Name = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]
Folder = Annotated[Path, BeforeValidator(_not_empty)]
Prompt = Annotated[str, StringConstraints(min_length=1)]

# What an architecture may set; the defaults are in pipeline/adapters.py.
ARCHITECTURES: dict[AdapterName, frozenset[str]] = {
    "linear": frozenset({"pool", "dropout"}),
    "mlp": frozenset({"pool", "dropout", "hidden", "positions"}),
    "self_attention": frozenset({"pool", "dropout", "width", "blocks", "heads", "feed_forward"}),
    "query": frozenset({"pool", "dropout", "width", "blocks", "heads", "feed_forward", "queries"}),
}


def _distinct(names: list[AdapterName]) -> list[AdapterName]:
    if len(set(names)) != len(names):
        raise ValueError("each adapter once")
    return names


class Section(BaseModel):
    """A section of params.yaml: immutable, typed, closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans(cls, value: object) -> object:
        """No parameter is a boolean, and pydantic would take true for 1."""
        if isinstance(value, bool):
            raise ValueError("a number or a text is expected here; a text like true or yes needs quotes")
        return value


def _fits_source(value: Path | str | int | None, info: ValidationInfo) -> Path | str | int | None:
    """Rendered pictures need a count, tars need shards, folders need a root."""
    source = info.data.get("source")
    if source is None:
        return value
    if (source == "webdataset") != (value is not None) and info.field_name == "shards":
        what = f"shards are for source webdataset, not {source}; leave them out" if value else f"needed here: {SHARDS}"
        raise ValueError(what)
    if source == "webdataset" and value is not None and info.field_name == "root":
        raise ValueError("source webdataset reads what shards names; leave root out")
    if value is not None or source == "webdataset":
        return value
    if source.startswith("openmoji"):
        if info.field_name == "count":
            raise ValueError(f"source {source} needs a count: how many pictures to render")
    elif info.field_name == "root":
        key = f"data.{'captions' if source == 'coco' else 'classes'}.root"
        raise ValueError(
            f"source {source} needs the folder of the data set; write it here or use "
            f"`terraalign profile use NAME --set {key}=FOLDER`"
        )
    return value


SHARDS = "webdataset: tars, as a path, a glob, a range like shard-{0000..0009}.tar, or an fsspec URL"


class CaptionsData(Section):
    """Images with captions: rendered scenes, a folder in the COCO captions layout, or WebDataset tars."""

    source: Literal["openmoji_scenes", "coco", "webdataset"]
    root: Folder | None = Field(None, validate_default=True, description="folder of the data set; coco only")
    shards: Name | None = Field(None, validate_default=True, description=SHARDS)
    captions: str = Field("captions.json", description="COCO captions JSON, relative to root")
    images: str = Field("images", description="image folder, relative to root")
    count: Positive | None = Field(
        None, validate_default=True, description="scenes to render; else: at most this many images"
    )
    max_broken: Share = Field(0.01, description="share of unreadable pictures to quarantine before giving up")

    _sources = field_validator("root", "shards", "count")(_fits_source)


class ClassesData(Section):
    """Labelled images: rendered food, a Food-101 folder, a plain folder of class folders, or WebDataset tars."""

    source: Literal["openmoji_food", "food101", "imagefolder", "webdataset"]
    root: Folder | None = Field(None, validate_default=True, description="folder of the data set; for folders only")
    shards: Name | None = Field(None, validate_default=True, description=SHARDS)
    count: Positive | None = Field(
        None, validate_default=True, description="pictures per class to render; else: at most this many"
    )
    validation: Annotated[Number, Field(gt=0, lt=0.5)] = Field(0.1, description="share carved from train by hash")
    max_broken: Share = Field(0.01, description="share of unreadable pictures to quarantine before giving up")

    _sources = field_validator("root", "shards", "count")(_fits_source)


class Data(Section):
    captions: CaptionsData
    classes: ClassesData


class Vision(Section):
    """The frozen vision encoder."""

    encoder: Literal["efficientnet_lite0", "open_clip", "timm"]
    model: str | None = Field(None, description="open_clip or timm model name")
    pretrained: str | None = Field(None, description="open_clip: tag or file; timm: hub or file; random: untrained")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 where the processor computes in it, else float32"
    )
    decoder: Literal["auto", "pil", "torchvision", "nvjpeg"] = Field(
        "auto", description="of plain JPEGs; auto: nvjpeg on a GPU, torchvision on a CPU; docs/store.md has the errors"
    )
    batch: Positive = 8

    @model_validator(mode="after")
    def _model_named(self) -> Vision:
        if self.encoder != "efficientnet_lite0" and not self.model:
            raise ValueError(f"encoder {self.encoder} needs model: the name of the architecture")
        if self.encoder != "efficientnet_lite0" and not self.pretrained:
            raise ValueError(
                f"encoder {self.encoder} needs pretrained: a tag of open_clip, hub for timm, a weights file, "
                "or random for an untrained network"
            )
        return self


class LLM(Section):
    """The frozen language model."""

    loader: Literal["huggingface", "gguf"]
    model: Name = Field(description="hub id or folder; gguf: a file, or the name of an installed package holding one")
    revision: Name | None = Field(None, description="commit of the hub repository")
    quantization: Literal["none", "nf4"] = "none"
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 where the processor computes in it, else float32"
    )
    system_prompt: str | None = Field(None, description="null: what the chat template says on its own")
    max_caption_tokens: Positive = Field(
        512, description="captions are cut to this many tokens, and never go beyond the LLM's context"
    )


class Cache(Section):
    """The feature store."""

    shards: Positive = 8
    dtype: Literal["float16", "bfloat16", "float32", "int8"] = Field(
        "float16", description="int8: with a scale per token; docs/store.md has the errors"
    )
    reader: Literal["arrow", "webdataset"] = Field(
        default="arrow", description="what pretrain reads: the store, or the tars of `terraalign store export`"
    )
    tars: Name | None = Field(
        default=None,
        description="where the exports captions/ and classes/ are, a folder or an fsspec URL; "
        "null: data/PROFILE/webdataset",
    )


class Optimisation(Section):
    """What pre-training and fine-tuning share: AdamW, warm-up then cosine decay, clipping."""

    epochs: Positive
    batch: Positive
    lr: Rate
    max_steps: Positive | None = Field(None, description="stop after this many optimiser steps")
    accumulate: Positive = Field(
        1, description="batches a step; pre-training on a GPU solves one while the next runs, which takes 2 or more"
    )
    weight_decay: Annotated[Number, Field(ge=0)] = 0.01
    warmup: Share = Field(0.1, description="share of the steps")
    clip: Annotated[Number, Field(gt=0)] = 1.0
    validation_images: Positive = 512


class Objective(Section):
    """What pre-training minimises: EMD with this ground cost, marginal, start and solver."""

    cost: Literal["euclidean", "sqeuclidean", "cosine"]
    space: Literal["plain", "whitened"] = Field(
        "plain", description="whitened: costs where the words of the training captions spread alike in all directions"
    )
    word_weights: Literal["uniform", "idf", "idf_squared"]
    start: Literal["random", "constant_set"]
    contrast: Annotated[Number, Field(ge=0)] = Field(
        0.0, description="weight of a second loss: telling the batch's own captions from the others by EMD; 0: none"
    )
    temperature: Annotated[Number, Field(gt=0)] = Field(
        0.1, description="of the contrast, in units of the EMD: about what it differs by between pictures"
    )
    unmatched: Share = Field(0.0, description="share of the image tokens' mass that need not become a word")
    solver: Literal["exact", "pot", "sinkhorn"] = Field(
        "exact", description="pot: exact too, by the library POT; sinkhorn: approximate, for comparison"
    )

    @model_validator(mode="after")
    def _partial_is_exact(self) -> Objective:
        if self.unmatched and self.solver == "sinkhorn":
            raise ValueError("unmatched mass needs an exact solver: set solver to exact, or unmatched to 0")
        return self


class Pretrain(Optimisation):
    data: Annotated[list[Dataset], Field(min_length=1)] = Field(
        ["captions"], description="data sets to learn from; the held-out figures are of captions"
    )
    objective: Objective
    candidates: Positive = Field(100, description="captions to choose from in retrieval")

    @field_validator("data")
    @classmethod
    def _held_out_captions(cls, value: list[Dataset]) -> list[Dataset]:
        if "captions" not in value or len(set(value)) < len(value):
            raise ValueError("captions has to be among them, for the held-out figures, and each at most once")
        return value


class LoRA(Section):
    r: Positive = 8
    alpha: Positive = 32
    dropout: Share = 0.1
    modules: Annotated[list[Name], Field(min_length=1)] = ["q_proj", "v_proj"]


class FinetuneTask(Optimisation):
    prompts: Annotated[list[Prompt], Field(min_length=1)]
    adapter_lr: Rate = Field(description="learning rate of the adapter; lr is LoRA's")
    validations: Positive = Field(8, description="validation points over the run, besides the first")


class Finetune(Section):
    lora: LoRA
    captions: FinetuneTask
    classes: FinetuneTask


class Evaluate(Section):
    batch: Positive = 32
    class_tokens: Positive = 16
    caption_tokens: Positive = 40
    captions: Positive = Field(48, description="test pictures to caption")
    pretrained_prompt: Prompt
    pretrained_prefix: str = Field("", description="first words of a caption before fine-tuning; the LLM goes on")
    pretrained_repetition_penalty: Annotated[Number, Field(ge=1)] = Field(1.0, description="1: none")
    finetuned_prompt: Prompt
    class_prompt: Prompt


class PCA(Section):
    images: Positive = 200
    vocabulary: Positive = Field(5000, description="rows of the vocabulary to draw")


class AdapterSection(Section):
    """One adapter: its architecture and its own values of pretrain.* and finetune.<data set>.*."""

    architecture: dict[str, Annotated[StrictInt | StrictFloat, BeforeValidator(_whole)]] = {}
    pretrain: dict[str, Any] = {}
    finetune: dict[Dataset, dict[str, Any]] = {}


class Run(Section):
    """Which adapters the graph trains, and which also from scratch."""

    adapters: Annotated[list[AdapterName], Field(min_length=1), AfterValidator(_distinct)]
    scratch: Annotated[list[AdapterName], Field(min_length=1), AfterValidator(_distinct)]


class Runtime(Section):
    """What does not decide the result; DVC does not track it."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
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


class Params(Section):
    """The whole of params.yaml."""

    profile: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    seed: Annotated[Whole, Field(ge=0, lt=2**31)]
    run: Run
    data: Data
    vision: Vision
    llm: LLM
    cache: Cache
    adapters: dict[AdapterName, AdapterSection]
    pretrain: Pretrain
    finetune: Finetune
    evaluate: Evaluate
    pca: PCA
    runtime: Runtime = Runtime()

    @field_validator("profile")
    @classmethod
    def _own_folder(cls, value: str) -> str:
        if value in ("store", "raw", "models"):
            raise ValueError("data/store, data/raw and data/models are shared by all profiles; take another name")
        return value

    @model_validator(mode="after")
    def _adapters_fit(self) -> Params:
        for name in {**dict.fromkeys(self.run.adapters), **dict.fromkeys(self.run.scratch)}:
            if name not in self.adapters:
                raise _fault_at(("run",), f"names the adapter {name}; add a section adapters.{name}")
        for name in self.run.scratch:
            if name not in self.run.adapters:
                raise _fault_at(("run", "scratch"), f"names {name}, which run.adapters does not train")
        for name, section in self.adapters.items():
            _check_architecture(name, section.architecture)
            self.pretrain_for(name)
            for dataset in DATASETS:
                self.finetune_for(name, dataset)
        return self

    def _adapter(self, name: AdapterName) -> AdapterSection:
        if name not in self.adapters:
            raise UserError(f"params.yaml has no section adapters.{name}; add one, and the adapter to run.adapters")
        return self.adapters[name]

    def pretrain_for(self, adapter: AdapterName) -> Pretrain:
        """The pretrain section with this adapter's overrides; UserError when there is no such adapter."""
        return _override(self.pretrain, self._adapter(adapter).pretrain, ("adapters", adapter, "pretrain"))

    def finetune_for(self, adapter: AdapterName, dataset: Dataset) -> FinetuneTask:
        """finetune.<data set> with this adapter's overrides; UserError when there is no such adapter."""
        section = self.finetune.captions if dataset == "captions" else self.finetune.classes
        overrides = self._adapter(adapter).finetune.get(dataset, {})
        return _override(section, overrides, ("adapters", adapter, "finetune", dataset))


_S = TypeVar("_S", bound=Section)


def _override(section: _S, changes: dict[str, Any], where: tuple[str, ...]) -> _S:
    if not changes:
        return section
    try:
        return type(section).model_validate(_merged(section.model_dump(), changes))
    except ValidationError as error:
        first = error.errors()[0]
        key = tuple(str(part) for part in first["loc"])
        known = sorted(type(section).model_fields)
        message = _unknown(key[-1], known) if first["type"] == "extra_forbidden" else _message(dict(first))
        raise _fault_at((*where, *key), message, first["input"]) from None


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes`, section by section."""
    nested = {key: _merged(values[key], new) for key, new in changes.items() if isinstance(new, dict) and key in values}
    return {**values, **changes, **nested}


def _check_architecture(name: AdapterName, values: dict[str, int | float]) -> None:
    """Keys and values that no adapter of this name can have."""
    where = ("adapters", name, "architecture")
    for key, value in values.items():
        if key not in ARCHITECTURES[name]:
            raise _fault_at((*where, key), _unknown(key, sorted(ARCHITECTURES[name])), value)
        if key == "dropout":
            if isinstance(value, bool) or not 0 <= value < 1:
                raise _fault_at((*where, key), "Input should be at least 0 and less than 1", value)
        elif type(value) is not int or value < 1:
            raise _fault_at((*where, key), "Input should be a whole number greater than 0", value)
    width, heads = values.get("width"), values.get("heads", 4)
    if width is not None and width % heads:
        raise _fault_at((*where, "width"), f"Input should be a multiple of heads, {heads}", width)


def _fault_at(where: tuple[str, ...], message: str, value: Any = None) -> PydanticCustomError:
    """A fault of the key `where`, found by a check that sees more than one section."""
    return PydanticCustomError("elsewhere", "{message}", {"where": where, "message": message, "value": value})


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check a parameter file.

    Raises UserError, one line per fault: file, line, key, the value found and what is allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `terraalign profile use demo` in the project folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    return parse_params(text, str(path))


def parse_params(text: str, name: str) -> Params:
    """Check the text of a parameter file; `name` stands for the file in faults. Raises like load_params."""
    tree, values = _read(text, name)
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        # What is missing comes last: it is often only a key that an unknown one misspells.
        found = sorted(error.errors(), key=lambda fault: fault["type"] == "missing")
        faults = [_fault(name, tree, dict(fault)) for fault in found]
        raise UserError("\n".join(faults)) from None


def read_yaml(text: str, name: str) -> dict[str, Any]:
    """The values of a parameter file as DVC reads them too: by YAML 1.2, where 1e-3 is a number, and no is a text.

    Raises UserError, a line per fault, for what is no mapping of plain values: broken YAML, keys twice or that are no
    text, an alias of what it stands in, tags for other types, more than MOST values.
    """
    return _read(text, name)[1]


def _read(text: str, name: str) -> tuple[Node, dict[str, Any]]:
    reader = YAML(typ="safe", pure=True)
    try:
        tree = reader.compose(text)
        if not isinstance(tree, MappingNode):
            kind = {ScalarNode: "a single value", SequenceNode: "a list"}.get(type(tree), "nothing")
            raise UserError(f"{name}: expected a mapping of sections, found {kind}")
        build = SafeConstructor(loader=reader)
        faults = [f"{name}:{line}: {fault}" for line, fault in _structure(tree, build)]
        if faults:
            raise UserError("\n".join(faults))
        values: dict[str, Any] = build.construct_document(tree)
    except RecursionError:
        raise UserError(f"{name}: not valid YAML: nested too deeply") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
        why = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{name}:{at + 1}: not valid YAML: {why}") from None
    return tree, values


MOST = 10_000
"""Values in a parameter file, those of aliases each time they are used: a few lines can stand for billions."""
PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map")}


def _structure(tree: Node, build: SafeConstructor) -> Iterator[tuple[int, str]]:
    """Faults that no value of a mapping of plain values has, with their lines."""
    count = 0

    def walk(node: Node, where: str, above: tuple[Node, ...]) -> Iterator[tuple[int, str]]:
        nonlocal count
        count += 1
        line = node.start_mark.line + 1
        if any(node is other for other in above):
            yield line, f"{where}: an alias of what it stands in; write the value out"
        elif str(node.tag) not in PLAIN:
            yield line, f"{where}: a value of type {node.tag} has no place here; a text needs quotes"
        elif count > MOST:
            if count == MOST + 1:
                yield line, f"{where}: aliases make this more than {MOST:,} values; write out what is needed"
        elif isinstance(node, SequenceNode):
            for number, child in enumerate(node.value):
                yield from walk(child, f"{where}.{number}", (*above, node))
        elif isinstance(node, MappingNode):
            yield from _keys(node, where)
            for key, child in node.value:
                yield from walk(child, f"{where}.{key.value}" if where else str(key.value), (*above, node))
        elif isinstance(node, ScalarNode):
            yield from _scalar(node, where, build)

    return walk(tree, "", ())


def _keys(node: MappingNode, where: str) -> Iterator[tuple[int, str]]:
    """Keys that are no text, or here for the second time; YAML would keep the last one silently."""
    seen = set()
    for key, _ in node.value:
        line = key.start_mark.line + 1
        name = f"{where}.{key.value}" if where else str(key.value)
        if not isinstance(key, ScalarNode) or str(key.tag).rpartition(":")[2] not in ("str", "merge"):
            yield line, f"{where or 'the file'}: a key that is no text; put it in quotes, or correct it"
        elif key.value in seen:
            yield line, f"{name} is here for the second time; keep one"
        seen.add(str(key.value))


def _scalar(node: ScalarNode, where: str, build: SafeConstructor) -> Iterator[tuple[int, str]]:
    """A date or number that is none, a text that UTF-8 cannot hold."""
    try:
        node.value.encode()
        build.construct_document(node)
    except UnicodeEncodeError:
        yield node.start_mark.line + 1, f"{where}: half a surrogate pair is no text; write the character itself"
    except ValueError as error:
        yield node.start_mark.line + 1, f"{where} is {node.value[:40]}: {error}; a text needs quotes"


def _fault(name: str, tree: Node, fault: dict[str, Any]) -> str:
    """`params.yaml:12: pretrain.lr is -1: ...` for one pydantic fault."""
    loc = [part for part in fault["loc"] if part != "[key]"]
    found, message = fault["input"], _message(fault)
    if fault["type"] == "missing":
        message, found = "this key is missing; see profiles/demo.yaml for its use", {}
    elif fault["type"] == "extra_forbidden":
        message = _unknown(str(loc[-1]), _known_keys(loc[:-1]))
    elif fault["type"] == "elsewhere":
        loc, found = list(fault["ctx"]["where"]), fault["ctx"]["value"]
        found = {} if found is None else found
    key = ".".join(map(str, loc)) or "the file"
    value = "" if isinstance(found, dict) else f" is {_yaml(found)}"
    return f"{name}:{_line(tree, loc)}: {key}{value}: {message}"


def _message(fault: dict[str, Any]) -> str:
    if fault["type"] in ("string_type", "path_type") and isinstance(fault["input"], int | float | date):
        return "a text is expected here; put it in quotes"
    if fault["type"] in ("int_type", "float_type") and isinstance(fault["input"], str):
        kind = "integer" if fault["type"] == "int_type" else "number"
        return f"should be a valid {kind}, without quotes"
    return str(fault["msg"]).removeprefix("Value error, ").replace("Input should be", "should be")


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    return f"unknown key; {guess}known here: {', '.join(known)}"


def _yaml(value: object) -> str:
    """A value on one line, as the file may have it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).split("\n")[0]


def _line(node: Node, loc: list[Any]) -> int:
    """The 1-based line of the deepest part of `loc` that the file has."""
    line = node.start_mark.line
    for part in loc:
        child = None
        if isinstance(node, MappingNode):
            for key_node, value_node in node.value:
                if key_node.value == str(part):
                    line, child = key_node.start_mark.line, value_node
        elif isinstance(node, SequenceNode) and isinstance(part, int) and part < len(node.value):
            child = node.value[part]
            line = child.start_mark.line
        if child is None:
            break
        node = child
    return int(line) + 1


def reads_text(key: Sequence[str]) -> bool | None:
    """Whether a key of params.yaml takes a text: None if it does and null too, False for all other keys."""
    model: Any = Params
    if key[:1] == ["adapters"] and len(key) > 3:
        model, key = (Pretrain, key[3:]) if key[2] == "pretrain" else (FinetuneTask, key[4:])
    for part in key:
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, Section) else None
        if field is None:
            return False
        model = field.annotation
    kinds = _kinds(model)
    return bool(kinds & {str, Path}) and (None if type(None) in kinds else True)


def _kinds(annotation: Any) -> set[Any]:
    """The types that a field takes."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kinds(inner[0])
    if origin is Literal:
        return {type(value) for value in inner}
    return set().union(*map(_kinds, inner)) if origin in (Union, UnionType) else {origin or annotation}


def _known_keys(loc: list[Any]) -> list[str]:
    model: Any = Params
    for part in loc:
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, Section) else None
        if field is None:
            return sorted(AdapterSection.model_fields) if loc[0] == "adapters" else []
        model = field.annotation
    return sorted(model.model_fields) if isinstance(model, type) and issubclass(model, Section) else []
