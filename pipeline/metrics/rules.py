"""Figures of one way of naming pictures, from its log-probabilities."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.metrics.base import Figure, share_of

LABELS = {
    "emd": "nearest name by EMD, no LLM",
    "discriminant": "discriminant analysis, no LLM",
    "namer": "the better of EMD and discriminant analysis, or both, no LLM",
    "ranked": "likeliest name to the LLM",
    "calibrated": "the same, less what a name gets on average",
    "combined": "LLM and namer together",
    "state": "logistic regression on the LLM's last state",
}
BINS = 15  # of the calibration error, as Guo et al. 2017 have them


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
