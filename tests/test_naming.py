"""Naming without the LLM: its parts against references, and that training pictures do not tell on themselves."""

import math
from types import SimpleNamespace

import numpy as np
import ot
import pandas as pd
import pytest
import torch
from sklearn.cross_decomposition import CCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.nn import functional as F

from pipeline.adapters.module import build_adapter, load_adapter
from pipeline.answers.names import namer_at_work
from pipeline.errors import UserError
from pipeline.metrics.rules import calibration_error, figures_of
from pipeline.naming.discriminant import Discriminant, as_good_as, choose_shrinkage, cross_fitted, deal
from pipeline.naming.namer import Namer, Scales
from pipeline.naming.nearest import Nearest
from pipeline.naming.rules import RULES
from pipeline.naming.table import Named, hinted
from pipeline.naming.weigh import LOWEST, combined, fit_weights, sure_weights
from pipeline.objectives.base import Means
from pipeline.objectives.closed_form import fit_closed_form
from pipeline.objectives.emd import EMD, EMDSettings
from pipeline.objectives.names import NAMED, start_names
from pipeline.objectives.pairs import Names, Pairs
from pipeline.runs import Run

CLASSES, PER_CLASS, WIDTH, WORDS = 6, 16, 8, 20


def features(seed=0, classes=CLASSES):
    """Pictures of some classes, [n, WIDTH], and their classes."""
    rng = np.random.default_rng(seed)
    own = np.repeat(np.arange(classes), PER_CLASS)
    centers = np.random.default_rng(9).normal(size=(classes, WIDTH)) * 1.5
    return centers[own] + rng.normal(size=(len(own), WIDTH)) * [3, 1, 1, 1, 1, 1, 1, 0.2], own


def objective(names=None, **settings):
    """EMD on pictures of one token each, whose captions are two words given by their tokens linearly."""
    torch.manual_seed(3)
    images, table = torch.randn(60, 4, WIDTH), torch.randn(WORDS, 5)
    way = torch.randn(WIDTH, 5)
    nearest = torch.cdist(images.mean(1) @ way * 4, table).argsort(1)[:, :2]
    pairs = Pairs(
        lambda positions: images[positions], [[row] for row in nearest.tolist()], table, list(range(WORDS)),
        list(range(40)), list(range(40, 60)), 60, names or [], [0],
    )  # fmt: skip
    own = {"cost": "euclidean", "word_weights": "uniform", "start": "closed_form"} | settings
    return EMD(EMDSettings(**own), pairs, Means(seed=1))


@pytest.mark.parametrize("classes", [2, CLASSES])
@pytest.mark.parametrize("shrinkage", [0.05, 0.5])
def test_the_discriminant_is_scikit_learns(classes, shrinkage):
    known, own = features(classes=classes)
    new, _ = features(seed=1, classes=classes)
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(known, own)
    found = Discriminant.fit(known, own.tolist(), classes, shrinkage).of_features(torch.from_numpy(new))
    np.testing.assert_allclose(found.exp().numpy(), reference.predict_proba(new), atol=1e-4)


@pytest.mark.parametrize("shrinkage", [0.05, 0.5])
def test_fewer_pictures_than_numbers_in_a_feature_make_no_difference(shrinkage):
    rng = np.random.default_rng(3)
    own = np.arange(20) % 4
    known, new = (rng.normal(size=(20, 64)) + 2 * rng.normal(size=(4, 64))[own] for _ in range(2))
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(known, own)
    found = Discriminant.fit(known, own.tolist(), 4, shrinkage).of_features(torch.from_numpy(new))
    np.testing.assert_allclose(found.exp().numpy(), reference.predict_proba(new), atol=1e-4)


def test_a_class_without_a_picture_is_never_named():
    known, own = features()
    model = Discriminant.fit(known, own.tolist(), CLASSES + 1, 0.1)
    assert model.of_features(torch.from_numpy(known)).exp()[:, CLASSES].max() < 1e-6
    only = Discriminant.fit(known, [2] * len(own), CLASSES, 0.1)
    assert (only.of_features(torch.from_numpy(known)).argmax(1) == 2).all()


def test_the_shrinkage_is_the_one_that_names_held_out_pictures_best():
    known, own = features()
    new, right = features(seed=1)
    found = choose_shrinkage(known, own.tolist(), new, right.tolist(), CLASSES)

    def accuracy(shrinkage):
        model = Discriminant.fit(known, own.tolist(), CLASSES, shrinkage)
        return (model.of_features(torch.from_numpy(new)).argmax(1).numpy() == right).mean()

    assert accuracy(found) == max(accuracy(one) for one in (0.05, 0.1, 0.2, 0.3, 0.5, 0.8))


def test_training_pictures_are_named_by_what_did_not_see_them():
    """Pictures that have nothing in common but with those of their own series: from other series they can't be told."""
    rng = np.random.default_rng(0)
    own, blocks = np.tile(np.repeat(np.arange(4), 8), 4), np.repeat(np.arange(4), 32)
    marks = rng.normal(size=(4, 4, 40)) * 5  # of each block and class
    known = marks[blocks, own] + rng.normal(size=(len(own), 40)) * 0.1
    assert (
        Discriminant.fit(known, own.tolist(), 4, 0.1).of_features(torch.from_numpy(known)).argmax(1)
        == torch.from_numpy(own)
    ).all()
    folds = deal(own.tolist(), [f"series {block} of {one}" for block, one in zip(blocks, own, strict=True)], 4)
    assert all(len(set(folds[(blocks == block) & (own == one)])) == 1 for block in range(4) for one in range(4))
    assert all(len(set(folds[own == one])) == 4 for one in range(4))
    crossed = cross_fitted(known, own.tolist(), folds, 4, 0.1)
    assert (crossed.argmax(1).numpy() == own).mean() < 0.6


def test_the_llm_is_told_as_many_names_as_are_probable_together():
    likeliest = [("a", 0.6), ("b", 0.25), ("c", 0.1), ("d", 0.05)]
    assert hinted(likeliest, 5) == ["a", "b", "c"] and hinted(likeliest, 2) == ["a", "b"]
    assert hinted([("a", 0.95), ("b", 0.05)], 5) == ["a"] and hinted([], 5) == []


def test_a_table_of_names_comes_back_and_one_of_an_earlier_version_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, shares = Run("demo"), [[-0.1, -2.4], [-1.0, -0.5]]
    rows = pd.DataFrame({"split": ["val", "train"], "label": ["a", "b"], "candidates": [["a", "b"], ["b", "a"]]})
    rows = rows.assign(probabilities=[[0.9, 0.1], [0.6, 0.4]]).set_index(pd.Index(["x", "y"], name="id"))
    for rule in RULES:
        rows[rule] = shares
    named = Named(["a", "b"], rows)
    named.write(run.named("mlp") / "classes")
    again = Named.read(run, "mlp", "classes")
    assert again.names == ["a", "b"] and again.hinted("x", 5) == ["a"] and again.hinted("y", 5) == ["b", "a"]
    assert again.hinted("no such picture", 5) == []
    Named(["a", "b"], rows.drop(columns="probabilities")).write(run.named("mlp") / "classes")
    with pytest.raises(UserError, match=r"cannot be read .*'probabilities'.*; run `dvc repro name@mlp`"):
        Named.read(run, "mlp", "classes")


def test_candidates_of_training_pictures_are_as_good_as_those_of_new_ones():
    own = [0, 1] * 500
    right = F.one_hot(torch.tensor(own), 2).float()
    found = as_good_as(0.75, 1 - right, right, own, seed=1)
    assert (found.argmax(1) == torch.tensor(own)).float().mean().item() == pytest.approx(0.75, abs=0.05)
    assert torch.equal(as_good_as(0.1, right, right, own, seed=1), right)


def test_a_class_that_is_one_series_is_in_every_fold():
    folds = deal([0] * 9 + [1] * 3, ["same"] * 9 + ["a", "b", "b"], 4)
    assert set(folds[:9]) == {0, 1, 2, 3}
    assert folds[10] == folds[11] != folds[9]


def test_the_nearest_name_is_that_of_pot():
    found = objective(unmatched=0.0)
    names, tokens = [[0, 3], [5], [7, 8, 9]], torch.randn(6, 4, 5)
    nearest = Nearest.of(found, names)
    table = found.pairs.table
    expected = [
        [ot.emd2([], [], torch.cdist(image, table[name]).double().numpy()) for name in names] for image in tokens
    ]
    np.testing.assert_allclose(-nearest.scores(tokens).numpy(), expected, rtol=1e-4)
    debiased = nearest.debiased(lambda positions: tokens[positions], [0, 1, 2])
    np.testing.assert_allclose(
        -debiased.scores(tokens).numpy(), np.array(expected) - np.mean(expected[:3], axis=0), atol=1e-5
    )


def test_weights_are_those_of_the_likeliest_model():
    torch.manual_seed(0)
    useful, useless = torch.randn(4000, 5), torch.randn(4000, 5)
    own = torch.distributions.Categorical(logits=2.5 * useful).sample().tolist()
    weights = fit_weights({"useful": useful, "useless": useless}, own)
    assert weights["useful"] == pytest.approx(2.5, rel=0.06)
    assert weights["useless"] < 0.1
    ruled_out = torch.where(torch.rand_like(useful) < 0.3, LOWEST, useful)
    ruled_out[torch.arange(len(own)), own] = useful[torch.arange(len(own)), own]
    assert fit_weights({"useful": ruled_out}, own)["useful"] == pytest.approx(2.5, rel=0.3)
    alone = fit_weights({"useful": useful}, own)["useful"]
    losses = {
        scale: F.cross_entropy(scale * useful, torch.tensor(own)).item() for scale in (alone * 0.9, alone, alone * 1.1)
    }
    assert min(losses, key=losses.__getitem__) == alone


def test_scores_that_mislead_still_have_their_order():
    scores = torch.tensor([[2.0, 1.0, 0.0]] * 4)
    weights = fit_weights({"llm": scores}, [2] * 4)
    shares = combined({"llm": scores}, weights)[0]
    assert shares.argsort(descending=True).tolist() == [0, 1, 2] and shares.exp().max() < 0.34
    both = fit_weights({"llm": scores, "namer": scores.flip(1)}, [2] * 4)
    assert both["llm"] == 0 < both["namer"]


def test_scores_are_summed_only_where_that_is_surely_better():
    torch.manual_seed(0)
    first, second, noise = torch.randn(400, 5), torch.randn(400, 5), torch.randn(400, 5)
    own = torch.distributions.Categorical(logits=2 * (first + second)).sample().tolist()
    summed = sure_weights({"first": first, "second": second}, own)
    assert summed == fit_weights({"first": first, "second": second}, own) and min(summed.values()) > 1
    alone = sure_weights({"first": first, "noise": noise}, own)
    assert alone == {**fit_weights({"first": first}, own), "noise": 0.0}
    nearly = {"first": first + second, "other": first + second + 0.1 * noise}  # both say the same
    assert sorted(weight > 0 for weight in sure_weights(nearly, own).values()) == [False, True]


def test_a_namer_comes_back_as_it_was(tmp_path):
    found, (known, own) = objective(), features()
    nearest = Nearest.of(found, [[i, i + 1] for i in range(CLASSES)])
    discriminant = Discriminant.fit(known, own.tolist(), CLASSES, 0.1)
    namer = Namer([f"class {i}" for i in range(CLASSES)], nearest, discriminant, Scales(2.0, 0.5, (1.0, 0.25)), 0.7)
    namer.save(tmp_path / "mlp/classes")
    again, tokens, adapted = Namer.load(tmp_path / "mlp/classes", 1), torch.randn(3, 4, WIDTH), torch.randn(3, 4, 5)
    for rule, shares in namer.rules(tokens, adapted).items():
        torch.testing.assert_close(again.rules(tokens, adapted)[rule], shares)
        torch.testing.assert_close(shares.exp().sum(1), torch.ones(3))
    assert again.names == namer.names and again.val_loss == 0.7
    (tmp_path / "mlp/classes/namer.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be loaded as a namer"):
        Namer.load(tmp_path / "mlp/classes", 1)


def test_where_emd_has_no_part_the_adapter_is_not_asked(tmp_path, monkeypatch):
    found, (known, own) = objective(), features()
    nearest = Nearest.of(found, [[i, i + 1] for i in range(CLASSES)])
    discriminant = Discriminant.fit(known, own.tolist(), CLASSES, 0.1)
    params = SimpleNamespace(profile="tiny", runtime=SimpleNamespace(emd_threads=1, device="cpu"))
    monkeypatch.setattr("pipeline.answers.names.check_start", lambda *_: None)
    tokens = torch.randn(3, 4, WIDTH)
    for emd in (0.0, 0.7):
        adapter = Pooled()
        monkeypatch.setattr("pipeline.answers.names.load_adapter", lambda *_, adapter=adapter: adapter)
        namer = Namer([f"class {i}" for i in range(CLASSES)], nearest, discriminant, Scales(2.0, 0.5, (emd, 0.3)), 0.7)
        namer.save(tmp_path / "mlp/classes")
        named = namer_at_work(params, tmp_path / "mlp/classes")
        expected = namer.rules(tokens, Pooled()(tokens))["namer"].exp()
        for names, shares in zip(named(tokens, "namer"), expected, strict=True):
            assert names == pytest.approx(dict(zip(namer.names, shares.tolist(), strict=True)), abs=1e-6)
        assert adapter.asked == bool(emd)


class Pooled(torch.nn.Module):
    """An adapter to tokens of five numbers."""

    asked = False

    def forward(self, tokens):
        self.asked = True
        return tokens[..., :5]


def test_figures_of_a_rule():
    scores = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2], [0.1, 0.1, 0.8], [0.6, 0.3, 0.1]]).log()
    found = {figure.key: figure for figure in figures_of("emd", scores, [0, 1, 2, 2])}
    assert found["acc/emd"].value == 0.5  # a tie counts for the first name alone
    assert found["macro/emd"].value == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["top5/emd"].value == 1.0
    assert found["acc/emd"].interval is not None
    right = np.array([True, False, True, True])
    assert calibration_error(np.array([0.9, 0.9, 0.5, 0.5]), right) == pytest.approx(0.5 * 0.4 + 0.5 * 0.5)


def test_the_loss_of_names_is_the_cross_entropy_of_pots_distances():
    names = Names([[0, 1], [2], [3, 4, 5]], {0: 2, 2: 0})
    found, tokens = objective([names], temperature=0.5), torch.randn(3, 4, 5)
    distances = [
        [ot.emd2([], [], torch.cdist(tokens[row], found.pairs.table[name]).double().numpy()) for name in names.captions]
        for row in (0, 2)
    ]
    expected = F.cross_entropy(-torch.tensor(distances) / 0.5, torch.tensor([2, 0]), reduction="sum") / 3
    assert start_names(found, tokens, [0, 1, 2]).result().item() == pytest.approx(expected.item(), rel=1e-4)
    assert start_names(found, tokens[:1], [1]).result().item() == 0


def test_of_very_many_names_the_right_one_is_always_among_the_chosen():
    names = Names([[i % WORDS] for i in range(4 * NAMED)], {i: 4 * NAMED - 1 - i for i in range(60)})
    found = objective([names])
    loss = start_names(found, torch.randn(2, 4, 5), [0, 7]).result().item()
    assert 0 < loss < 20 and math.isfinite(loss)


@pytest.mark.parametrize("kind", ["linear", "mlp", "self_attention", "query"])
def test_every_adapter_starts_at_the_closed_form_and_comes_back(kind, tmp_path):
    found = objective()
    torch.manual_seed(0)
    wide = {"width": 8, "blocks": 1} if kind in ("self_attention", "query") else {}
    adapter = build_adapter(kind, WIDTH, 5, pool=2, **wide, **({"queries": 3} if kind == "query" else {})).eval()
    found.initialise(adapter, found.pairs.tokens([0, 1, 2]))
    held_out = found.pairs.tokens(found.pairs.val)
    words = torch.stack([found.pairs.table[caption[0]].mean(0) for caption in found.pairs.captions])
    center = words.mean(0)
    mean = (adapter(held_out).mean(1) - adapter(held_out).mean((0, 1))) @ F.normalize(words - center, dim=1).T
    ranks = (mean > mean.gather(1, torch.tensor(found.pairs.val)[:, None])).sum(1)
    assert ranks.float().mean() < 10  # of 60: it has never seen these, chance is 29.5
    adapter.save(tmp_path, "last")
    torch.testing.assert_close(load_adapter(tmp_path, "last")(held_out), adapter(held_out))


def test_the_closed_form_is_least_squares_where_that_ranks_best(monkeypatch):
    monkeypatch.setattr("pipeline.objectives.closed_form.RIDGES", (1e-9,))
    found = objective()
    fitted = fit_closed_form(found, lambda tokens: tokens).double()
    images = found.pairs.tokens(found.pairs.train).mean(1).double().numpy()
    words = (
        torch.stack([found.pairs.table[found.pairs.captions[i][0]].mean(0) for i in found.pairs.train]).double().numpy()
    )
    centered = images - images.mean(0)
    ridge = np.linalg.lstsq(centered, words - words.mean(0), rcond=None)[0]
    whitener = np.linalg.cholesky(np.linalg.inv(np.cov(images.T, bias=True)))
    left, _, right = np.linalg.svd((centered @ whitener).T @ (words - words.mean(0)), full_matrices=False)
    procrustes = whitener @ left @ right
    near = [np.abs(fitted[:-1].numpy() - ridge).max() < 1e-4]
    ratio = fitted[:-1].numpy() / procrustes
    near.append(np.ptp(ratio) < 1e-3 * np.abs(ratio).mean())  # the same but for its scale
    assert any(near)
    np.testing.assert_allclose(fitted[-1].numpy(), images.mean(0) @ fitted[:-1].numpy(), atol=1e-5)


def test_the_closed_form_by_cca_maps_canonical_variates_to_their_partners(monkeypatch):
    monkeypatch.setattr("pipeline.objectives.closed_form.RIDGES", (1e-9,))
    found = objective(closed_form="cca")
    fitted = fit_closed_form(found, lambda tokens: tokens)[:-1].double().numpy()
    images = found.pairs.tokens(found.pairs.train).mean(1).double().numpy()
    words = [found.pairs.table[found.pairs.captions[i][0]].mean(0).double().numpy() for i in found.pairs.train]
    reference = CCA(5, scale=False, max_iter=100_000, tol=1e-12).fit(images, np.array(words))
    mapped, variates = (images - images.mean(0)) @ fitted, reference.transform(images)
    partners = mapped @ reference.y_rotations_
    for number in range(5):
        assert np.corrcoef(partners[:, number], variates[:, number])[0, 1] > 0.9999
    ratio = np.cov(mapped.T) / np.cov(np.array(words).T)
    assert np.ptp(ratio) < 1e-3 * ratio.mean()  # they spread as words do, but for the scale


def test_the_kind_of_the_closed_form_may_be_named():
    kinds = ("best", "ridge", "procrustes", "cca")
    fitted = {kind: fit_closed_form(objective(closed_form=kind), lambda tokens: tokens) for kind in kinds}
    assert any(torch.equal(fitted["best"], fitted[kind]) for kind in ("ridge", "procrustes"))
    assert len({tuple(one.flatten().tolist()) for one in fitted.values()}) == 3
