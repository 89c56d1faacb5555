"""Stage pca: adapter weights and tokens -> principal components and their pictures."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.config import load_params
from stages import timed


def pca(adapter: Annotated[str, typer.Argument(help="the adapter whose image tokens are looked at")]) -> None:
    """Show where an adapter puts image tokens among the text tokens.

    Pre-training is to move image tokens into the LLM's embedding space. This stage takes pca.images validation
    pictures of the data set pca.data, the adapter after its first epoch, after its last and after the fine-tuning by
    pca.recipe, and finds the principal components of image tokens and caption tokens together. It writes to
    data/<profile>/pca/<adapter>/
    scatter plots of both kinds (epoch1, last, zoom, finetuned; vocabulary shows pca.vocabulary rows of the LLM's
    table behind them), the curve of explained variance, and metrics.json: per state the ratios, k80 (components for
    80 % of the variance: few means a flat cloud, which two dimensions show well) and the modality gap (the distance
    of the two centroids).
    """
    params = load_params()
    from pipeline import alignment  # torch, scikit-learn and matplotlib: not needed for --help

    with timed(params, f"pca@{adapter}"):
        folder = alignment.pca(params, adapter)
    print(f"{folder}: metrics.json and six pictures")
