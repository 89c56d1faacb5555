"""The objectives beside EMD, against POT, scikit-learn and scipy; and that each learns to see the picture."""

from functools import partial

import numpy as np
import ot
import pytest
import torch
from scipy.spatial.distance import cdist, pdist
from scipy.special import rel_entr, softmax
from sklearn.metrics.pairwise import rbf_kernel
from torch import nn

from pipeline.adapters.module import build_adapter
from pipeline.config import components
from pipeline.objectives.base import Means
from pipeline.objectives.pairs import Pairs
from pipeline.transport.entropic import entropic_cost

WORDS, WIDTH, D_IMG = 30, 6, 8
OBJECTIVES = ["mmd", "sinkhorn_divergence", "bag_of_words"]


def objective(name, **settings):
    """On pictures of four tokens; a caption is the two words that their mean is linearly nearest to, and word 0."""
    torch.manual_seed(3)
    images, table = torch.randn(80, 4, D_IMG), torch.randn(WORDS, WIDTH)
    nearest = torch.cdist(images.mean(1) @ torch.randn(D_IMG, WIDTH) * 3, table).argsort(1)
    captions = [[[0, *row[:2]], [0, row[0]]] for row in nearest.tolist()]
    pairs = Pairs(
        lambda at: images[at], captions, table, list(range(WORDS)), list(range(60)), list(range(60, 80)), 80, [], [0]
    )
    found = components.find("objective", name)
    return found(found.Settings.model_validate({"name": name} | settings), pairs, Means(seed=1))


def sides(found, weights):
    """Tokens of two images, and of some captions of several lengths the words and their normalised weights."""
    tokens, captions, image = torch.randn(2, 4, WIDTH), [[0, 1, 2], [5], [3, 3, 4, 7, 0]], [1, 0, 0]
    words = [found.pairs.table[caption].double().numpy() for caption in captions]
    shares = [weights[caption] / weights[caption].sum() for caption in captions]
    return tokens, captions, image, words, shares


def weights_of(found, kind):
    """idf squared, by counting."""
    train = [found.pairs.captions[i] for i in found.pairs.train]
    seen = np.array([sum(any(word in caption for caption in captions) for captions in train) for word in range(WORDS)])
    return np.log((len(train) + 1) / (seen + 1)) ** 2 if kind == "idf_squared" else np.ones(WORDS)


@pytest.mark.parametrize("word_weights", ["uniform", "idf_squared"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_distances_are_those_of_the_references(name, word_weights):
    found = objective(name, word_weights=word_weights)
    tokens, captions, image, words, shares = sides(found, weights_of(found, word_weights))
    used = np.unique([word for i in found.pairs.train for caption in found.pairs.captions[i] for word in caption])
    scale = pdist(found.pairs.table[used].double().numpy())
    alike = np.full(4, 0.25)

    def mmd(x, y, b):
        kernel = partial(rbf_kernel, gamma=1 / (2 * np.median(scale) ** 2))
        return (kernel(x).mean() - 2 * alike @ kernel(x, y) @ b + b @ kernel(y) @ b) / 2

    def transport(one, a, other, b):
        costs, epsilon = cdist(one, other), 0.1 * scale.mean()
        plan = ot.sinkhorn(a, b, costs, epsilon, numItermax=2000, warn=False)
        return (plan * costs).sum() + epsilon * rel_entr(plan, np.outer(a, b)).sum()

    def sinkhorn_divergence(x, y, b):
        y, b = y[b > 0], b[b > 0]  # POT takes no logarithm of 0
        return transport(x, alike, y, b) - (transport(x, alike, x, alike) + transport(y, b, y, b)) / 2

    def bag_of_words(x, y, b):
        table = found.pairs.table.double().numpy()
        said = softmax(x @ table.T, axis=1).mean(0)
        return -(b * np.log(said[cdist(y, table).argmin(1)])).sum()

    reference = {"mmd": mmd, "sinkhorn_divergence": sinkhorn_divergence, "bag_of_words": bag_of_words}[name]
    bags = list(zip(words, shares, strict=True))
    expected = np.array([[reference(x, *bag) for bag in bags] for x in tokens.double().numpy()])
    ours = found.distances(tokens, captions, image)
    np.testing.assert_allclose(ours.numpy(), expected[image, range(3)], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.all_distances(tokens, captions).numpy(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["mmd", "sinkhorn_divergence"])
def test_a_caption_is_nowhere_from_its_own_words(name):
    found = objective(name)
    words = found.pairs.table[[1, 4, 1, 7]][None]
    own, other = found.distances(words, [[7, 1, 4, 1], [1, 4, 7]], [0, 0]).tolist()
    assert abs(own) < 1e-5 and other > 1e-3  # a word twice weighs twice


def test_a_low_temperature_comes_to_emd():
    found = objective("sinkhorn_divergence", epsilon=0.01)
    tokens, captions, image, words, shares = sides(found, np.ones(WORDS))
    exact = [ot.emd2([], share, cdist(tokens[i], y)) for i, y, share in zip(image, words, shares, strict=True)]
    np.testing.assert_allclose(found.distances(tokens, captions, image).numpy(), exact, rtol=0.01)


def test_a_bandwidth_may_be_given():
    wide, narrow = objective("mmd", bandwidth=9.0), objective("mmd", bandwidth=0.01)
    tokens = torch.randn(1, 4, WIDTH)
    assert narrow.distances(tokens, [[1, 2]], [0]).item() == pytest.approx((1 / 4 + 1 / 2) / 2)  # no two are near
    assert wide.distances(tokens, [[1, 2]], [0]).item() < 0.05


@pytest.mark.parametrize("both", [True, False])
def test_gradients_of_entropic_transport_are_finite_differences(both):
    x, y = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 3, dtype=torch.float64)
    a, b = (torch.rand(2, n, dtype=torch.float64).softmax(1) for n in (4, 5))
    b = torch.cat([b[:1], torch.tensor([[0.5, 0.5, 0, 0, 0]], dtype=torch.float64)])  # words that only fill up

    def cost(x):
        other, weights = (y, b) if both else (x, None)
        return entropic_cost(torch.cdist(x, other), a, weights, 0.8, settled=1e-9)

    assert torch.autograd.gradcheck(cost, x)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_of_losses_are_finite_differences(name):
    found = objective(name, **{"epsilon": 0.5} if name == "sinkhorn_divergence" else {})
    tokens, way = torch.randn(3, 4, WIDTH, requires_grad=True), torch.randn(3, 4, WIDTH)
    found.start(tokens, [3, 1, 7]).result().backward()
    with torch.no_grad():
        ahead, behind = (found.start(tokens + step * way, [3, 1, 7]).result() for step in (0.01, -0.01))
    assert (tokens.grad * way).sum().item() == pytest.approx((ahead - behind).item() / 0.02, rel=0.02)


def trained(found, tokens_of, parameters):
    """The held-out distance after some steps of Adam on the training pictures."""
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        found.start(tokens_of(found.pairs.train), found.pairs.train).result().backward()
        optimizer.step()
    return found.held_out(tokens_of).mean().item()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_sees_the_picture_beats_the_best_constant(name):
    found = objective(name, word_weights="idf_squared")
    constant = nn.Parameter(0.5 * torch.randn(1, 4, WIDTH))
    blind = trained(found, lambda _: constant, [constant])
    adapter = nn.Linear(D_IMG, WIDTH)
    assert trained(found, lambda at: adapter(found.pairs.tokens(at)), adapter.parameters()) < 0.95 * blind


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_may_start_where_emd_does(name):
    found = objective(name, start="constant_set")
    adapter = build_adapter("linear", D_IMG, WIDTH).eval()
    found.initialise(adapter, found.pairs.tokens([0, 1, 2]))
    torch.testing.assert_close(adapter.offset.data, found.emd.constant_set(4))
    linear = objective(name, start="closed_form", closed_form="ridge", word_weights="idf_squared")
    linear.initialise(adapter, linear.pairs.tokens([0, 1]))
    own, next_one = (
        linear.held_out(lambda at, to=to: adapter(linear.pairs.tokens([60 + (i + to) % 20 for i in at]))).mean()
        for to in (0, 1)
    )
    assert own < next_one, "captions are nearer to their own pictures before any step"
    random = build_adapter("linear", D_IMG, WIDTH).eval()
    objective(name).initialise(random, found.pairs.tokens([0, 1, 2]))
    assert random.offset is None
