"""Entropic transport as a differentiable value, for the Sinkhorn divergence."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS, CHECKED = 200, 5  # at most, and after how many each whether they have settled
SETTLED = 1e-3  # potentials that move by less, in units of the temperature: marginals are right to about that share


def entropic_cost(costs: Tensor, a: Tensor, b: Tensor | None, epsilon: float, settled: float = SETTLED) -> Tensor:
    """min <P, C> + epsilon KL(P | a b^T) over plans P of P pairs: [P]; differentiable in the costs [P, N, W].

    a [P, N] and b [P, W] are weights that sum to 1; points without weight do not count. b None: a side and itself,
    which takes few rounds. Log domain, all pairs at once (Feydy et al. 2019, section 3.1). The gradient is that of the
    dual with its potentials held fixed: the plan (envelope theorem, Danskin 1967).
    """
    log_a, scaled = a.log(), costs / epsilon
    log_b = log_a if b is None else b.log()
    f, g = _potentials(scaled.detach(), log_a, None if b is None else log_b, settled)
    plan = ((log_a + f)[..., None] + (log_b + g)[:, None] - scaled).exp()
    return epsilon * ((a * f).sum(1) + ((a if b is None else b) * g).sum(1) + 1 - plan.sum((1, 2)))


@torch.no_grad()
def _potentials(scaled: Tensor, log_a: Tensor, log_b: Tensor | None, settled: float) -> tuple[Tensor, Tensor]:
    """Dual potentials [P, N] and [P, W], divided by the temperature, for costs so divided, [P, N, W].

    Two sides take turns (Cuturi 2013); of one side, the old potential and the new are averaged (theirs, equation 25).
    """
    f, g = torch.zeros_like(log_a), torch.zeros_like(log_a if log_b is None else log_b)
    for number in range(ROUNDS):
        before = f
        if log_b is None:
            f = g = (f - ((log_a + f)[:, None] - scaled).logsumexp(2)) / 2
        else:
            f = -((log_b + g)[:, None] - scaled).logsumexp(2)
            g = -((log_a + f)[..., None] - scaled).logsumexp(1)
        if number % CHECKED == CHECKED - 1 and (f - before).abs().max() < settled:
            break
    return f, g
