"""Stage pretrain@<adapter>."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.config import load_params
from stages import timed


def pretrain(adapter: Annotated[str, typer.Argument(help="One of run.adapters.")]) -> None:
    """Align an adapter with the LLM's embedding space by exact EMD, or by the objective that its parameters name.

    From the cached tensors alone: needs no pictures, and no LLM unless the objective asks it. Writes the adapter after
    the first and the last epoch, the history and the metrics to data/<profile>/pretrain/<adapter>/. An interrupted run
    goes on from its last checkpoint.
    """
    params = load_params()
    params.adapter(adapter)
    with timed(params, f"pretrain@{adapter}") as measured:
        from pipeline.training.pretrain import pretrain

        measured["training"] = pretrain(params, adapter)
