"""Ground costs: what it takes to turn a token into a word."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.devices import exact_products, to_device
from pipeline.transport.layout import Layout

Cost = Literal["euclidean", "sqeuclidean", "cosine"]
TINY = 1e-12  # a squared distance or a norm below this counts as zero, and has no gradient


class Ground(NamedTuple):
    """Both sides of a batch and the costs between them, all float32 on one device."""

    tokens: Tensor  # [B, N, D], in the graph
    words: Tensor  # [T, D], in the graph
    word_at: Tensor  # [B, L] or [1, L] int64, as in Layout
    cost: Cost
    costs: Tensor  # [B, N, L], outside the graph


def ground_costs(tokens: Tensor, words: Tensor, layout: Layout, cost: Cost, center: Tensor | None) -> Ground:
    """The costs of a batch: tokens [B, N, D], words [T, D], float32 whatever these are, under autocast too.

    `center` [D] is subtracted from both sides before the cosine.
    """
    word_at = to_device(torch.from_numpy(layout.word_at()), tokens.device)
    with torch.autocast(tokens.device.type, enabled=False):
        x, y = tokens.float(), words.float()
        if center is not None and cost == "cosine":
            x, y = x - center, y - center
        return Ground(x, y, word_at, cost, cost_matrix(x.detach(), y.detach(), word_at, cost))


def cost_matrix(x: Tensor, y: Tensor, word_at: Tensor, cost: Cost) -> Tensor:
    """Ground costs [B, N, L] between tokens x [B, N, D] and words of y [T, D], for image b those at word_at[b].

    word_at is [B, L], or [1, L] for all images the same; a column without a word, -1, costs anything.
    """
    norm_x, norm_y = torch.linalg.vector_norm(x, dim=-1)[..., None], torch.linalg.vector_norm(y, dim=-1)
    norm_y = norm_y[word_at][:, None]
    with exact_products():  # the squares below cancel
        products = _products(x, y, word_at)
    if cost == "cosine":
        return 1 - products / (norm_x.clamp_min(TINY) * norm_y.clamp_min(TINY))
    squared = (norm_x.square() + norm_y.square()).sub_(products, alpha=2).clamp_min_(TINY)
    return squared.sqrt_() if cost == "euclidean" else squared


def _products(x: Tensor, y: Tensor, word_at: Tensor) -> Tensor:
    """Inner products [B, N, L] for `cost_matrix`; on a CPU image by image where the words of each are consecutive."""
    if x.device.type != "cpu" or len(word_at) == 1:
        return x @ y[word_at if len(word_at) > 1 else word_at[0]].mT
    count, column = (word_at >= 0).sum(1), torch.arange(word_at.shape[1])
    if not torch.equal(word_at, torch.where(column < count[:, None], word_at[:, :1] + column, -1)):
        return x @ y[word_at].mT
    products = x.new_zeros(*x.shape[:2], len(column))
    for image, words in enumerate(count.tolist()):
        if words:  # neither copied nor filled up to as many as another image has
            start = int(word_at[image, 0])
            products[image, :, :words] = x[image] @ y[start : start + words].T
    return products
