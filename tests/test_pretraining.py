"""The figures of pre-training, on a problem small enough to know the answers."""

from types import SimpleNamespace

import pytest
import torch

from pipeline.pretraining import HeldOut, Pairs, fit_constant_set, retrieval

IMAGES = 12


class Known(Pairs):
    """Image i has one caption, one word twice; its single image token is that word's number."""

    def __init__(self):
        self.device, self.threads = torch.device("cpu"), 1
        self.settings = SimpleNamespace(objective=SimpleNamespace(cost="sqeuclidean", word_weights="uniform"))
        self.table = torch.eye(IMAGES)  # all words equally far apart
        self.rows = [[[i, i]] for i in range(IMAGES)]
        self.train, self.val = list(range(IMAGES)), list(range(IMAGES))
        self.word_weights, self.center = torch.ones(IMAGES), torch.zeros(IMAGES)

    def tokens(self, positions):
        return torch.tensor(positions, dtype=torch.float32).view(-1, 1, 1)


def perfect(pairs):
    return lambda tokens: pairs.table[tokens.view(-1).long()][:, None]


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
