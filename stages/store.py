"""`terraalign store`: the features that were extracted, as files one can check, clear and carry elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.config import Params, load_params
from pipeline.errors import UserError
from pipeline.runs import RESULTS, Run
from stages import DATA

if TYPE_CHECKING:
    from pipeline.store.inventory import Fault, Use

HELP = """Look after data/store, which holds the extracted features of all profiles.

A file there (a shard) is written once under a name that follows from its content, and never changed. Extraction makes
only the shards that are not there, so what you prune is made again when a profile needs it. docs/store.md describes the
format, and how another program reads it.
"""
Format = Literal["webdataset"]
app = typer.Typer(help=HELP, no_args_is_help=True)
Url = Annotated[str, typer.Argument(help="A folder (file:///backup/features), s3://bucket/prefix, or any fsspec URL.")]


@app.command("ls")
def list_folders() -> None:
    """List what the store holds: one line per kind and fingerprint, and which profile uses it.

    Files that no manifest names are counted as unused: `terraalign store prune` removes them.
    """
    from pipeline.store.inventory import folders

    for f in folders():
        unused = f", {f.unused} of them unused" if f.unused else ""
        typer.echo(f"{f.kind} {f.fingerprint}: {f.rows:,} rows, {_size(f.bytes)}, {f.files} files{unused}")
        typer.echo(f"    used by {', '.join(f.uses) or 'nobody'}")


@app.command("stats")
def stats() -> None:
    """Say how fast the extraction was and where its time went, from the records beside the shards.

    Seconds of threads add up: reading and decoding go on beside the encoder, which on a CPU works in as many threads as
    torch has, on a GPU in three. They only count where it waits: where `encode` is much less than the time in all,
    times its threads. Copied rows came from earlier shards; pulled shards have no times.
    """
    from pipeline.store.inventory import folders, timings

    for f in folders():
        took = timings(f.kind, f.fingerprint)
        rate = f" at {took['encoded'] / took['all']:.1f} {f.kind}/s" if took["all"] else ""
        typer.echo(f"{f.kind} {f.fingerprint}: {f.rows:,} rows, {_size(f.bytes)}")
        typer.echo(f"    {took['encoded']:,} encoded{rate}, {took['copied']:,} copied; {took['all']:.1f} s in all")
        works = ("read", "decode", "encode", "copy", "write")
        typer.echo("    " + ", ".join(f"{work} {took[work]:.1f} s" for work in works if work in took))


@app.command("verify")
def verify(
    repair: Annotated[bool, typer.Option("--repair", help="Remove what is damaged and extract it again.")] = False,
) -> None:
    """Read every shard of the active profile and compare its SHA-256 with the manifest's.

    Names each file that is missing, truncated, damaged (a flipped bit) or foreign (made by another extraction, or
    holding other rows), and ends with exit code 1 if there is one. With --repair it extracts just these anew.
    """
    from pipeline.store.inventory import manifests, verify

    params = load_params()
    faults = verify(params.profile)
    for fault in faults:
        typer.echo(f"{fault.path}: {fault.what}")
    if faults and not repair:
        typer.echo("`terraalign store verify --repair` makes these anew")
        raise typer.Exit(1)
    if faults:
        _repair(params, faults)
    count = len({use.manifest.folder / shard.name for use in manifests(params.profile) for shard in use.manifest.files})
    typer.echo(f"{count} files of profile {params.profile} are what its manifests name")


def _repair(params: Params, faults: list[Fault]) -> None:
    """Remove the damaged files and run their extractions for them alone; UserError when other bytes came out."""
    from pipeline.runs import EXTRACTED_BY
    from pipeline.store.shards import in_use
    from stages import extract_captions, extract_images

    make = {"images": extract_images.make, "text": extract_captions.make}
    gone = {fault.use.data for fault in faults if fault.use} - set(params.data)
    for data in sorted(gone):
        typer.echo(f"data set {data}: not in params.yaml any more, so left as it is; its manifests may be deleted")
    with in_use():
        faults = [fault for fault in faults if fault.use is None or fault.use.data not in gone]
        for fault in faults:
            fault.path.unlink(missing_ok=True)
            fault.path.with_suffix(".json").unlink(missing_ok=True)
        for use in {f"{fault.use} {fault.path.parent}": fault.use for fault in faults}.values():
            if use is None:
                continue
            kind, data = use.manifest.kind, use.data
            if make[kind](params, data, use.manifest) != use.manifest:
                raise UserError(
                    f"{kind} of {data}",
                    "what was extracted now has other bits than the manifest names (another processor or library?)",
                    f"run `dvc repro --force {EXTRACTED_BY[kind]}@{data}`",
                )


@app.command("prune")
def prune(yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this, only say what.")] = False) -> None:
    """Remove what no profile's manifest names, and the temporary files of killed processes.

    Shards of an earlier encoder or of pictures that are gone go too, and those of an interrupted extraction, which
    would otherwise go on where it stopped.
    """
    from pipeline.store.inventory import unfinished, unneeded
    from pipeline.store.shards import in_use

    with in_use(exclusive=True):
        paths = unneeded()
        for name in unfinished():
            typer.echo(f"note: {name}, has no manifest: if it was interrupted, what it did is among these")
        for folder, count, size in _by_folder(paths):
            typer.echo(f"{folder}: {count} files, {_size(size)}")
        total = f"{len(paths)} files, {_size(sum(path.stat().st_size for path in paths))}"
        if paths and not yes:
            typer.echo(f"{total} can go; `terraalign store prune --yes` removes them")
            return
        for path in paths:
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
    typer.echo(f"{total} removed" if paths else "nothing to remove")


def _by_folder(paths: list[Path]) -> list[tuple[Path, int, int]]:
    found = []
    for folder in sorted({path.parent for path in paths}):
        sizes = [path.stat().st_size for path in paths if path.parent == folder]
        found.append((folder, len(sizes), sum(sizes)))
    return found


@app.command("push")
def push(url: Url) -> None:
    """Copy the shards of the active profile to URL; what is there with the right size is not sent again.

    Give the manifests (data/PROFILE/images and text) along, e.g. with `dvc push`: `pull` fetches what they name.
    """
    from pipeline.store import remote

    _transfer(remote.push, url, "pushed")


@app.command("pull")
def pull(url: Url) -> None:
    """Fetch from URL the shards that the active profile's manifests name, instead of extracting them.

    Only what the store lacks is fetched, and kept only if its SHA-256 is the manifest's.
    """
    from pipeline.store import remote

    _transfer(remote.pull, url, "pulled")


@app.command("export")
def export(
    data: Annotated[str, typer.Argument(help=DATA)],
    destination: Annotated[Path, typer.Argument(help="A new folder.")],
    layout: Annotated[Format, typer.Option("--format", help="The layout; one so far.")] = "webdataset",
    per_shard: Annotated[int, typer.Option(min=1, help="Pictures in a tar.")] = 1000,
) -> None:
    """Write the features of a data set as WebDataset tars, for use in another program.

    Image tokens as .npy, token ids of the captions as .json, a tar per split and 1,000 pictures, and the embeddings of
    all tokens beside them; docs/webdataset.md shows how the stock `webdataset` library reads them, and how `pretrain`
    does.
    """
    from pipeline.progress import progress_bar
    from pipeline.store import webdataset
    from pipeline.store.reader import CaptionTokens, ImageTokens

    params = load_params()
    params.data_set(data)
    run = Run.of(params)
    images, captions = ImageTokens.open(run, data), CaptionTokens.open(run, data)
    with progress_bar("export", len(images.ids), "pictures") as advance:
        tars = webdataset.export(images, captions, webdataset.identity(run, data), destination, per_shard, advance)
    typer.echo(f"{destination}: {len(images.ids):,} pictures in {len(tars)} tars")


def _transfer(move: Callable[[list[Use], str, Callable[[int], None]], int], url: str, done: str) -> None:
    from pipeline.progress import progress_bar
    from pipeline.store.inventory import manifests
    from pipeline.store.remote import files

    profile = load_params().profile
    uses = manifests(profile)
    if not uses:
        raise UserError("", f"{RESULTS / profile} has no feature manifest", "run `dvc repro` here, or `dvc pull`")
    shards = files(uses)
    with progress_bar(url, sum(shard.bytes for shard in shards.values()), "bytes") as advance:
        count = move(uses, url, advance)
    typer.echo(f"{count} files {done}, {len(shards) - count} were there")


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
