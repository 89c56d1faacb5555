"""The classes of a data set, whichever source they come from: names that look alike or say nothing, and empty parts."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from pipeline.sources.rows import Row
from pipeline.sources.texts import listed

_SEPARATORS = re.compile(r"[\s_.\u00ad\u200b-\u200d\ufeff-]+")


def clean(name: str) -> str:
    """The name of a class folder as people say it: spaces for underscores and hyphens."""
    return " ".join(name.replace("_", " ").replace("-", " ").split())


def mend(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """The rows with one form of each label, and what there is to say about the labels.

    Labels that are the same text in two Unicode forms become one, the composed one; those that differ in case or
    separators alone stay apart. Rows whose label has no letter, digit or symbol are quarantined.
    """
    found = sorted({row.label for row in rows if row.label is not None})
    remarks = []
    composed: dict[str, str] = {}
    for same in _alike(found, lambda label: unicodedata.normalize("NFC", label)):
        composed |= dict.fromkeys(same, unicodedata.normalize("NFC", same[0]))
        remarks.append(f"the class {composed[same[0]]!r} is written in {len(same)} Unicode forms; taken as one class")
    for alike in _alike(sorted({composed.get(label, label) for label in found}), _folded):
        names = ", ".join(map(repr, alike))
        remarks.append(
            f"the classes {names} differ in case or separators alone and stay {len(alike)} classes; give them one name "
            "if they are one"
        )
    return [_with_label(row, composed.get(row.label or "", row.label)) for row in rows], remarks


def _with_label(row: Row, label: str | None) -> Row:
    if label is None:
        return row
    if not any(unicodedata.category(sign)[0] in "LNSM" for sign in label):
        reason = row.quarantine or "of a class whose name has no letter or digit, rename it"
        return replace(row, label=None, captions=[], quarantine=reason)
    return row if label == row.label else replace(row, label=label, captions=[label])


def _alike(names: Iterable[str], form: Callable[[str], str]) -> list[list[str]]:
    """The names of which several have one form."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[form(name)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def _folded(label: str) -> str:
    return _SEPARATORS.sub("", unicodedata.normalize("NFKC", label).casefold())


def thin(splits: Iterable[tuple[str, str]]) -> list[str]:
    """What there is to say about the parts of a classes data set, from (label, split) of every picture.

    The split is empty if the picture cannot be used.
    """
    parts: defaultdict[str, set[str]] = defaultdict(set)
    for label, split in splits:
        parts[label].add(split)
    remarks = []
    usable = [label for label in parts if parts[label] != {""}]
    if len(usable) == 1:
        remarks.append(f"only one class, {usable[0]!r}: there is nothing to tell apart; add other classes")
    lacking = {part: [label for label in sorted(parts) if part not in parts[label]] for part in ("train", "test")}
    told = [f"{len(names)} none in {part} ({listed(names)})" for part, names in lacking.items() if names]
    if told:
        remarks.append(
            f"of {len(parts)} classes {' and '.join(told)}: without training pictures a class is not learnt, without "
            "test pictures not measured; add pictures to them"
        )
    return remarks
