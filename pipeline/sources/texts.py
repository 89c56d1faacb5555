"""Texts and JSON as people have them: any form of Unicode, and one line for whatever is wrong."""

from __future__ import annotations

import codecs
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.errors import readable

NAMED = 20  # so many are named on stderr; the listing names all of them
# Keys that are read here: one of them twice in an object would lose the first silently.
KEYS = frozenset(
    {"images", "annotations", "id", "image_id", "file_name", "caption", "captions", "class_name", "class", "label"}
    | {"file", "image", "path", "text", "texts"}
)


def decode(content: bytes) -> str:
    """Text from bytes in UTF-8, or in UTF-16 or UTF-32 with their mark; marks are left out. Raises ValueError."""
    marks = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encodings = ("utf-32", "utf-32", "utf-16", "utf-16")
    encoding = next((e for mark, e in zip(marks, encodings, strict=True) if content.startswith(mark)), "utf-8-sig")
    return _decoded(content, encoding)


def parse_json(content: bytes) -> Any:
    """The value of a JSON text in UTF-8, UTF-16 or UTF-32, with or without a mark.

    Raises json.JSONDecodeError, which has the place, or another ValueError with the reason: empty, no text, nested too
    deep, a number beyond all measure, a key of KEYS twice.
    """
    if not content.strip(b" \t\r\n\0"):
        raise ValueError("empty")
    text = _decoded(content, json.detect_encoding(content)).removeprefix("\ufeff")
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("not valid JSON: nested too deep") from None
    except ValueError as error:
        if "digits" in str(error) and not isinstance(error, json.JSONDecodeError):
            raise ValueError("not valid JSON: a number with thousands of digits") from None
        raise


def _decoded(content: bytes, encoding: str) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: byte {error.start}; save it as UTF-8") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        for key, value in pairs:
            if key in KEYS and values[key] != value:
                raise ValueError(f"ambiguous, with two values of the key {key!r} in one object")
    return values


def one_line(text: object) -> str:
    """`text` for people, on one line whatever is in it."""
    return readable(text).replace("\n", "\\n")


def number(count: int, one: str, more: str) -> str:
    """`1 picture has`, `2 pictures have`: a count with the words for it."""
    return f"{count} {one if count == 1 else more}"


def listed(names: Sequence[str], room: int = NAMED) -> str:
    """`a, b, ...`: the first `room` names."""
    return one_line(", ".join(names[:room]) + (", ..." if len(names) > room else ""))


def by_reason(reasons: Iterable[tuple[str, str]]) -> str:
    """`no caption (2: 7, 12); empty (1: 9)` from pairs of name and reason: counts, and the first NAMED of all names."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name, reason in reasons:
        groups[reason].append(name)
    room, parts = NAMED, []
    for reason, names in sorted(groups.items(), key=lambda group: len(group[1])):  # so that rare ones are named
        parts.append(f"{one_line(reason)} ({len(names)}{': ' if room else ''}{listed(names, room) if room else ''})")
        room = max(0, room - len(names))
    return "; ".join(parts)
