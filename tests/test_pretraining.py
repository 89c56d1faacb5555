"""The figures of pre-training, on a problem small enough to know the answers."""

import math

import numpy as np
import ot
import pytest
import torch
from torch import nn

from pipeline.config.schema import Pretrain
from pipeline.objectives.base import Means
from pipeline.objectives.constant_set import fit_constant_set
from pipeline.objectives.contrast import start_contrast
from pipeline.objectives.emd import EMD, EMDSettings
from pipeline.objectives.ground import whitening
from pipeline.objectives.pairs import Pairs
from pipeline.training.loop import Checkpoint, Trainer, batch_at
from pipeline.training.pretrain import HeldOut, held_out_figures, nearest_words, retrieval

IMAGES = 12
PLAIN = {"cost": "sqeuclidean", "word_weights": "uniform", "start": "random"}
OWN = [[[i, i]] for i in range(IMAGES)]


def number(positions):
    """Image tokens [B, 1, 1]: the position itself."""
    return torch.tensor(positions, dtype=torch.float32).view(-1, 1, 1)


def pairs_of(captions=OWN, table=None, first=None, train=None):
    """Image i has the i-th captions, here one word twice; its single image token is i; all words are equally far."""
    every = list(range(len(captions)))
    table = torch.eye(IMAGES) if table is None else table
    return Pairs(
        number, captions, table, list(range(len(table))), every if train is None else train, every, first or len(every)
    )


def emd(pairs=None, **settings):
    settings = EMDSettings(**PLAIN | settings)
    return EMD(settings, pairs or pairs_of(), Means(seed=1))


def perfect(pairs):
    return lambda tokens: pairs.table[tokens.view(-1).long()][:, None]


@pytest.mark.parametrize(("kind", "rare"), [("idf", math.log(5 / 2)), ("idf_squared", math.log(5 / 2) ** 2)])
def test_words_of_every_caption_weigh_nothing(kind, rare):
    # Word 0 is in all four captions, word i in the i-th; class names, of words 9 to 11, do not count.
    ground = emd(pairs_of([[[0, i]] for i in range(1, 5)] + [[[9, 10, 11]]] * 3, first=4), word_weights=kind).ground
    weights = ground.word_weights
    assert weights[0] == 0
    assert weights[1:5].tolist() == pytest.approx([rare] * 4)
    assert (weights[9:] > rare).all()  # in no caption: the rarest
    captions = [[0, 1], [0, 0], [2, 0, 2]]  # the second has nothing but the word of no weight
    assert ground.words_of(captions).weights.tolist() == pytest.approx([0, rare, 1, 1, rare, 0, rare])


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
    table, tokens = torch.randn(IMAGES, 5) * torch.tensor([1.0, 2, 3, 4, 5]), torch.randn(2, 3, 5)
    found = emd(pairs_of(table=table), space="whitened").distances(tokens, [[0, 1, 2]] * 2, [0, 1])
    into = whitening(table, torch.ones(IMAGES))
    matrix = torch.cdist(tokens @ into, table[:3] @ into).square().double()
    assert found.tolist() == pytest.approx([ot.emd2([], [], m.numpy()) for m in matrix], rel=1e-4)


def test_a_perfect_adapter_finds_every_caption():
    objective = emd()
    found = retrieval(objective, perfect(objective.pairs), objective.pairs.val, seed=1)
    assert found == {"r1_raw": 1.0, "r5_raw": 1.0, "r1_debiased": 1.0, "r5_debiased": 1.0}


def test_a_blind_adapter_is_at_chance():
    objective = emd()

    def blind(tokens):
        return objective.pairs.table.mean(0).expand(len(tokens), 3, -1)

    found = retrieval(objective, blind, objective.pairs.val, seed=1)
    assert found["r1_raw"] == pytest.approx(1 / IMAGES)
    assert found["r5_raw"] == pytest.approx(5 / IMAGES)


def test_the_right_caption_in_third_place_counts_among_five():
    objective = emd()
    table = objective.pairs.table

    def third(tokens):  # nearer to the words of the next two images than to the own
        own = tokens.view(-1).long()
        return (table[own] + 3 * table[(own + 1) % IMAGES] + 2 * table[(own + 2) % IMAGES])[:, None]

    found = retrieval(objective, third, objective.pairs.val, seed=1)
    assert (found["r1_raw"], found["r5_raw"]) == (0, 1)


def test_nearest_words_of_the_own_and_of_another_picture():
    pairs = pairs_of([[[i], [0]] for i in range(IMAGES)])  # word 0 is in a caption of every picture

    def half(tokens):  # one token at the picture's own word, one at word 0
        return torch.stack([0.9 * pairs.table[tokens.view(-1).long()], pairs.table[[0] * len(tokens)]], 1)

    found = nearest_words(pairs, half, seed=1)
    assert found["nearest_in_caption"] == 1
    assert found["nearest_in_shuffled"] == pytest.approx(0.5 + 0.5 / IMAGES)  # picture 0's own word is word 0


def test_plain_figures_do_not_depend_on_the_objective():
    tables, figures = torch.randn(IMAGES, 5), []
    for objective in ({}, {"cost": "cosine", "space": "whitened", "word_weights": "idf", "unmatched": 0.2}):
        measured = emd(pairs_of([[[i, i // 2]] for i in range(IMAGES)], tables), **objective)
        figures.append(held_out_figures(measured, lambda tokens: tables[tokens.view(-1).long()][:, None] + 0.5, seed=1))
    plain, other = figures
    assert {key: plain[key] for key in plain if "plain" in key} == {key: other[key] for key in other if "plain" in key}
    distances = [torch.cdist(tables[i, None] + 0.5, tables[[i, i // 2]]).mean().item() for i in range(IMAGES)]
    assert plain["plain_val"] == pytest.approx(np.mean(distances), rel=1e-5)
    assert plain["plain_gain_relative"] == pytest.approx(plain["plain_shuffled"] / plain["plain_val"] - 1, rel=1e-5)
    assert plain["plain_gain_low"] < plain["plain_gain"] < plain["plain_gain_high"]
    assert plain["image_gain"] != pytest.approx(other["image_gain"], rel=0.01)


def test_contrast_is_the_cross_entropy_of_the_own_caption():
    objective = emd(temperature=2.0)
    tokens = torch.randn(5, 3, IMAGES, requires_grad=True)
    found = start_contrast(objective, tokens, [3, 1, 4, 0, 2]).result()
    plain = torch.stack([torch.cdist(t, objective.pairs.table[[3, 1, 4, 0, 2]]).square().mean(0) for t in tokens])
    softmax = [(-plain / 2).softmax(side).diagonal().log().mean() for side in (0, 1)]  # one word: the EMD is a mean
    torch.testing.assert_close(found, -sum(softmax) / 2)
    ours, theirs = (torch.autograd.grad(loss, tokens)[0] for loss in (found, -sum(softmax) / 2))
    torch.testing.assert_close(ours, theirs)


def test_contrast_does_not_punish_a_caption_that_is_true_of_both():
    shared = emd(pairs_of([*OWN[:7], OWN[1], *OWN[8:]]))
    table = shared.pairs.table
    alone = start_contrast(emd(), table[:3, None], [0, 1, 2]).result()
    twice = start_contrast(shared, table[[0, 1, 2, 1], None], [0, 1, 2, 7]).result()
    assert twice < 1e-3
    assert alone < 1e-3


def test_image_gain_is_the_cost_of_permuting_the_images():
    objective = emd()
    held_out = HeldOut.of(objective, perfect(objective.pairs), seed=1)
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
    objective = emd()
    token = fit_constant_set(objective, 1)
    torch.testing.assert_close(token[0], objective.pairs.table.mean(0), atol=0.05, rtol=0.1)


@pytest.mark.parametrize("cost", ["euclidean", "sqeuclidean", "cosine"])
def test_the_constant_set_is_as_good_as_what_gradient_descent_finds(cost):
    pairs = pairs_of([[[i % 7, (3 * i) % 5], [(i + 2) % 7]] for i in range(IMAGES)])
    objective = emd(pairs, cost=cost, unmatched=0.2)
    found = fit_constant_set(objective, 3)
    tokens = (pairs.table.mean(0) + 0.1 * torch.randn(3, pairs.table.shape[1])).requires_grad_()
    optimizer = torch.optim.Adam([tokens], lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        loss = objective.start(tokens[None], pairs.train).result()
        loss.backward()
        optimizer.step()
    assert objective.start(found[None], pairs.train).result().item() < 1.03 * loss.item()


def test_weights_do_not_depend_on_how_many_batches_are_in_flight(tmp_path):
    """With dropout, and a contrast that draws captions: two and three in flight against one after the other."""

    def weights(in_flight):
        pairs = pairs_of([[[i, (i + 1) % IMAGES], [i, i // 2, 3]] for i in range(IMAGES)])
        objective = emd(pairs, contrast=0.5, cost="euclidean", word_weights="idf")
        objective.in_flight = in_flight
        torch.manual_seed(2)
        adapter = nn.Sequential(
            nn.Linear(1, 9), nn.Dropout(0.3), nn.Linear(9, 2 * IMAGES), nn.Unflatten(-1, (2, IMAGES))
        )
        settings = Pretrain(epochs=3, batch=3, accumulate=3, lr=0.1, objective=objective.settings)

        def loss(number):
            batch = batch_at(number, 3, IMAGES, 5)
            return objective.start(adapter(pairs.tokens(batch)).flatten(1, 2), batch)

        trainer = Trainer(
            "test", adapter, [{"params": list(adapter.parameters())}], settings, IMAGES, 5, loss,
            lambda step: {}, set(), Checkpoint(tmp_path / f"{in_flight}.pt", ""), in_flight=in_flight,
        )  # fmt: skip
        return trainer.run(), list(adapter.parameters())

    (history, expected), *others = map(weights, (1, 2, 3))
    for other, found in others:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert other[-1]["train_loss"] == history[-1]["train_loss"]
