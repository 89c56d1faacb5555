"""Stages finetune@<adapter>-<data> and finetune_scratch@<adapter>."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.config.params import AdapterName, Dataset, load_params
from stages import timed


def finetune(
    adapter: Annotated[AdapterName, typer.Argument(help="One of run.adapters.")],
    data: Annotated[Dataset, typer.Argument(help="captions or classes.")],
) -> None:
    """Fine-tune a pre-trained adapter together with a fresh LoRA on the LLM, from cached image tokens.

    Writes adapter, LoRA, history and metrics to data/<profile>/finetune/<adapter>-<data>/. An interrupted run goes
    on from its last checkpoint.
    """
    params = load_params()
    base = Path("data") / params.profile
    with timed(params, f"finetune@{adapter}-{data}"):
        from pipeline.training.finetune import finetune

        finetune(params, adapter, data, base / "pretrain" / adapter, base / "finetune" / f"{adapter}-{data}")


def finetune_scratch(adapter: Annotated[AdapterName, typer.Argument(help="One of run.scratch.")]) -> None:
    """The same fine-tuning on captions from a random adapter: what pre-training is measured against.

    Writes to data/<profile>/finetune_scratch/<adapter>/.
    """
    params = load_params()
    with timed(params, f"finetune_scratch@{adapter}"):
        from pipeline.training.finetune import finetune

        out = Path("data") / params.profile / "finetune_scratch" / adapter
        finetune(params, adapter, "captions", None, out)
