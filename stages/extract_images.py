"""Stage extract_images@<data>."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.config import Params, load_params
from pipeline.errors import UserError
from pipeline.runs import Run
from stages import DATA, timed

if TYPE_CHECKING:
    from pipeline.store.shards import Manifest


def extract_images(
    data: Annotated[str, typer.Argument(help=DATA)],
    workers: Annotated[int, typer.Option(min=1, help="Processes on this machine that share the work.")] = 1,
    worker: Annotated[
        str | None, typer.Option(metavar="I/N", help="Make only part I (from 0) of N, and no manifest; for job arrays.")
    ] = None,
) -> None:
    """Run the frozen vision encoder over all pictures once and keep their image tokens in data/store.

    Writes data/<profile>/images/<data>/manifest.json, which names the shards; near.json: how many pictures for
    validation and test are almost the same as one for training, of which many are told; and sample.safetensors: mean
    tokens, by which a picture unlike these is told. Shards that exist are not computed again, so an interrupted run
    goes on, and switching encoders and back costs nothing; of a shard that changed, only the pictures that changed are
    encoded.

    With --workers, --worker or runtime.engine: ray, many processes make the shards, with the same bytes. docs/store.md
    has a job array for SLURM.
    """
    params = load_params()
    from pipeline.extraction.near import look
    from pipeline.store.shards import in_use

    if worker is not None:
        with in_use():
            _make_part(params, data, worker)
        return
    with timed(params, f"extract_images@{data}"), in_use():
        made = make(params, data, workers=workers)
        made.write(Run.of(params).features("images", data))
        if told := look(params, data):
            typer.echo(f"warning: {told}", err=True)


def make(params: Params, data: str, repair: Manifest | None = None, workers: int = 1) -> Manifest:
    """The features of a data set, in the store; `repair`: the manifest whose missing shards to make."""
    from pipeline.encoders.vision import load_vision_encoder
    from pipeline.extraction import distribute
    from pipeline.extraction.images import extract_images
    from pipeline.progress import progress_bar
    from pipeline.sources.prepare import restore_pictures
    from pipeline.store.reader import usable_rows

    restore_pictures(params, data)  # DVC may have restored the manifest alone
    encoder, by = load_vision_encoder(params.vision, params.runtime.device), None
    if workers > 1:
        by = distribute.with_workers(params, data, workers)
    elif params.runtime.engine == "ray":
        by = distribute.with_ray(params, data)
    rows = usable_rows(Run.of(params), data)
    with progress_bar(f"image tokens of {data}", len(rows), "images") as advance:
        return extract_images(params, data, encoder, advance, repair, by)


def _make_part(params: Params, data: str, worker: str) -> None:
    """Make the shards of part I of N; the stage, run afterwards without options, writes the manifest."""
    part = re.fullmatch(r"(\d+)/(\d+)", worker)
    if not part or int(part[1]) >= int(part[2]):
        raise UserError(f"--worker {worker}", "expected I/N with I from 0 to N - 1, such as 0/4")
    from pipeline.encoders.vision import load_vision_encoder
    from pipeline.extraction import distribute
    from pipeline.extraction.images import ImageShards
    from pipeline.progress import progress_bar
    from pipeline.sources.prepare import restore_pictures

    distribute.check_named_weights(params)
    restore_pictures(params, data)
    work = ImageShards(params, data, load_vision_encoder(params.vision, params.runtime.device))
    paths = work.part(int(part[1]), int(part[2]))
    rows = sum(len(work.parts[path]) for path in paths)
    with progress_bar(f"image tokens of {data}, part {worker}", rows, "images") as advance:
        work.build_missing(paths, advance)
    typer.echo(f"part {worker}: {len(paths)} of {len(work.parts)} shards are there")
