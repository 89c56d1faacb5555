"""A profile for the data sets of a folder: small models, and as much of the data as minutes have room for."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet as pq
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.progress import Progress

from pipeline.config import Params, parse_params
from pipeline.config.base import IN_WORDS, PROFILE
from pipeline.errors import UserError
from pipeline.first.layout import ALONE, OTHERS, DataSet, Layout
from pipeline.first.look import Look
from pipeline.runs import Run
from pipeline.sources.manifest import EmptyPart, check_splits
from pipeline.sources.prepare import prepare
from pipeline.sources.texts import listed

ENOUGH = 1000  # pictures of a data set for a first look
SERIES = 0.5  # share of names that follow on one another by number, from which pictures are taken for series
BROKEN = 0.1  # share of broken pictures that is no reason to stop: each is named
_LAST_NUMBER = re.compile(r"(\d+)\D*$")
RESERVED = {"store", "raw", "models"}
SHIPPED = {"demo", "photos", "thesis"}


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    pretrain_steps: int = 120
    caption_steps: int = 12
    class_steps: int = 6
    hints: int = 3
    validation: int = 24
    captions: int = 16
    caption_tokens: int = 24
    class_tokens: int = 12
    threads: int = 2

    @classmethod
    def of(cls, looks: dict[str, Look]) -> Size:
        """For these data sets, on this machine."""
        classes = looks["classes"].classes if "classes" in looks else {}
        longest = max((len(name) for name in classes), default=0)
        words = sorted(looks["captions"].words) if "captions" in looks else [0]
        return cls(
            hints=max(1, min(3, len(classes) - 1)),
            class_tokens=min(32, max(8, longest // 2 + 2)),  # a token has about four letters; rare words have two
            caption_tokens=min(48, max(16, 2 * words[len(words) * 9 // 10])),
            threads=min(8, max(2, os.cpu_count() or 2)),
        )


def name_of(folder: Path) -> str:
    """What a profile of a folder is called: after it, in plain letters, as far as Unicode takes its letters apart."""
    apart = unicodedata.normalize("NFKD", folder.resolve().name.casefold())
    plain = "".join(letter for letter in apart if not unicodedata.combining(letter))
    name = re.sub(r"[^a-z0-9_-]+", "-", plain).strip("-")
    return f"{name}-pictures" if name in RESERVED else name or "pictures"


def checked_name(name: str) -> str:
    """A name that a profile may have; UserError, with one that it may, for any other."""
    if re.fullmatch(PROFILE, name) and name not in RESERVED:
        return name
    why = "data/store, data/raw and data/models are shared by all profiles" if name in RESERVED else IN_WORDS[PROFILE]
    raise UserError(f"--name {name}", why, f"e.g. --name {name_of(Path(name))}")


def sections_of(
    layout: Layout, split: str | None = None
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, str]]]:
    """The sections of `data`, and a note on some of their keys; `split` in place of the one that names suggest."""
    sections: dict[str, dict[str, Any]] = {}
    notes: dict[str, dict[str, str]] = {}
    for name, found in layout.sets.items():
        how, why = ("hash", "by each name alone") if found.has_parts else split_for(found.names)
        how, why = (split, "the other way left a part empty") if split and not found.has_parts else (how, why)
        count, said = _count_for(found, name)
        sections[name] = {**found.section, "root": str(found.section["root"]), "count": count}
        sections[name] |= {"split": how, "max_broken": BROKEN, "seen": layout.seen}
        notes[name] = {"count": said, "split": why, "max_broken": "each broken one is named, and left out"}
        notes[name]["seen"] = "when `try` or `init` found other pictures; with another text `prepare` reads them again"
    return sections, notes


def split_for(names: Sequence[str]) -> tuple[str, str]:
    """blocks or hash, and why: by whether the names of a folder's pictures are numbered without gaps."""
    numbers: defaultdict[str, list[int]] = defaultdict(list)
    for name in names:
        found = _LAST_NUMBER.search(PurePosixPath(name).stem)
        if found and len(found[1]) < 10:  # longer ones are times or codes
            numbers[str(PurePosixPath(name).parent)].append(int(found[1]))
    steps = [after - before for some in numbers.values() for before, after in pairwise(sorted(some))]
    if len(names) > 1 and sum(step == 1 for step in steps) >= SERIES * len(names):
        return "blocks", "names are numbered one after the other: pictures of one series stay on one side"
    return "hash", "by each name alone: names are in no order that would tell a series"


def _count_for(found: DataSet, name: str) -> tuple[int | None, str]:
    """How many pictures to take, of each class where there are classes, and what to say of it."""
    total = len(found.names)
    if total <= ENOUGH:
        return None, "at most so many; null: all"
    if name == "captions":
        return ENOUGH, f"of {total:,}; null: all"
    classes = len({PurePosixPath(one).parent for one in found.names})
    return max(8, ENOUGH // classes), f"of each class, {total:,} pictures in all; null: all"


def written(
    layout: Layout, looks: dict[str, Look], profile: str, folder: Path, command: str, split: str | None = None
) -> str:
    """The text of the profile. Before a look at the data, with no `looks`, sizes are those of any."""
    sections, notes = sections_of(layout, split)
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        loader=FileSystemLoader(Path(__file__).parent),
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "ensure_ascii": False}
    return environment.get_template("profile.yaml.jinja").render(
        sets=list(layout.sets), sections=sections, notes=notes, size=Size.of(looks), profile=profile,
        folder=folder, command=command,
    )  # fmt: skip


def fitted(layout: Layout, profile: str, folder: Path, command: str, progress: Progress) -> tuple[str, dict[str, Look]]:
    """The text of a profile that fits, and what its data sets are like; every picture is decoded for it.

    Raises UserError when there is nothing to train on, to choose by or to test.
    """
    fault: UserError | None = None
    for split in (None, "hash", "blocks"):
        params = parse_params(written(layout, {}, profile, folder, command, split), profile)
        try:
            looks = {name: _looked_at(params, name, progress) for name in params.run.data}
        except EmptyPart as error:  # of very few pictures; the other way may leave none empty
            fault = fault or error
            continue
        return written(layout, looks, profile, folder, command, split), looks
    assert fault is not None, "there is a way to split that was tried"
    raise fault


def of_same(params: Params, layout: Layout, path: Path, progress: Progress) -> dict[str, Look]:
    """What the data sets of a profile are like that is there already; UserError when it is not of this folder."""
    roots = {Path(str(getattr(one, "root", ""))).absolute() for one in params.data.values()}
    if not {Path(one.section["root"]) for one in layout.sets.values()} <= roots:
        others = listed(sorted(map(str, roots)))
        own = path.stem in SHIPPED
        whose = "one of the project's own profiles" if own else f"the profile of other pictures, {others}"
        raise UserError(path, whose, f"take another --name{'' if own else ', or remove it'}")
    return {name: _looked_at(params, name, progress) for name in params.run.data}


def _looked_at(params: Params, name: str, progress: Progress) -> Look:
    manifest = prepare(params, name, progress, told=True)
    check_splits(manifest, name)
    run = Run.of(params)
    earlier = pq.read_table(run.manifest(name)) if run.manifest(name).is_file() else None
    look = Look.of(manifest, run.quarantine(name), earlier)
    if len(look.classes) == 1:
        raise UserError(f"data.{name}", f"usable pictures of {next(iter(look.classes))} alone: {ALONE}", OTHERS)
    return look
