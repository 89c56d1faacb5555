"""The figures of pre-training, on a problem small enough to know the answers."""

import math
from types import SimpleNamespace

import numpy as np
import ot
import pytest
import torch

from pipeline.params import Objective
from pipeline.pretraining import HeldOut, Pairs, fit_constant_set, retrieval, whitening

IMAGES = 12
PLAIN = {"cost": "sqeuclidean", "word_weights": "uniform", "start": "random"}


class Known(Pairs):
    """Image i has one caption, one word twice; its single image token is that word's number."""

    def __init__(self, **objective):
        self.device, self.threads = torch.device("cpu"), 1
        self.settings = SimpleNamespace(data=["captions"], objective=Objective(**PLAIN | objective))
        self.table = torch.eye(IMAGES)  # all words equally far apart
        self.rows = [[[i, i]] for i in range(IMAGES)]
        self.train, self.val = list(range(IMAGES)), list(range(IMAGES))
        self._places = [(0, i) for i in self.train]
        self._measure()

    def tokens(self, positions):
        return torch.tensor(positions, dtype=torch.float32).view(-1, 1, 1)


def perfect(pairs):
    return lambda tokens: pairs.table[tokens.view(-1).long()][:, None]


@pytest.mark.parametrize(("kind", "rare"), [("idf", math.log(5 / 2)), ("idf_squared", math.log(5 / 2) ** 2)])
def test_words_of_every_caption_weigh_nothing(kind, rare):
    pairs = Known(word_weights=kind)
    pairs.settings.data = ["captions", "classes"]
    # Word 0 is in all four captions, word i in the i-th; class names, of words 9 to 11, do not count.
    pairs.rows = [[[0, i]] for i in range(1, 5)] + [[[9, 10, 11]]] * 3
    pairs._places, pairs.train = [(0, i) for i in range(4)] + [(1, i) for i in range(3)], list(range(7))
    weights = pairs._weights_of_words()
    assert weights[0] == 0
    assert weights[1:5].tolist() == pytest.approx([rare] * 4)
    assert (weights[9:] > rare).all()  # in no caption: the rarest


def test_whitened_words_spread_alike():
    table = torch.randn(500, 6) @ torch.randn(6, 6) + 3 * torch.randn(6)
    counts = torch.randint(1, 9, (500,)).float()

    def spread(words):
        return torch.from_numpy(np.cov(words.double().numpy().T, fweights=counts.long().numpy(), ddof=0))

    before, after = (
        torch.linalg.eigvalsh(spread(table)),
        torch.linalg.eigvalsh(spread(table @ whitening(table, counts))),
    )
    assert after.sum().item() == pytest.approx(before.sum().item(), rel=1e-5)
    expected = before / (before + 0.1 * before.mean())  # the ridge leaves narrow directions a little narrower
    torch.testing.assert_close(after, expected * before.sum() / expected.sum(), rtol=1e-4, atol=0)


def test_the_space_is_that_of_tokens_and_words():
    pairs = Known(space="whitened")
    pairs.table = torch.randn(IMAGES, 5) * torch.tensor([1.0, 2, 3, 4, 5])
    pairs._measure()
    tokens = torch.randn(2, 3, 5)
    found = pairs.distance(tokens, [[0, 1, 2]] * 2, [0, 1])
    mapped = pairs.table @ whitening(pairs.table, torch.ones(IMAGES))
    matrix = torch.cdist(tokens @ whitening(pairs.table, torch.ones(IMAGES)), mapped[:3]).square().double()
    assert found.tolist() == pytest.approx([ot.emd2([], [], m.numpy()) for m in matrix], rel=1e-4)


def test_a_perfect_adapter_finds_every_caption():
    pairs = Known()
    assert retrieval(pairs, perfect(pairs), pairs.val, seed=1) == {"r1_raw": 1.0, "r1_debiased": 1.0}


def test_a_blind_adapter_is_at_chance():
    pairs = Known()

    def blind(tokens):
        return pairs.table.mean(0).expand(len(tokens), 3, -1)

    found = retrieval(pairs, blind, pairs.val, seed=1)
    assert found["r1_raw"] == pytest.approx(1 / IMAGES)


def test_image_gain_is_the_cost_of_permuting_the_images():
    pairs = Known()
    held_out = HeldOut.of(pairs, perfect(pairs), seed=1)
    assert held_out.matched.abs().max() < 1e-5
    assert (held_out.shuffled > 0.01).all()  # no image kept its own caption
    gain, low, high = held_out.gain(seed=1)
    assert gain == pytest.approx(held_out.shuffled.mean().item(), rel=1e-5)
    assert low == pytest.approx(gain) == high  # every image gains alike here

    spread = HeldOut(torch.zeros(400), torch.arange(400.0) / 100)
    gain, low, high = spread.gain(seed=1)
    error = 1.96 * spread.shuffled.std().item() / 20  # of a mean of 400
    assert (low, high) == pytest.approx((gain - error, gain + error), abs=0.02)


def test_best_constant_token_is_the_mean_word():
    pairs = Known()
    token = fit_constant_set(pairs, 1, seed=1)
    torch.testing.assert_close(token[0], pairs.table.mean(0), atol=0.05, rtol=0.1)
