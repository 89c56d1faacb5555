"""Stages finetune@<adapter>-<recipe> and finetune_scratch@<adapter>-<recipe>."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.config import load_params
from stages import RECIPE, timed


def finetune(
    adapter: Annotated[str, typer.Argument(help="One of run.adapters.")],
    recipe: Annotated[str, typer.Argument(help=RECIPE)],
) -> None:
    """Fine-tune a pre-trained adapter together with a fresh LoRA on the LLM, from cached image tokens.

    A recipe, finetune.recipes.<recipe> in params.yaml, names the data sets, in which mixture, and the prompts. Writes
    adapter, LoRA, history and metrics to data/<profile>/finetune/<adapter>-<recipe>/. An interrupted run goes on from
    its last checkpoint.
    """
    _finetune(adapter, recipe, scratch=False)


def finetune_scratch(
    adapter: Annotated[str, typer.Argument(help="One of run.scratch.")],
    recipe: Annotated[str, typer.Argument(help=RECIPE)],
) -> None:
    """The same fine-tuning from a random adapter: what pre-training is measured against.

    Writes to data/<profile>/finetune/<adapter>-<recipe>-scratch/.
    """
    _finetune(adapter, recipe, scratch=True)


def _finetune(adapter: str, recipe: str, scratch: bool) -> None:
    params = load_params()
    params.finetune_for(adapter, recipe)
    with timed(params, f"finetune{'_scratch' if scratch else ''}@{adapter}-{recipe}") as measured:
        from pipeline.training.finetune import finetune

        measured["training"] = finetune(params, adapter, recipe, scratch)
