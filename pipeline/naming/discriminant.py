"""Linear discriminant analysis of the mean token: the classifier that names are held against, and told with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.naming.weigh import LOWEST

if TYPE_CHECKING:
    from pipeline.store.reader import ImageTokens

SHRINKAGES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
PART = 256  # pictures at a time


def pooled(images: ImageTokens, positions: list[int], views: int = 1) -> np.ndarray:
    """The root of the mean image token, with its sign, of some pictures: [views x n, D_img], float64, view by view.

    The root evens out tokens of networks that end in a rectifier: most are small, and few are large.
    """
    parts = [
        images.tokens(positions[at : at + PART], views=[view] * len(positions[at : at + PART])).mean(1)
        for view in range(views)
        for at in range(0, len(positions), PART)
    ]
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
        """Of features [n, D_img] and their classes, out of `count`; one without a picture is never named."""
        return cls.fits(features, classes, count, [shrinkage])[0]

    @classmethod
    def fits(
        cls, features: np.ndarray, classes: Sequence[int], count: int, shrinkages: Sequence[float]
    ) -> list[Discriminant]:
        """One for each shrinkage: Fisher's discriminant with a common covariance, shrunk towards a multiple of the
        identity (Friedman 1989).

        scikit-learn's with the solver lsqr gives the same; that decomposes once per class and shrinkage, this once.
        """
        found, own = np.unique(classes, return_inverse=True)
        shares = np.bincount(own) / len(own)
        means = np.stack([features[own == one].mean(0) for one in range(len(found))])
        rest = features - means[own]
        variances, axes = _axes(rest, means)
        level = max(variances.sum() / features.shape[1], np.finfo(float).tiny)
        turned = means @ axes  # [C, D_img] along the axes of the covariance
        models = []
        for shrinkage in shrinkages:
            scaled = turned / ((1 - shrinkage) * variances.clip(0) + shrinkage * level)
            weight, bias = torch.zeros(count, features.shape[1]), torch.full((count,), -torch.inf)
            weight[found] = torch.from_numpy(scaled @ axes.T).float()
            bias[found] = torch.from_numpy(np.log(shares) - (scaled * turned).sum(1) / 2).float()
            models.append(cls(weight, bias))
        return models

    def scores(self, tokens: Tensor) -> Tensor:
        """Log-probabilities of the classes, [B, C], from image tokens [B, N, D_img]."""
        return self.of_features(_root(tokens.mean(1)))

    def of_features(self, features: Tensor) -> Tensor:
        """The same from `pooled` ones [B, D_img]."""
        scores = features.float() @ self.weight.T.to(features.device) + self.bias.to(features.device)
        return scores.log_softmax(1).clamp_min(LOWEST)


def _axes(rest: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variances and axes (columns) of the covariance of rows [n, D] whose mean is zero.

    All D; of fewer rows than that only those among which rows and `means` lie, in a tenth of the time: other axes have
    no variance, and no part in a score.
    """
    if len(rest) + len(means) >= rest.shape[1]:
        found = np.linalg.eigh(rest.T @ rest / len(rest))
        return found.eigenvalues, found.eigenvectors
    plane = np.linalg.qr(np.concatenate([rest, means]).T).Q  # [D, n + C]
    inside = rest @ plane
    variances, axes = np.linalg.eigh(inside.T @ inside / len(rest))
    return variances, plane @ axes


def choose_shrinkage(
    features: np.ndarray, classes: Sequence[int], held_out: np.ndarray, right: Sequence[int], count: int
) -> float:
    """The one of SHRINKAGES by which held-out pictures are named best: most right, then most probable."""

    own, best = torch.tensor(list(right)), (-1.0, -math.inf, 0.0)
    for shrinkage, model in zip(SHRINKAGES, Discriminant.fits(features, classes, count, SHRINKAGES), strict=True):
        scores = model.of_features(torch.from_numpy(held_out))
        probable = scores.gather(1, own[:, None]).clamp_min(-50).mean().item()
        best = max(best, ((scores.argmax(1) == own).float().mean().item(), probable, shrinkage))
    return best[2]


def deal(classes: Sequence[int], groups: Sequence[str], folds: int) -> np.ndarray:
    """The fold of each picture [n]: groups of near pictures stay together, and a class is in as many as it can be.

    A class that is one group is cut in order instead: of a class that is in one fold alone, a model fitted without that
    fold would know nothing.
    """
    own, fold = np.asarray(classes), np.zeros(len(classes), dtype=int)
    names = np.asarray(groups)
    for one in np.unique(own):
        at = np.flatnonzero(own == one)
        found, member = np.unique(names[at], return_inverse=True)
        if len(found) == 1:
            fold[at] = np.arange(len(at)) * folds // len(at)
            continue
        sizes, held = np.bincount(member), np.zeros(folds, dtype=int)
        for group in np.argsort(-sizes, kind="stable"):
            chosen = int(held.argmin())
            fold[at[member == group]] = chosen
            held[chosen] += sizes[group]
    return fold


def cross_fitted(
    features: np.ndarray, classes: Sequence[int], folds: np.ndarray, count: int, shrinkage: float
) -> Tensor:
    """Scores of training pictures [n, C] by classifiers that did not see their fold: as weak on them as on new ones.

    Of features [views x n, D_img] as `pooled` has them, all of a picture in its fold [n]; the first view is told.
    """
    scores = torch.full((len(folds), count), LOWEST)
    views = len(features) // len(folds)
    own, folds_of_all = np.tile(np.asarray(classes), views), np.tile(folds, views)
    for fold in np.unique(folds):
        told, seen = folds == fold, folds_of_all != fold
        if seen.any():
            model = Discriminant.fit(features[seen], own[seen].tolist(), count, shrinkage)
            scores[torch.from_numpy(told)] = model.of_features(torch.from_numpy(features[: len(folds)][told]))
    return scores


def as_good_as(goal: float, worse: Tensor, better: Tensor, classes: Sequence[int], seed: int) -> Tensor:
    """Some rows of one [n, C] and the rest of the other, by chance, so that the share of right names is the goal.

    Pictures named without their series are named worse than new ones, which have a series like theirs now and then;
    named without themselves alone they are named better, where they were shot in series.
    """
    own = torch.tensor(list(classes))
    low, high = ((scores.argmax(1) == own).double().mean().item() for scores in (worse, better))
    share = min(1.0, max(0.0, (goal - low) / (high - low))) if high > low else 1.0
    chosen = torch.rand(len(own), generator=torch.Generator().manual_seed(seed)) < share
    return torch.where(chosen[:, None], better, worse)
