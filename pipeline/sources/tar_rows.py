"""The captions and the class of a sample in a tar; captions as img2dataset writes them."""

from __future__ import annotations

import json
from typing import Any

import fsspec

from pipeline.errors import UserError
from pipeline.files import foreign_faults
from pipeline.sources import texts
from pipeline.sources.coco import group_of
from pipeline.sources.folders import LeftOut
from pipeline.sources.rows import Row
from pipeline.sources.tar_index import LONGEST_TEXT, Sample

LONGEST_NUMBER = 9  # digits


def caption_row(sample: Sample, left_out: list[LeftOut]) -> Row:
    """The row of a picture with its captions; those that can't be read go to `left_out` where there are others."""
    values, faults = _json(sample)
    captions, faults = _captions(sample, values, faults)
    if captions:
        left_out += [LeftOut(str(sample.place), fault, id=sample.key) for fault in faults]
    reason = None if captions else (faults or ["no caption"])[0]
    return Row(sample.key, sample.place, captions, None, None, reason, group_of(values.get("group")))


def _captions(sample: Sample, values: dict[str, Any], faults: list[str]) -> tuple[list[str], list[str]]:
    """The distinct captions, and the reasons why a text is not used; `values` and `faults` are those of its json."""
    several, one = values.get("captions") or [], values.get("caption")
    if not isinstance(several, list):
        several = []
        faults.append('"captions" in its json is no list')
    found = [*several, *([] if one is None else [one])]
    if not all(isinstance(caption, str) for caption in found):
        faults.append("a caption in its json is no text")
    text, fault = _text(sample, "txt")
    usable = [caption.strip() for caption in [*found, text] if isinstance(caption, str) and caption.strip()]
    return list(dict.fromkeys(usable)), faults + fault


def class_row(names: dict[str, list[str]], sample: Sample, left_out: list[LeftOut]) -> Row:
    """The row of a picture with its class. `names` keeps what is read of classes.txt files; UserError for them."""
    values, faults = _json(sample)
    label, faults = _label(sample, names, values, faults)
    if label:
        left_out += [LeftOut(str(sample.place), fault, id=sample.key) for fault in faults]
    reason = None if label else (faults or ["no class"])[0]
    group = group_of(values.get("group"))
    return Row(sample.key, sample.place, [label] if label else [], label, None, reason, group)


def _label(
    sample: Sample, names: dict[str, list[str]], values: dict[str, Any], faults: list[str]
) -> tuple[str | None, list[str]]:
    """The class in words, and why a text is not used; the words of json first, as cls often holds a number only."""
    given = [values.get(key) for key in ("class_name", "class", "label")]
    text, fault = _text(sample, "cls")
    faults += fault
    given = [int(value) if isinstance(value, float) and value.is_integer() else value for value in [*given, text]]
    found = [str(value).strip() for value in given if isinstance(value, str | int) and not isinstance(value, bool)]
    words = [one for one in found if one and not one.isdecimal()]
    if words:
        return " ".join(words[0].replace("_", " ").split()), faults
    numbers = [one for one in found if one.isdecimal()]
    if numbers and len(numbers[0]) > LONGEST_NUMBER:
        return None, [*faults, "its class is a number beyond all classes"]
    return _class_name(sample, int(numbers[0]), names) if numbers else None, faults


def _class_name(sample: Sample, number: int, names: dict[str, list[str]]) -> str:
    """Line `number` of classes.txt in the shard's folder; `names` holds the lines of the files read so far."""
    folder, slash, _ = sample.shard.rpartition("/")
    path = f"{folder}{slash}classes.txt"
    if path not in names:

        def fault(reason: str) -> UserError:
            return UserError(
                path,
                reason,
                (
                    f"{sample.key} of {sample.shard} has the class {number}: write there the classes' names, "
                    "one a line, that of class 0 first"
                ),
            )

        with foreign_faults(fault, lambda _: fault("no such file")), fsspec.open(path, "rb") as file:
            names[path] = texts.decode(file.read()).splitlines()
    if number >= len(names[path]) or not names[path][number].strip():
        raise UserError(path, f"no line for the class {number} of {sample.key} in {sample.shard}", "complete it")
    return " ".join(names[path][number].replace("_", " ").split())


def _json(sample: Sample) -> tuple[dict[str, Any], list[str]]:
    """What its json says, and why that is nothing."""
    text, fault = _content(sample, "json")
    if text is None:
        return {}, fault
    try:
        values = texts.parse_json(text)
    except json.JSONDecodeError:
        return {}, ["its json is not valid JSON"]
    except ValueError as error:
        return {}, [f"its json is {str(error).partition(':')[0]}"]
    return (values, []) if isinstance(values, dict) else ({}, ["its json is no object"])


def _text(sample: Sample, extension: str) -> tuple[str | None, list[str]]:
    """A text of it, and why it has none."""
    content, fault = _content(sample, extension)
    try:
        return (None if content is None else texts.decode(content)), fault
    except ValueError:
        return None, [f"its {extension} is not UTF-8 text"]


def _content(sample: Sample, extension: str) -> tuple[bytes | None, list[str]]:
    if extension not in sample.texts:
        return None, []
    content = sample.texts[extension].text
    return content, [f"its {extension} is over {LONGEST_TEXT} bytes long"] if content is None else []
