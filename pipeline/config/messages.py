"""What is wrong with a value of params.yaml, and which keys there are."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pipeline.config import components
from pipeline.config.base import IN_WORDS, Section
from pipeline.config.schema import Part, Pretrain, Recipe, evaluate_model


def message_of(fault: Mapping[str, Any], model: type[Section], values: Mapping[str, Any]) -> str:
    """What is wrong with a value, and what is allowed; `values` are those of a section checked by `model`."""
    if fault["type"] == "extra_forbidden":
        *above, key = fault["loc"]
        section = _model_at(model, above, values)
        return _moved(fault["loc"], values) or _unknown(str(key), sorted(section.model_fields) if section else [])
    if fault["type"] in ("string_type", "path_type") and isinstance(fault["input"], int | float | date):
        return "a text is expected here; put it in quotes"
    if fault["type"] in ("int_type", "float_type") and isinstance(fault["input"], str):
        kind = "integer" if fault["type"] == "int_type" else "number"
        return f"should be a valid {kind}, without quotes"
    if fault["type"] == "list_type" and isinstance(fault["input"], str):
        return f"should be a list, such as [{fault['input']}]"
    if fault["type"] == "string_pattern_mismatch" and (words := IN_WORDS.get(fault["ctx"]["pattern"])):
        return words
    return str(fault["msg"]).removeprefix("Value error, ").replace("Input should be", "should be")


def _moved(loc: Sequence[Any], values: Mapping[str, Any]) -> str | None:
    """Where a key of earlier parameter files stands now."""
    section = values["finetune"][loc[1]] if len(loc) == 2 and loc[0] == "finetune" else None
    sets = values.get("data")
    if not isinstance(section, dict) or not isinstance(sets, dict) or loc[1] not in sets:
        return None
    name = loc[1]
    return (
        f"moved to finetune.recipes.{name}, there with data: [{name}], its prompts as prompts: {{{name}: [...]}}, and "
        f"{name} among run.recipes"
    )


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    return f"unknown key; {guess}known here: {', '.join(known)}"


def reads_text(key: Sequence[str], values: Mapping[str, Any], whole: type[Section]) -> bool | None:
    """Whether a key of params.yaml takes a text: None if it does and null too, False for all other keys.

    `values` are those of the file, checked by `whole`: which keys there are depends on the parts that it names.
    """
    model = whole
    if key[:1] == ["adapters"] and len(key) > 3 and key[2] == "pretrain":
        model, key, values = Pretrain, key[3:], {}
    elif key[:1] == ["adapters"] and len(key) > 4 and key[2] == "finetune":
        model, key, values = Recipe, key[4:], {}
    section = _model_at(model, key[:-1], values)
    field = section.model_fields.get(key[-1]) if section else None
    if field is None:
        return False
    kinds = _kinds(field.annotation)
    return bool(kinds & {str, Path}) and (None if type(None) in kinds else True)


def keys_of(section: Sequence[str], values: Mapping[str, Any], whole: type[Section]) -> set[str]:
    """The keys that a section may have, by the part that it names; none where it names none that there is."""
    model = _model_at(whole, section, values)
    return set(model.model_fields) if model else set()


def _model_at(model: Any, loc: Sequence[Any], values: Any) -> type[Section] | None:
    """The model of the section at `loc` below one that `model` checks; None where no model knows its keys."""
    tasks = _tasks(values)
    for part in loc:
        values = values[part] if _has(values, part) else {}
        if isinstance(model, type) and issubclass(model, Section):
            field = model.model_fields.get(part)
            model = field.annotation if field else None
            if part == "evaluate":
                model = evaluate_model(tasks)
        else:  # an entry of a mapping or list
            model = get_args(model)[-1] if get_args(model) else None
        model = _plain(model)
        if isinstance(model, type) and issubclass(model, Part):
            try:
                model = model.chosen(values)
            except ValueError:
                return None
    return model if isinstance(model, type) and issubclass(model, Section) else None


def _tasks(values: Any) -> frozenset[str]:
    """The tasks that the data sets of a file name, as far as there are such."""
    sets = values.get("data") if isinstance(values, Mapping) else None
    found = set()
    for entry in sets.values() if isinstance(sets, Mapping) else ():
        task = entry.get("task") if isinstance(entry, Mapping) else None
        if isinstance(task, str):
            with suppress(ValueError):
                components.find("task", task)
                found.add(task)
    return frozenset(found)


def _has(values: Any, part: Any) -> bool:
    return (isinstance(values, Mapping) and part in values) or (
        isinstance(values, list) and isinstance(part, int) and part < len(values)
    )


def _plain(annotation: Any) -> Any:
    """A field's type without what is annotated to it, and without None."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        inner = [kind for kind in get_args(annotation) if kind is not type(None)]
        return _plain(inner[0]) if len(inner) == 1 else annotation
    return annotation


def _kinds(annotation: Any) -> set[Any]:
    """The types that a field takes."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kinds(inner[0])
    if origin is Literal:
        return {type(value) for value in inner}
    return set().union(*map(_kinds, inner)) if origin in (Union, UnionType) else {origin or annotation}
