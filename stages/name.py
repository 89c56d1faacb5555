"""Stage name@<adapter>."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.config import load_params
from stages import timed


def name(adapter: Annotated[str, typer.Argument(help="One of run.adapters.")]) -> None:
    """Name the pictures of every data set of classes by a pre-trained adapter, without the LLM.

    By exact EMD to the names of all classes, by discriminant analysis of the same tokens, and by their weighed sum
    where that names more validation pictures right than chance would, else by the better of the two. Writes the namer,
    the likeliest names of every picture (fine-tuning may write them into the prompt: finetune.recipes.<recipe>.hints)
    and figures to data/<profile>/name/<adapter>/<data>/. From then on `terraalign classify` answers.
    """
    params = load_params()
    params.adapter(adapter)
    with timed(params, f"name@{adapter}"):
        from pipeline.metrics.named import name_and_measure

        name_and_measure(params, adapter)
