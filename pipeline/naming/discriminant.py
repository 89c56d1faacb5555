"""Linear discriminant analysis of the mean token: the classifier that names are held against, and told with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SHRINKAGES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
PART = 256  # pictures at a time


def pooled(tokens: Callable[[list[int]], Tensor], positions: list[int]) -> np.ndarray:
    """The root of the mean image token, with its sign, of some pictures: [n, D_img], float64.

    The root evens out tokens of networks that end in a rectifier: most are small, and few are large.
    """
    parts = [tokens(positions[at : at + PART]).mean(1).cpu() for at in range(0, len(positions), PART)]
    return _root(torch.cat(parts)).double().numpy()


def _root(means: Tensor) -> Tensor:
    return means.sign() * means.abs().sqrt()


@dataclass(frozen=True)
class Discriminant:
    """Linear scores of C classes: weight [C, D_img] and bias [C], float32."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, features: np.ndarray, classes: Sequence[int], count: int, shrinkage: float) -> Discriminant:
        """Of features [n, D_img] and their classes, out of `count`; one without a picture is never named.

        Fisher's discriminant with a common covariance, shrunk towards its diagonal (Friedman 1989), by scikit-learn.
        """
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

        found, own = np.unique(classes, return_inverse=True)
        weight, bias = torch.zeros(count, features.shape[1]), torch.full((count,), -torch.inf)
        if len(found) == 1:
            bias[found] = 0.0
            return cls(weight, bias)
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(features, own)
        rows, sums = model.coef_, model.intercept_
        if len(found) == 2:  # scikit-learn keeps the difference of the two alone
            rows, sums = np.concatenate([np.zeros_like(rows), rows]), np.concatenate([[0.0], sums])
        weight[found], bias[found] = torch.from_numpy(rows).float(), torch.from_numpy(sums).float()
        return cls(weight, bias)

    def scores(self, tokens: Tensor) -> Tensor:
        """Log-probabilities of the classes, [B, C], from image tokens [B, N, D_img]."""
        return self.of_features(_root(tokens.mean(1)))

    def of_features(self, features: Tensor) -> Tensor:
        """The same from `pooled` ones [B, D_img]."""
        return (features.float() @ self.weight.T.to(features.device) + self.bias.to(features.device)).log_softmax(1)


def choose_shrinkage(
    features: np.ndarray, classes: Sequence[int], held_out: np.ndarray, right: Sequence[int], count: int
) -> float:
    """The one of SHRINKAGES by which held-out pictures are named best: most right, then most probable."""

    def worth(shrinkage: float) -> tuple[float, float]:
        scores = Discriminant.fit(features, classes, count, shrinkage).of_features(torch.from_numpy(held_out))
        own = torch.tensor(list(right))
        probable = scores.gather(1, own[:, None]).clamp_min(-50).mean().item()
        return (scores.argmax(1) == own).float().mean().item(), probable

    return max(SHRINKAGES, key=worth)


def cross_fitted(
    features: np.ndarray, classes: Sequence[int], blocks: np.ndarray, count: int, shrinkage: float
) -> Tensor:
    """Scores of training pictures [n, C] by classifiers that saw none of their own block, but one other each.

    So they are as weak on them as on new pictures: fitted on all the rest, a picture's neighbours in a series of shots
    would be among them. blocks [n] are numbers from 0 on; pictures of the last are told by the first.
    """
    scores = torch.full((len(features), count), -torch.inf)
    own, last = np.asarray(classes), int(blocks.max())
    for block in range(last + 1):
        told, other = blocks == block, blocks == (block + 1) % (last + 1)
        model = Discriminant.fit(features[other], own[other].tolist(), count, shrinkage)
        scores[torch.from_numpy(told)] = model.of_features(torch.from_numpy(features[told]))
    return scores
