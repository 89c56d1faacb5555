"""`terraalign push`: an export on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NOT_PUSHED = 3  # the exit code when nothing was uploaded


def push(
    repo: Annotated[str, typer.Argument(help="A repository of the hub, such as me/my-model.")],
    folder: Annotated[Path, typer.Argument(help="What `terraalign export` wrote.")],
    public: Annotated[
        bool, typer.Option("--public", help="For everybody to see, where the repository is new.")
    ] = False,
) -> None:
    """Upload an export to the Hugging Face hub with your own login (`hf auth login`).

    A new repository is private unless --public says otherwise. Where nobody is logged in or the hub cannot be reached
    it says what it would do, and the exit code is 3.
    """
    from pipeline.export.hub import files_of, why_not
    from pipeline.export.hub import push as upload

    files, kind = files_of(folder), "public" if public else "private"
    reason = why_not(repo)
    if reason is None:
        print(upload(repo, folder, private=not public))
        return
    size = sum(file.stat().st_size for file in files)
    print(f"nothing uploaded: {reason}")
    print(
        f"would make the {kind} repository {repo} where there is none, and upload {len(files)} files, {size:,} bytes:"
    )
    for file in files:
        print(f"  {file.relative_to(folder)} ({file.stat().st_size:,} bytes)")
    raise typer.Exit(NOT_PUSHED)
