"""Exact Earth Mover's Distance between adapted image tokens and caption words, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from ot.lp.emd_wrap import emd_c
from torch import Tensor

Cost = Literal["euclidean", "sqeuclidean", "cosine"]
MAX_ITERATIONS = 1_000_000
OPTIMAL = 1
SMALL = 2000  # costs of an image: below, waking another thread takes longer than solving


def emd(
    tokens: Tensor,
    words: Tensor,
    offsets: Sequence[int],
    image_index: Sequence[int],
    *,
    cost: Cost,
    word_weights: Tensor | None = None,
    center: Tensor | None = None,
    threads: int = 1,
) -> Tensor:
    """EMD of P pairs (image, caption): [P], float32, differentiable in `tokens`.

    tokens [B, N, D]; words [T, D] of all captions one after the other, caption p is words[offsets[p]:offsets[p + 1]];
    image_index [P] names each caption's image, so the captions of an image share its tokens and its cost matrix.
    Tokens weigh 1/N each; words weigh alike, or by word_weights [T] (normalised within each caption).
    `center` [D] is subtracted from both sides before the cosine.

    The plan comes from POT's network simplex (Bonneel et al. 2011) on fp32 costs; the gradient is that of
    sum(plan * cost) with the plan held fixed, exact almost everywhere (envelope theorem, Danskin 1967).
    Raises ValueError naming the pair when a cost is not finite or the solver finds no optimum.
    """
    pair_of_word, slot_of_word, length = _slots(offsets, image_index, tokens.shape[0])
    image_of_word = torch.tensor(image_index)[pair_of_word]
    padded = words.new_zeros(tokens.shape[0], length, words.shape[1])
    padded[image_of_word, slot_of_word] = words
    costs = cost_matrix(tokens.float(), padded.float(), cost, center)  # [B, N, L]
    plan = _plans(costs.detach().cpu().numpy(), offsets, image_index, slot_of_word.numpy(), word_weights, threads)
    moved = (costs * torch.from_numpy(plan).to(costs)).sum(1)  # [B, L]: what each word costs
    zero = moved.new_zeros(len(image_index))
    return zero.index_add(0, pair_of_word.to(moved.device), moved[image_of_word, slot_of_word])


def cost_matrix(x: Tensor, y: Tensor, cost: Cost, center: Tensor | None = None) -> Tensor:
    """Ground costs [B, N, L] between x [B, N, D] and y [B, L, D]."""
    if cost == "cosine":
        if center is not None:
            x, y = x - center, y - center
        return 1 - torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(y, dim=-1).mT
    squared = (x.square().sum(-1)[..., None] + y.square().sum(-1)[:, None] - 2 * x @ y.mT).clamp_min(1e-12)
    return squared.sqrt() if cost == "euclidean" else squared


def _slots(offsets: Sequence[int], image_index: Sequence[int], images: int) -> tuple[Tensor, Tensor, int]:
    """Each word's pair and its column in its image's cost matrix; the captions of an image stand side by side."""
    used = [0] * images
    pairs: list[int] = []
    slots: list[int] = []
    for pair, image in enumerate(image_index):
        count = offsets[pair + 1] - offsets[pair]
        pairs += [pair] * count
        slots += range(used[image], used[image] + count)
        used[image] += count
    return torch.tensor(pairs), torch.tensor(slots), max(used)


def _plans(
    costs: np.ndarray,
    offsets: Sequence[int],
    image_index: Sequence[int],
    slots: np.ndarray,
    word_weights: Tensor | None,
    threads: int,
) -> np.ndarray:
    """Optimal plans of all pairs, laid out like the cost matrices: float32 [B, N, L]."""
    plan = np.zeros_like(costs)
    weights = None if word_weights is None else word_weights.double().cpu().numpy()
    row_mass = np.full(costs.shape[1], 1 / costs.shape[1])

    def solve(pair: int) -> None:
        span = slice(offsets[pair], offsets[pair + 1])
        columns = slice(slots[span.start], slots[span.start] + span.stop - span.start)
        matrix = np.ascontiguousarray(costs[image_index[pair], :, columns], np.float64)
        if not np.isfinite(matrix).all():
            raise ValueError(f"EMD of pair {pair} (image {image_index[pair]}): a ground cost is not finite")
        mass = np.ones(matrix.shape[1]) if weights is None else weights[span].copy()
        mass *= row_mass.sum() / mass.sum()
        flow, _, _, _, code = emd_c(row_mass, mass, matrix, MAX_ITERATIONS, 1, None, None)
        if code != OPTIMAL:
            raise ValueError(
                f"EMD of pair {pair} (image {image_index[pair]}): the solver found no optimum (code {code})"
            )
        plan[image_index[pair], :, columns] = flow

    if threads == 1 or costs[0].size < SMALL:
        for pair in range(len(image_index)):
            solve(pair)
    else:  # the solver runs without the GIL
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(solve, range(len(image_index))))
    return plan
