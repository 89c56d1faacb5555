"""How scores of names become one probability."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

LEAST = 1e-3  # weight, in standard deviations, of scores that tell nothing: their order is kept, if hardly believed
SURE = 1.96  # standard errors: a difference that chance alone would make in one case of twenty
LOWEST = -1e4  # log-probability of what counts as impossible


def combined(scores: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Log-probabilities from a weighted sum of scores [n, C]; a weight of 0 leaves its scores out."""
    parts = [weight * scores[key] for key, weight in weights.items() if weight]
    found = torch.stack(parts).sum(0) if parts else torch.zeros_like(next(iter(scores.values())))
    return found.log_softmax(1)


def fit_weights(scores: Mapping[str, Tensor], own: list[int]) -> dict[str, float]:
    """Weights, at least 0, by which the right names [n] of held-out pictures are most probable: a conditional logit.

    With one kind of scores its weight is one over a temperature (Guo et al. 2017). Found by L-BFGS-B.
    """
    from scipy.optimize import minimize
    from scipy.special import logsumexp

    values = np.stack([score.double().numpy() for score in scores.values()])  # [K, n, C]
    values = values - values.max(2, keepdims=True)
    spread = np.array([one[one > LOWEST / 2].std() for one in values]).clip(1e-12)[:, None, None]
    values, rows, right = values / spread, np.arange(values.shape[1]), np.asarray(own)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = np.tensordot(weights, values, 1)
        total = logsumexp(logits, axis=1, keepdims=True)
        shares = np.exp(logits - total)
        slope = ((shares * values).sum(2) - values[:, rows, right]).mean(1)
        return float((total[:, 0] - logits[rows, right]).mean()), slope

    found = minimize(loss, np.ones(len(values)), jac=True, bounds=[(0, 1e3)] * len(values), method="L-BFGS-B")
    weights = found.x if found.x.any() else np.full(len(values), LEAST)
    return {key: float(weight / scale) for key, weight, scale in zip(scores, weights, spread.ravel(), strict=True)}


def sure_weights(scores: Mapping[str, Tensor], own: list[int]) -> dict[str, float]:
    """Weights of the sum of scores, or, the others being 0, of those that name held-out pictures best alone.

    The sum has to name more of them right by SURE standard errors of the paired difference. Held-out pictures are of
    the same days and places as training pictures, so scores that know the latter by heart look better on them than they
    are on new pictures: a gain that may be chance is no reason to trust them.
    """
    right, each = torch.tensor(own), {key: fit_weights({key: score}, own) for key, score in scores.items()}
    hits = {key: (score.argmax(1) == right).double() for key, score in scores.items()}
    best = max(hits, key=lambda key: hits[key].sum().item())
    together = fit_weights(scores, own)
    gain = (combined(scores, together).argmax(1) == right).double() - hits[best]
    if gain.mean() > SURE * gain.std() / len(gain) ** 0.5:
        return together
    return dict.fromkeys(scores, 0.0) | each[best]
