"""Entropic plans, an approximation for comparison only: their gradient is wrong by far more than their value."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.transport.layout import Layout
from pipeline.transport.plan import Entries
from pipeline.transport.solve import NOT_FINITE

ITERATIONS = 200
REGULARISATION = 0.01  # the temperature, times the mean cost of a pair


def sinkhorn(
    costs: Tensor, layout: Layout, word_weights: np.ndarray | None, regularisation: float = REGULARISATION
) -> Entries:
    """Entropic plans (Cuturi 2013) for costs [B, N, L], log domain, all pairs at once: P * N * m entries.

    Tokens weigh alike, words as in `solve`. Tokens' marginals are exact, words' not quite; raises ValueError as
    `solve` does when a cost is not finite or weights are none.
    """
    device, (_, tokens, slots) = costs.device, costs.shape
    image, column, length = (torch.from_numpy(a).to(device) for a in (layout.image, layout.column, layout.length))
    slot = torch.arange(int(length.max()), device=device)
    real = slot < length[:, None]  # [P, m]
    place = (image[:, None] * tokens + torch.arange(tokens, device=device))[..., None] * slots
    place = place + torch.where(real, column[:, None] + slot, column[:, None])[:, None]  # [P, N, m]
    cost = costs.view(-1)[place]
    finite = cost.isfinite().flatten(1).all(1)
    if not finite.all():
        raise layout.error(int(finite.logical_not().nonzero()[0]), NOT_FINITE)
    a, b = torch.ones_like(cost[..., 0]), torch.zeros_like(cost[:, 0])
    b[real] = torch.from_numpy(layout.word_mass(word_weights, 0.0)).to(cost)
    log_a, log_b = ((side / side.sum(1, keepdim=True)).log() for side in (a, b))
    mean = (cost * real[:, None]).sum((1, 2)) / (tokens * length)
    scaled = cost / (regularisation * mean.clamp_min(torch.finfo(cost.dtype).tiny))[:, None, None]
    f, g = torch.zeros_like(log_a), torch.where(b > 0, 0.0, -torch.inf)
    for _ in range(ITERATIONS):
        f = log_a - (g[:, None] - scaled).logsumexp(2)
        g = log_b - (f[..., None] - scaled).logsumexp(1)
    f = log_a - (g[:, None] - scaled).logsumexp(2)
    mass = (f[..., None] + g[:, None] - scaled).exp()
    keep = real[:, None].expand_as(place)
    pair_of = torch.arange(len(image), device=device)[:, None, None].expand_as(place)
    return Entries(place[keep], pair_of[keep], mass[keep])
