"""The figures of pre-training, on a problem small enough to know the answers."""

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import ot
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from pipeline import devices
from pipeline.adapters.module import load_adapter
from pipeline.config import load_params
from pipeline.config.schema import Pretrain
from pipeline.errors import UserError
from pipeline.inputs import write_inputs
from pipeline.objectives.base import Means
from pipeline.objectives.constant_set import fit_constant_set
from pipeline.objectives.contrast import start_contrast
from pipeline.objectives.emd import EMD, EMDSettings
from pipeline.objectives.ground import whitening
from pipeline.objectives.pairs import Pairs
from pipeline.objectives.qformer import QFormer
from pipeline.runs import Run
from pipeline.training import loop
from pipeline.training.loop import Checkpoint, Trainer, batch_at
from pipeline.training.pretrain import HeldOut, held_out_figures, nearest_words, pretrain, retrieval
from stages import cli

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


def test_the_weight_of_a_word_of_every_caption_is_never_negative():
    """torch divides by multiplying with the reciprocal: of 46 captions the quotient is a little less than 1."""
    pairs = pairs_of([[[0, i]] for i in range(46)], table=torch.randn(46, 5))
    assert emd(pairs, word_weights="idf").ground.word_weights[0] == 0
    assert emd(pairs, word_weights="idf").start(torch.randn(1, 2, 5), [3]).result() > 0


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

    def adapter(tokens):
        return tables[tokens.view(-1).long()][:, None] + 0.5

    for objective in ({}, {"cost": "cosine", "space": "whitened", "word_weights": "idf", "unmatched": 0.2}):
        measured = emd(pairs_of([[[i, i // 2]] for i in range(IMAGES)], tables), **objective)
        figures.append(held_out_figures(measured, adapter, HeldOut.of(measured, adapter, seed=1), seed=1))
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


def test_an_only_name_has_a_constant_set_though_its_words_tell_nothing_apart():
    objective = emd(pairs_of([[[1, 2]]] * IMAGES), word_weights="idf_squared")
    found = objective.held_out(lambda _: fit_constant_set(objective, 2)[None])
    assert found.max() < 0.01


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


OWN_OBJECTIVES = """
import torch
import torch.nn.functional as F

from pipeline.config.base import AboveZero
from pipeline.config.schema import ObjectiveSettings
from pipeline.objectives.base import Objective


class Settings(ObjectiveSettings):
    power: AboveZero = 1.0


class BetweenMeans(Objective):
    Settings = Settings

    def distances(self, tokens, captions, image):
        words = torch.stack([self.pairs.table[caption].mean(0) for caption in captions])
        return (tokens.mean(1)[image] - words).norm(dim=1) ** self.settings.power


class CrossEntropy(Objective):
    needs_llm = True

    def distances(self, tokens, captions, image):
        found = []
        for caption, i in zip(captions, image):
            inputs = torch.cat([tokens[i], self.pairs.table[caption]])[None]
            logits = self.llm.network(inputs_embeds=inputs).logits[0, tokens.shape[1] - 1 : -1]
            words = torch.tensor([self.pairs.token_ids[row] for row in caption])
            found.append(F.cross_entropy(logits, words))
        return torch.stack(found)
"""


@pytest.fixture(scope="session")
def features(tmp_path_factory, tiny_mistral):
    """A folder with features of a few pictures, and what its params.yaml is made of."""
    folder = tmp_path_factory.mktemp("features")
    with contextlib.chdir(folder):
        values = yaml.safe_load((Path(__file__).parent.parent / "profiles/demo.yaml").read_text())
        values["run"] |= {"data": ["captions"], "adapters": ["mlp"], "recipes": ["captions"], "scratch": ["mlp"]}
        values["data"] = {"captions": values["data"]["captions"] | {"count": 40}}
        values["finetune"]["recipes"].pop("classes")
        values["finetune"]["recipes"]["captions"] |= {"max_steps": 1, "validation_images": 2, "validations": 1}
        values["llm"] |= {
            "loader": "huggingface",
            "model": str(tiny_mistral),
            "system_prompt": None,
            "dtype": "float32",
        }
        values["vision"] |= {"encoder": "timm", "model": "resnet10t", "pretrained": "random"}
        values["pretrain"] |= {"data": ["captions"], "epochs": 2, "batch": 8, "candidates": 4}
        Path("params.yaml").write_text(yaml.safe_dump(values))
        Path("own_objectives.py").write_text(OWN_OBJECTIVES)
        for command in ("prepare", "extract-images", "extract-captions"):
            done = CliRunner().invoke(cli.app, [command, "captions"], catch_exceptions=False)
            assert done.exit_code == 0, done.output
    return folder, values


def pretrained_by(objective, features, monkeypatch, of_adapter=None):
    """The metrics and the history of an adapter that was pre-trained with an objective, or with one of its own."""
    folder, values = features
    monkeypatch.chdir(folder)
    mlp = values["adapters"]["mlp"] | {"pretrain": {} if of_adapter is None else {"objective": of_adapter}}
    changed = {"pretrain": values["pretrain"] | {"objective": objective}, "adapters": values["adapters"] | {"mlp": mlp}}
    Path("params.yaml").write_text(yaml.safe_dump(values | changed))
    params = load_params()
    pretrain(params, "mlp")
    out = Run.of(params).pretrained("mlp")
    return json.loads((out / "metrics.json").read_text()), pd.read_csv(out / "history.csv")


def test_an_own_objective_is_a_class_of_settings_and_distances(features, monkeypatch):
    own = {"name": "own_objectives:BetweenMeans", "power": 2.0}
    metrics, history = pretrained_by(own, features, monkeypatch)
    assert history["val"].iloc[-1] < 0.9 * history["val"].iloc[0]
    assert metrics["image_gain"] == pytest.approx(metrics["shuffled"] - metrics["val"], rel=1e-4)
    assert metrics["plain_val"] != pytest.approx(metrics["val"], rel=0.01)
    assert not [key for key in [*metrics, *history] if key.startswith("const")]
    with pytest.raises(UserError, match=r"pretrain\.objective\.power is 0"):
        pretrained_by(own | {"power": 0}, features, monkeypatch)


def test_an_objective_that_needs_the_llm_gets_it(features, monkeypatch):
    _, history = pretrained_by({"name": "own_objectives:CrossEntropy"}, features, monkeypatch)
    assert history["val"].iloc[-1] < history["val"].iloc[0] < 7  # the vocabulary's 400 tokens alike: 6


def test_no_step_at_all_leaves_the_start_as_the_result(features, monkeypatch):
    folder, values = features
    steps = {"pretrain": values["pretrain"] | {"max_steps": 0}}
    start = PLAIN | {"start": "closed_form", "cost": "euclidean"}
    metrics, history = pretrained_by(start, (folder, values | steps), monkeypatch)
    assert len(history) == 1 and history["step"].tolist() == [0]
    assert set(metrics) >= {"val", "shuffled", "r1_debiased", "const_set", "image_gain", "plain_gain_relative"}
    first, last = (load_file(f"data/demo/pretrain/mlp/{name}.safetensors") for name in ("first", "last"))
    assert first.keys() == last.keys() and "skip.weight" in last
    assert all(torch.equal(first[key], last[key]) for key in last)
    done = CliRunner().invoke(cli.app, ["finetune", "mlp", "captions"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    _, history = pretrained_by(start, features, monkeypatch)
    assert history["val"].iloc[0] == pytest.approx(metrics["val"], rel=1e-5)  # where the steps begin


def test_a_processor_with_bfloat16_trains_in_it_and_comes_as_far(features, monkeypatch):
    held_out = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(devices, "pick_dtype", lambda *_, dtype=dtype: dtype)
        _, history = pretrained_by(
            PLAIN | {"word_weights": "idf"}, features, monkeypatch
        )  # keeps what no other test asks for
        held_out.append(history["val"].iloc[-1])
    assert held_out[0] != held_out[1] == pytest.approx(held_out[0], rel=0.01)


@pytest.mark.parametrize("name", ["mmd", "sinkhorn_divergence", "bag_of_words"])
def test_other_objectives_have_the_same_figures(name, features, monkeypatch):
    metrics, history = pretrained_by({"name": name, "start": "constant_set"}, features, monkeypatch)
    assert history["val"].iloc[-1] < history["val"].iloc[0]
    assert set(metrics) >= {"val", "shuffled", "r1_debiased", "image_gain", "plain_val", "plain_gain_relative"}


def test_tokens_may_be_mixtures_of_words(features, monkeypatch):
    _, history = pretrained_by(PLAIN | {"tokens": "mixture", "cost": "euclidean"}, features, monkeypatch)
    assert history["val"].iloc[-1] < history["val"].iloc[0]
    assert "mixture.words" in load_file("data/demo/pretrain/mlp/last.safetensors")


SMALL = {"name": "qformer", "width": 64}


def test_an_adapter_may_be_pretrained_through_the_llm_beside_others(features, monkeypatch):
    metrics, history = pretrained_by(SMALL, features, monkeypatch, {"name": "caption_ce"})
    assert history["val"].iloc[-1] < history["val"].iloc[0] < 7
    assert "plain_val" in metrics and "const_set" not in metrics
    write_inputs(load_params())
    assert '"the LLM": {' in Path("data/demo/inputs/pretrain-mlp.json").read_text()
    pretrained_by(SMALL, features, monkeypatch)
    write_inputs(load_params())
    assert "LLM" not in Path("data/demo/inputs/pretrain-mlp.json").read_text()


def test_what_an_objective_learned_is_there_again_after_an_interruption(features, monkeypatch):
    """The same weights and figures, which both come through it; and none of it is saved with the adapter."""

    def run():
        found = pretrained_by(SMALL, features, monkeypatch)
        return *found, load_adapter(Run("demo").pretrained("mlp"), "last").state_dict()

    metrics, history, weights = run()
    assert history["train_loss"].iloc[2] < history["train_loss"].iloc[1]
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    start, calls = QFormer.start, []

    def breaks(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return start(*arguments)

    monkeypatch.setattr(QFormer, "start", breaks)
    with pytest.raises(KeyboardInterrupt):
        run()
    again, same, ours = run()
    assert len(calls) == 6 + history["step"].iloc[-1] - 5
    assert again == metrics
    pd.testing.assert_frame_equal(same, history)
    torch.testing.assert_close(ours, weights, rtol=0, atol=0)


def test_runs_share_what_an_objective_keeps(features, monkeypatch):
    fitted = []

    def fit(objective, count):
        fitted.append(count)
        return objective.pairs.table[:count].clone()

    monkeypatch.setattr("pipeline.objectives.constant_set.fit_constant_set", fit)
    alone = PLAIN | {"start": "constant_set"}
    first, _ = pretrained_by(alone, features, monkeypatch)
    second, history = pretrained_by(alone | {"contrast": 0.2}, features, monkeypatch)
    assert fitted == [9, 1]
    assert first["const_set"] == second["const_set"] == pytest.approx(history["const_set"].iloc[0], rel=1e-5)
    pretrained_by(alone | {"cost": "cosine"}, features, monkeypatch)
    assert fitted == [9, 1, 9, 1]
