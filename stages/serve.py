"""`terraalign serve`: the page of a run, on this machine."""

from __future__ import annotations

import os
import signal
import webbrowser
from contextlib import suppress
from typing import Annotated, Any

import typer

from pipeline.config import load_params


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; any but the loopback lets others in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 7860,
    browse: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Open a page on the active profile's run: try it on photos, look inside, see its mistakes, compare runs.

    terraalign serve --open

    Photos are answered from memory and never written; nothing is loaded from elsewhere, and nothing sent there. There
    is no password: with --host 0.0.0.0 everyone on your network may use it. Ctrl-C ends it at once, with exit code 0.
    """
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, _end)
    params = load_params()

    def ready(address: str) -> None:
        print(f"{address}  (Ctrl-C ends it)\nanswers: {offered(params)}", flush=True)
        if browse:
            webbrowser.open(address)

    from pipeline.serve import app  # torch: not needed for --help
    from pipeline.serve.desk import offered

    app.serve(params, host, port, ready)


def _end(*_: Any) -> None:
    """End the process in whatever state it is. Threads in a model can't be told to stop, and an interpreter that goes
    down below them aborts or waits for their answers; as nothing is ever written, nothing has to be finished."""
    with suppress(OSError):  # who read it may be gone
        os.write(1, b"stopped\n")
    os._exit(0)
