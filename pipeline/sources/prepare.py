"""A data set of any layout, read into one manifest."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
from rich.progress import Progress

from pipeline.config import Params, components
from pipeline.errors import UserError
from pipeline.files import check_writable
from pipeline.runs import Run
from pipeline.sources import manifest, split
from pipeline.sources.base import Source
from pipeline.sources.folders import LeftOut
from pipeline.sources.rows import warn
from pipeline.sources.texts import listed, number


def source_of(params: Params, data: str) -> Source:
    """The source of a data set; UserError when there is no data set of that name."""
    settings = params.data_set(data)
    source: type[Source] = components.find("source", settings.source)
    return source(data, settings, params.seed, params.runtime.decode_threads)


def prepare(params: Params, data: str, progress: Progress | None = None, told: bool = False) -> pa.Table:
    """The manifest of a data set (columns: manifest.SCHEMA, sorted by id), every picture checked by decoding it.

    Renders the pictures first where the source is a rendered one. Broken pictures are quarantined; these and whatever
    else is not used are counted and named on stderr, and Run.quarantine lists all of it; `told`: but for broken
    pictures and copies, which the caller tells of. Raises UserError for a fault in the data set, more broken pictures
    than max_broken allows, or a folder in data/ that can't be written to.
    """
    run, source = Run.of(params), source_of(params, data)
    progress = progress or Progress(disable=True)
    listing = run.quarantine(data)
    for path in (run.manifest(data), listing):
        check_writable(path.parent)
    found = source.read(progress)
    if source.settings.groups:
        found = split.with_groups(found, source.settings.groups, source.key)
    rows, remarks = split.assign(found, source.settings.split, source.key)
    for remark in remarks:
        warn(f"{source.key}: {remark}")
    limit, workers = source.settings.max_broken, params.runtime.decode_threads
    found = replace(found, rows=rows, left_out=_with_owners(params, data, found.left_out))
    table = manifest.build(found, data, limit, workers, progress, listing, source.check, told)
    if source.settings.groups and source.settings.split == "blocks":
        used = {record["id"] for record in table.select(["id", "quarantine"]).to_pylist() if not record["quarantine"]}
        alone = [row.id for row in rows if row.carved and row.group is None and row.id in used]
        _tell_alone(alone, source.settings.groups, run.series(data), data)
    return table


def _tell_alone(alone: list[str], groups: Path, series: Path, data: str) -> None:
    """A line for the pictures that a file of groups lacks, such as those added since `series` wrote it."""
    if alone:
        count = number(len(alone), "picture is", "pictures are")
        add = f"add {'it' if len(alone) == 1 else 'them'} to the file"
        more = f"run `terraalign series {data}` again, once their image tokens are there" if groups == series else add
        warn(f"data.{data}: {count} not in {groups}, and so in no series: {listed(alone)}; {more}")


def _with_owners(params: Params, data: str, left_out: list[LeftOut]) -> list[LeftOut]:
    """The same, and of what is part of another data set of the graph, which."""
    paths, owners = [Path(one.name) for one in left_out], dict[Path, str]()
    for other in params.run.data if left_out else []:
        with suppress(UserError):  # what is wrong with the other, its own stage says
            owners |= dict.fromkeys(source_of(params, other).takes(paths) if other != data else (), other)
    return [replace(one, owner=owners.get(path, "")) for one, path in zip(left_out, paths, strict=True)]


def restore_pictures(params: Params, data: str, progress: Progress | None = None) -> None:
    """Render the pictures of a rendered source if they are not there, e.g. after a manifest came from DVC's cache."""
    source_of(params, data).restore(progress or Progress(disable=True))
