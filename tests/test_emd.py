"""EMD against POT's own front end, sklearn's distances and finite differences."""

import numpy as np
import ot
import pytest
import torch
from sklearn.metrics import pairwise_distances

from pipeline.emd import cost_matrix, emd

METRICS = {"euclidean": "euclidean", "sqeuclidean": "sqeuclidean", "cosine": "cosine"}


def problem(seed, images=3, tokens=7, width=5, captions=(2, 1, 3)):
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (sum(captions),), generator=rng).tolist()
    offsets = np.cumsum([0, *lengths]).tolist()
    index = [i for i, count in enumerate(captions) for _ in range(count)]
    x = torch.randn(images, tokens, width, generator=rng)
    words = torch.randn(offsets[-1], width, generator=rng)
    words[offsets[-1] // 2] = words[0]  # a repeated word
    return x, words, offsets, index


@pytest.mark.parametrize("cost", METRICS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("tokens", "seed"), [*((7, seed) for seed in range(10)), (255, 10)])
def test_values_equal_pot(cost, weighted, tokens, seed):
    x, words, offsets, index = problem(seed, tokens=tokens)  # 255: large enough for the threads
    weights = torch.rand(len(words)) + 0.01 if weighted else None
    ours = emd(x, words, offsets, index, cost=cost, word_weights=weights, threads=2)
    for pair, image in enumerate(index):
        span = slice(offsets[pair], offsets[pair + 1])
        matrix = pairwise_distances(x[image].double().numpy(), words[span].double().numpy(), METRICS[cost])
        mass = np.ones(len(matrix[0])) if weights is None else weights[span].double().numpy()
        theirs = ot.emd2(np.full(len(matrix), 1 / len(matrix)), mass / mass.sum(), matrix)
        assert ours[pair].item() == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("cost", METRICS)
def test_gradient_equals_finite_differences(cost):
    x, words, offsets, index = problem(3)
    x.requires_grad_()
    emd(x, words, offsets, index, cost=cost).sum().backward()
    step = 1e-3
    for place in [(0, 0, 0), (1, 3, 2), (2, 6, 4)]:
        shift = torch.zeros_like(x)
        shift[place] = step
        with torch.no_grad():
            up, down = (emd(x + s * shift, words, offsets, index, cost=cost).double().sum() for s in (1, -1))
        assert x.grad[place].item() == pytest.approx(((up - down) / (2 * step)).item(), rel=2e-2, abs=2e-3)


def test_center_moves_the_cosine():
    x, words = torch.randn(1, 4, 5), torch.randn(1, 3, 5)
    center = torch.randn(5)
    expected = pairwise_distances((x[0] - center).numpy(), (words[0] - center).numpy(), "cosine")
    np.testing.assert_allclose(cost_matrix(x, words, "cosine", center)[0], expected, atol=1e-5)


def test_words_of_no_weight_do_not_count():
    x, words = torch.randn(1, 4, 5), torch.randn(3, 5)
    alone = emd(x, words[:2], [0, 2], [0], cost="sqeuclidean")
    ignored = emd(x, words, [0, 3], [0], cost="sqeuclidean", word_weights=torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(alone, ignored)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_cost_that_is_not_finite_names_the_pair(bad):
    x, words, offsets, index = problem(1)
    x[1, 0, 0] = bad
    with pytest.raises(ValueError, match=r"pair 2 .image 1.: a ground cost is not finite"):
        emd(x, words, offsets, index, cost="sqeuclidean")
