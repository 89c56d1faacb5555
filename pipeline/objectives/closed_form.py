"""A linear map from images to words, found without a gradient: where training may start."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.devices import exact_products

if TYPE_CHECKING:
    from pipeline.objectives.emd import EMD

KINDS = ("ridge", "procrustes")  # of which the better is taken; cca told captions apart worse (docs/emd.md)
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of the images' mean variance
BLOCK, HELD_OUT = 8, 4  # consecutive pictures are of one series of shots; every fourth block of so many is held out
JUDGED = 1024  # held-out images at most
PART = 256  # images at a time


def fit_closed_form(objective: EMD, pooled: Callable[[Tensor], Tensor]) -> Tensor:
    """A linear map from an image's mean token to the mean word of its captions, less their means: [D_img + 1, D].

    The last row is what it makes of the mean image, to be subtracted. `pooled` gives what an adapter makes of image
    tokens before its body, [B, M, D_img]. Words weigh as in the objective. The kind that the objective's `closed_form`
    names is tried, or each of KINDS, with RIDGES: ridge regression; the orthogonal map from whitened images
    (Procrustes; SITTA, Paischer et al. 2023); the same to whitened words, whose axes are the canonical directions (CCA,
    Hotelling 1936). The latter two are taken at the scale that fits best. Every fourth block of training pictures is
    held out, and the map that ranks its captions best, by the cosine of centred words, is fitted again on all. Fitted
    on all views of pictures, judged by the plain ones.
    """
    train = objective.pairs.train
    judged = [p for i, p in enumerate(train) if i // BLOCK % HELD_OUT == HELD_OUT - 1]
    rest = [p for i, p in enumerate(train) if i // BLOCK % HELD_OUT != HELD_OUT - 1]
    if not judged:
        judged = rest  # so few pictures that nothing can be held out
    step = -(-len(judged) // JUDGED)
    kind = objective.settings.closed_form
    kinds = KINDS if kind == "best" else (kind,)
    images, words = (torch.cat(parts) for parts in zip(*_means(objective, pooled, judged[::step], None), strict=True))
    with exact_products():
        first = _Fit(objective, pooled, rest, kinds)
        tried = [(kind, ridge) for kind in kinds for ridge in RIDGES]
        ranks = [_reciprocal_rank(images @ one[:-1] - one[-1], words) for one in itertools.starmap(first.map, tried)]
        return _Fit(objective, pooled, train, kinds).map(*tried[ranks.index(max(ranks))]).float()


class _Fit:
    """What linear maps of some images are made of: means, covariances, and main axes of images and words."""

    def __init__(self, objective: EMD, pooled: Callable[[Tensor], Tensor], positions: list[int], kinds: Sequence[str]):
        sums = _Sums("cca" in kinds)
        for view in range(objective.pairs.views):
            for images, words in _means(objective, pooled, positions, view or None):
                sums.add(images, words)
        self.mean, target = sums.images / sums.count, sums.words / sums.count
        self.spread = sums.squares / sums.count - self.mean.outer(self.mean)
        self.together = sums.products / sums.count - self.mean.outer(target)
        self.images = _Axes(self.spread)
        self.words = _Axes(sums.word_squares / sums.count - target.outer(target)) if "cca" in kinds else None

    def map(self, kind: str, ridge: float) -> Tensor:
        """A map, [D_img + 1, D]; the last row is what it makes of the mean image."""
        whitening = self.images.times(-0.5, ridge)  # [D_img, D_img]
        found = whitening.T @ self.together
        if self.words is not None:
            found = found @ self.words.times(-0.5, ridge)
        if kind != "ridge":
            left, _, right = torch.linalg.svd(found, full_matrices=False)
            found = left @ right
        if self.words is not None:
            found = found @ self.words.times(0.5, ridge).T
        found = whitening @ found
        if kind != "ridge":
            found = found * ((found * self.together).sum() / (found * (self.spread @ found)).sum())
        return torch.cat([found, (self.mean @ found)[None]])


class _Axes:
    """The main axes of a covariance [D, D]."""

    def __init__(self, covariance: Tensor):
        variances, self.axes = torch.linalg.eigh(covariance)
        self.variances = variances.clamp_min(0)

    def times(self, power: float, ridge: float) -> Tensor:
        """The axes, as columns, times a power of the variances along them, which a ridge has been added to."""
        level = ridge * self.variances.mean() + torch.finfo(self.variances.dtype).tiny
        return self.axes * (self.variances + level) ** power


class _Sums:
    """What a linear map is fitted on, added up over images."""

    def __init__(self, of_words: bool) -> None:
        self.count, self.of_words = 0, of_words
        self.images, self.words, self.squares, self.products, self.word_squares = (torch.zeros(()) for _ in range(5))

    def add(self, images: Tensor, words: Tensor) -> None:
        """images [B, D_img], words [B, D]."""
        self.count += len(images)
        self.images = self.images.to(images) + images.sum(0)
        self.words = self.words.to(words) + words.sum(0)
        self.squares = self.squares.to(images) + images.T @ images
        self.products = self.products.to(images) + images.T @ words
        if self.of_words:  # as large as the LLM's width squared
            self.word_squares = self.word_squares.to(words) + words.T @ words


@torch.no_grad()
def _means(
    objective: EMD, pooled: Callable[[Tensor], Tensor], positions: list[int], view: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Mean tokens of images [B, D_img], plain or in a view, and mean words of their captions [B, D], float64, part by
    part."""
    pairs = objective.pairs
    for at in range(0, len(positions), PART):
        part = positions[at : at + PART]
        captions, image = pairs.captions_of(part)
        tokens = pairs.tokens(part) if view is None else pairs.tokens(part, [view] * len(part))
        yield pooled(tokens).mean(1).double(), pairs.mean_by_image(image)(_mean_word(objective, captions))


def _mean_word(objective: EMD, captions: list[list[int]]) -> Tensor:
    """The mean of each caption's words by their weights, [P, D], float64."""
    words = objective.ground.words_of(captions)
    lengths = torch.tensor([len(caption) for caption in captions])
    caption_of = torch.repeat_interleave(torch.arange(len(captions)), lengths)
    mass = words.weights.new_zeros(len(captions)).index_add(0, caption_of, words.weights)
    weights = (words.weights / mass[caption_of]).double().to(words.places.device)
    table = objective.pairs.table[words.rows].double() * weights[:, None]
    return table.new_zeros(len(captions), table.shape[1]).index_add(0, caption_of.to(table.device), table)


def _reciprocal_rank(found: Tensor, words: Tensor) -> float:
    """How far ahead images [V, D] have their own of all captions [V, D]: the mean of 1 / rank; equal ones are one."""
    center = words.mean(0)
    distinct, own = torch.unique(words, dim=0, return_inverse=True)
    scores = found @ torch.nn.functional.normalize(distinct - center, dim=1).T  # [V, C]
    ranks = 1 + (scores > scores.gather(1, own[:, None])).sum(1)
    return ranks.double().reciprocal().mean().item()
