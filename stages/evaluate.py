"""Stage evaluate@<adapter>-<recipe>."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.config import load_params
from stages import RECIPE, timed


def evaluate(
    adapter: Annotated[str, typer.Argument(help="One of run.adapters.")],
    recipe: Annotated[str, typer.Argument(help=RECIPE)],
) -> None:
    """Measure a fine-tuned adapter on the test parts of its recipe's data sets.

    Of classes: the thesis's accuracy (the class name appears in the greedy output) and the strict one (the output is
    the class name), beside a linear probe and chance. Of captions: those of the pre-trained adapter with the frozen LLM
    and those of the fine-tuned model. evaluate.metrics says what is measured. Writes the answers and figures.json to
    data/<profile>/evaluate/<adapter>-<recipe>/<data>/.
    """
    params = load_params()
    params.finetune_for(adapter, recipe)
    with timed(params, f"evaluate@{adapter}-{recipe}"):
        from pipeline.metrics.evaluate import evaluate

        evaluate(params, adapter, recipe)
