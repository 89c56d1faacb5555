"""The cost of given plans, and its gradient on both sides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.transport.costs import TINY, Cost, Ground
from pipeline.transport.plan import Entries


def cost_of_plans(ground: Ground, plans: Entries, pairs: int) -> Tensor:
    """sum(plan * cost) of P pairs, [P] float32; differentiable in both sides of the ground costs, the plans fixed."""
    x, y, word_at, cost, costs = ground
    found: Tensor = _CostOfPlans.apply(x, y, cost, costs, word_at, *plans, pairs)
    return found


class _CostOfPlans(torch.autograd.Function):
    """Backward goes from the sparse plans straight to both sides, without a gradient of the costs.

    The gradient of a cost c(x, y) is p x - q y in x and r y - q x in y: for the squared distance p = q = r = 2; for the
    distance d, 1 / d; for the cosine s, q = 1 / (|x| |y|), p = s / |x|^2, r = s / |y|^2.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        cost: Cost,
        costs: Tensor,
        word_at: Tensor,
        place: Tensor,
        pair: Tensor,
        mass: Tensor,
        pairs: int,
    ) -> Tensor:
        chosen, (tokens, slots) = costs.view(-1)[place], costs.shape[1:]
        of_x = place // slots  # rows of x.view(-1, D)
        of_y = word_at[place // (tokens * slots) % len(word_at), place % slots]
        ctx.cost = cost
        ctx.save_for_backward(x, y, of_x, of_y, pair, mass, chosen)
        return chosen.new_zeros(pairs, dtype=mass.dtype).index_add_(0, pair, chosen * mass).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y, of_x, of_y, pair, mass, chosen = ctx.saved_tensors
        weight = mass.float() * grad[pair]
        if ctx.cost == "cosine":
            norm_x = torch.linalg.vector_norm(x, dim=-1).view(-1)[of_x]
            norm_y = torch.linalg.vector_norm(y, dim=-1)[of_y]
            weight = torch.where((norm_x > TINY) & (norm_y > TINY), weight, 0)
            q = weight / (norm_x * norm_y).clamp_min(TINY**2)
            p, r = ((1 - chosen) * weight / norm.clamp_min(TINY).square() for norm in (norm_x, norm_y))
        else:
            scale = chosen.reciprocal() if ctx.cost == "euclidean" else 2
            zero = TINY**0.5 if ctx.cost == "euclidean" else TINY
            p = q = r = torch.where(chosen > zero, weight * scale, 0)
        rows = x.flatten(0, 1)
        grad_x = _side(rows, of_x, p, y, of_y, q).view_as(x) if ctx.needs_input_grad[0] else None
        grad_y = _side(y, of_y, r, rows, of_x, q) if ctx.needs_input_grad[1] else None
        return grad_x, grad_y, None, None, None, None, None, None, None


def _side(x: Tensor, of_x: Tensor, p: Tensor, y: Tensor, of_y: Tensor, q: Tensor) -> Tensor:
    """The sum over entries of p x - q y at the rows of x; the plan is so sparse that this beats a matrix product."""
    order = of_x.argsort()
    begin = torch.searchsorted(of_x[order], torch.arange(len(x), device=x.device))
    pulled = torch.nn.functional.embedding_bag(of_y[order], y, begin, mode="sum", per_sample_weights=-q[order])
    own = p.new_zeros(len(x), 1).index_add_(0, of_x, p[:, None])
    return pulled.addcmul_(x, own)  # in place: fresh memory costs more than the sum
