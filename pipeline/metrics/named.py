"""The figures of names: by rule, those without the LLM as soon as an adapter is pre-trained."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Params
from pipeline.files import atomically
from pipeline.metrics.base import FIGURES, Figure, share_of
from pipeline.naming.fit import name_all
from pipeline.naming.namer import RULES
from pipeline.naming.table import TABLE, Named
from pipeline.runs import Run

LABELS = {
    "emd": "nearest name by EMD, no LLM",
    "discriminant": "discriminant analysis, no LLM",
    "namer": "EMD and discriminant analysis, no LLM",
    "ranked": "likeliest name to the LLM",
    "calibrated": "the same, less what a name gets on average",
    "combined": "LLM and namer together",
}
BINS = 15  # of the calibration error, as Guo et al. 2017 have them


def name_and_measure(params: Params, adapter: str) -> None:
    """Stage `name`: names without the LLM, and their figures, into name/<adapter>/<data>."""
    folder = Run.of(params).named(adapter)
    folder.mkdir(parents=True, exist_ok=True)  # an output that DVC expects also where no data set has classes
    for data, named in name_all(params, adapter).items():
        figures = [figure for rule in RULES for figure in figures_without_llm(named, rule)]
        with atomically(folder / data / FIGURES) as file:
            file.write((json.dumps([figure.as_json() for figure in figures], indent=1) + "\n").encode())
    for recipe in params.run.recipes:
        _write_digests(params, folder, recipe)


def _write_digests(params: Params, folder: Path, recipe: str) -> None:
    """Which names a recipe reads, in a file of its own: DVC can't list the data sets of a recipe among its inputs."""
    tables = {data: folder / data / TABLE for data in params.finetune.recipes[recipe].data}
    digests = {data: sha256(path.read_bytes()).hexdigest() for data, path in tables.items() if path.exists()}
    with atomically(folder / f"{recipe}.json") as file:
        file.write((json.dumps(digests, indent=1) + "\n").encode())


def figures_without_llm(named: Named, rule: str) -> list[Figure]:
    """Those of a rule of the namer on the test pictures; none where there are none."""
    rows = named.rows[named.rows["split"] == "test"]
    if rows.empty:
        return []
    own = [named.names.index(label) for label in rows["label"]]
    return figures_of(rule, named.log_probabilities(rule, list(rows.index)), own)


def figures_of(rule: str, scores: Tensor, own: list[int]) -> list[Figure]:
    """Accuracy, that of the first five, the mean over the classes, and the calibration error of one rule.

    scores are log-probabilities [n, C], own the right classes [n].
    """
    right, label = torch.tensor(own), LABELS[rule]
    ranks = (scores > scores.gather(1, right[:, None])).sum(1) + _ties_before(scores, right)
    first = (ranks == 0).numpy()
    classes = right.numpy()
    by_class = [float(first[classes == one].mean()) for one in np.unique(classes)]
    probability = scores.exp().max(1).values.numpy()
    return [
        share_of(f"acc/{rule}", first.tolist(), label),
        share_of(f"top5/{rule}", (ranks < 5).tolist(), f"{label}: among the first five"),
        Figure(f"macro/{rule}", float(np.mean(by_class)), f"{label}: mean over the classes"),
        Figure(f"ece/{rule}", calibration_error(probability, first), f"{label}: calibration error"),
    ]


def _ties_before(scores: Tensor, right: Tensor) -> Tensor:
    """How many earlier classes score exactly as the right one: a tie is no hit for the later."""
    same = scores == scores.gather(1, right[:, None])
    return (same & (torch.arange(scores.shape[1])[None] < right[:, None])).sum(1)


def calibration_error(probability: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: |accuracy - mean probability| over BINS of equal width, weighed by their sizes."""
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    gaps = [abs(right[bins == b].mean() - probability[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(np.sum(gaps))
