"""The figures of pre-training, on a problem small enough to know the answers."""

import math
from types import SimpleNamespace

import pytest
import torch

from pipeline.pretraining import HeldOut, Pairs, fit_constant_set, retrieval

IMAGES = 12


class Known(Pairs):
    """Image i has one caption, one word twice; its single image token is that word's number."""

    def __init__(self):
        self.device, self.threads = torch.device("cpu"), 1
        self.settings = SimpleNamespace(
            objective=SimpleNamespace(cost="sqeuclidean", word_weights="uniform", solver="exact")
        )
        self.table = torch.eye(IMAGES)  # all words equally far apart
        self.rows = [[[i, i]] for i in range(IMAGES)]
        self.train, self.val = list(range(IMAGES)), list(range(IMAGES))
        self.word_weights, self.center = torch.ones(IMAGES), torch.zeros(IMAGES)

    def tokens(self, positions):
        return torch.tensor(positions, dtype=torch.float32).view(-1, 1, 1)


def perfect(pairs):
    return lambda tokens: pairs.table[tokens.view(-1).long()][:, None]


@pytest.mark.parametrize(("kind", "rare"), [("idf", math.log(5 / 2)), ("idf_squared", math.log(5 / 2) ** 2)])
def test_words_of_every_caption_weigh_nothing(kind, rare):
    pairs = Known()
    pairs.settings = SimpleNamespace(data=["captions", "classes"], objective=SimpleNamespace(word_weights=kind))
    # Word 0 is in all four captions, word i in the i-th; class names, of words 9 to 11, do not count.
    pairs.rows = [[[0, i]] for i in range(1, 5)] + [[[9, 10, 11]]] * 3
    pairs._places, pairs.train = [(0, i) for i in range(4)] + [(1, i) for i in range(3)], list(range(7))
    weights = pairs._weights_of_words()
    assert weights[0] == 0
    assert weights[1:5].tolist() == pytest.approx([rare] * 4)
    assert (weights[9:] > rare).all()  # in no caption: the rarest


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
