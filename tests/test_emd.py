"""EMD against POT, scipy's linear programming, sklearn's distances and finite differences."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linprog
from sklearn.metrics import pairwise_distances

from pipeline.started import Started
from pipeline.transport import emd as module
from pipeline.transport.costs import cost_matrix, ground_costs
from pipeline.transport.emd import emd, start_emd
from pipeline.transport.gradient import cost_of_plans
from pipeline.transport.layout import Layout
from pipeline.transport.sinkhorn import sinkhorn
from pipeline.transport.solve import solve

METRICS = {"euclidean": "euclidean", "sqeuclidean": "sqeuclidean", "cosine": "cosine"}
SHAPES = {  # tokens, fewest and most words
    "demo": (9, 3, 12), "long captions": (5, 6, 40), "one word": (20, 1, 1), "one token": (1, 1, 12),
    "square": (24, 24, 24), "thesis": (255, 8, 20),
}  # fmt: skip
WEIGHTS = ["equal", "random", "uneven", "zeros"]


def problem(seed, images=3, tokens=7, width=5, captions=(2, 1, 3)):
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (sum(captions),), generator=rng).tolist()
    offsets = np.cumsum([0, *lengths]).tolist()
    index = [i for i, count in enumerate(captions) for _ in range(count)]
    x = torch.randn(images, tokens, width, generator=rng)
    words = torch.randn(offsets[-1], width, generator=rng)
    words[offsets[-1] // 2] = words[0]  # a repeated word
    return x, words, offsets, index


def random_costs(rng, kind, n, m):
    """Costs [n, m] in units of one: what a solver may stumble over."""
    costs = rng.random((n, m))
    if kind == "ties":
        costs = rng.integers(0, 3, (n, m)).astype(float)
    elif kind == "duplicates":
        costs = costs[rng.integers(0, n, n)][:, rng.integers(0, m, m)]
    elif kind == "zeros":
        costs = costs * (rng.random((n, m)) < 0.2)
    elif kind == "flat":
        costs = np.zeros((n, m))
    elif kind == "line":  # many near ties, and every token near the same few words
        costs = (np.sort(rng.random(n))[:, None] - rng.random(m) ** 4) ** 2
    elif kind == "shifted":
        costs = costs + 1000
    return costs


def random_weights(rng, kind, count):
    weights = np.ones(count)
    if kind == "random":
        weights = rng.random(count) + 1e-3
    elif kind == "uneven":
        weights = 10.0 ** rng.uniform(-9, 0, count)
    elif kind == "zeros":
        weights = rng.random(count) * (rng.random(count) < 0.5)
        weights[rng.integers(count)] = 1
    return weights


def check_plan(plan, costs, b, optimum, prices, scale=1.0):
    """A plan of one pair: feasible, no dearer than `optimum`, sparse, and proven optimal by prices of its words.

    Whatever prices v are, a @ min_j(C_ij - v_j) + b @ v bounds all plans from below, by weak duality.
    """
    n, m = costs.shape
    dense = np.zeros((n, m))
    dense[plan.token, plan.word] = plan.mass
    b = b / b.sum()
    np.testing.assert_allclose(dense.sum(1), 1 / n, atol=1e-12)
    np.testing.assert_allclose(dense.sum(0), b, atol=1e-12)
    assert (plan.mass > 0).all()
    assert len(plan.mass) == np.count_nonzero(dense) <= n + m - 1
    rounding = 1e-13 * scale * max(1, np.abs(costs).max() / scale)
    value = (dense * costs).sum()
    assert value == pytest.approx(optimum, rel=1e-9, abs=rounding)
    bound = (costs - prices)[:, b > 0].min(1).mean() + b @ prices
    assert abs(value - bound) <= 10 * rounding


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["random", "ties", "duplicates", "zeros", "flat", "line", "shifted"])
def test_plans_are_optimal(kind, shape):
    """1,176 problems in all. POT solves them in units of one, as it does not tell very small costs from zero."""
    rng = np.random.default_rng(sum(map(ord, kind + shape)))
    for trial in range(28):
        n, least, most = SHAPES[shape]
        m = rng.integers(least, most + 1)
        costs, b = random_costs(rng, kind, n, m), random_weights(rng, WEIGHTS[trial % len(WEIGHTS)], m)
        _, log = ot.emd([], b / b.sum(), costs, numItermax=10**6, log=True)
        scale = 10.0 ** (rng.uniform(-12, 12) if trial < 14 else 0)
        plan = solve((costs * scale)[None], Layout([0, m], [0], 1), word_weights=b)
        check_plan(plan, costs * scale, b, log["cost"] * scale, log["v"] * scale, scale)


@pytest.mark.parametrize(("n", "m"), [(6, 4), (4, 6), (12, 5)])
def test_plans_equal_linear_programming(n, m):
    rng = np.random.default_rng(n)
    costs, b = rng.random((n, m)), rng.random(m)
    sums = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    found = linprog(costs.ravel(), A_eq=sums, b_eq=np.r_[np.full(n, 1 / n), b / b.sum()])
    plan = solve(costs[None], Layout([0, m], [0], 1), word_weights=b)
    check_plan(plan, costs, b, found.fun, found.eqlin.marginals[n:])


def partial_optimum(costs, b, unmatched):
    """The least cost of covering every word, when that share of the tokens' mass may stay where it is."""
    n, m = costs.shape
    rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    return linprog(
        costs.ravel(), A_ub=rows, b_ub=np.full(n, 1 / n), A_eq=columns, b_eq=(1 - unmatched) * b / b.sum()
    ).fun


@pytest.mark.parametrize("solver", ["exact", "pot"])
@pytest.mark.parametrize("kind", ["random", "ties", "zeros", "line"])
def test_partial_plans_are_optimal(kind, solver):
    rng = np.random.default_rng(sum(map(ord, kind)))
    for _ in range(20):
        n, lengths, unmatched = rng.integers(1, 12), rng.integers(1, 9, 3), rng.choice([0.05, 0.3, 0.9])
        offsets = np.cumsum([0, *lengths])
        costs = random_costs(rng, kind, 2 * n, offsets[-1]).reshape(2, n, -1)
        b = rng.random(offsets[-1]) + 0.01
        index, columns = [1, 0, 1], [(0, lengths[0]), (0, lengths[1]), (lengths[0], lengths[0] + lengths[2])]
        plan = solve(costs, Layout(offsets, index, 2), word_weights=b, unmatched=unmatched, solver=solver)
        for pair, image in enumerate(index):
            dense = np.zeros((n, lengths[pair]))
            here = plan.pair == pair
            dense[plan.token[here], plan.word[here] - offsets[pair]] = plan.mass[here]
            mine, words = costs[image][:, slice(*columns[pair])], b[offsets[pair] : offsets[pair + 1]]
            np.testing.assert_allclose(dense.sum(0), (1 - unmatched) * words / words.sum(), atol=1e-12)
            assert (dense.sum(1) <= 1 / n + 1e-12).all()
            best = partial_optimum(mine, words, unmatched)
            assert (dense * mine).sum() == pytest.approx(best, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("cost", METRICS)
def test_partial_values_and_gradients_equal_pots(cost):
    x, words, offsets, index = problem(4)
    words[offsets[-1] // 2] += 0.5  # no repeated word: one optimum
    ours = [x.clone().requires_grad_(), words.clone().requires_grad_()]
    values = emd(*ours, offsets, index, cost=cost, unmatched=0.3)
    values.sum().backward()
    theirs = [x.double().requires_grad_(), words.double().requires_grad_()]
    for pair, image in enumerate(index):
        y = theirs[1][offsets[pair] : offsets[pair + 1]]
        matrix = cost_matrix(theirs[0][image][None], y, torch.arange(len(y))[None], cost)[0]
        a, b = np.full(len(matrix), 1 / len(matrix)), np.full(len(y), 0.7 / len(y))
        plan = ot.partial.partial_wasserstein(a, b, matrix.detach().numpy(), m=b.sum())
        expected = (torch.from_numpy(plan) * matrix).sum()
        expected.backward()
        assert values[pair].item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=0, atol=1e-5 * other.grad.abs().max().item())


def test_unmatched_mass_needs_an_exact_plan():
    with pytest.raises(ValueError, match="not for sinkhorn"):
        emd(torch.ones(1, 2, 3), torch.zeros(2, 3), [0, 2], [0], cost="cosine", solver="sinkhorn", unmatched=0.1)


@pytest.mark.parametrize("solver", ["exact", "pot"])
def test_threads_change_nothing(solver):
    rng = np.random.default_rng(0)
    offsets = np.cumsum([0, *rng.integers(8, 21, 20)]).tolist()
    costs = rng.random((4, 255, offsets[-1])).astype(np.float32)
    layout = Layout(offsets, [0, 1, 2, 3] * 5, 4)
    for alone, together in zip(*(solve(costs, layout, solver=solver, threads=t) for t in (1, 3)), strict=True):
        np.testing.assert_array_equal(alone, together)


@pytest.mark.parametrize("cost", METRICS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("solver", ["exact", "pot"])
@pytest.mark.parametrize(("tokens", "seed"), [(7, 0), (7, 1), (1, 2), (255, 3)])
def test_values_equal_pot(cost, weighted, solver, tokens, seed):
    x, words, offsets, index = problem(seed, tokens=tokens)
    weights = torch.rand(len(words)) if weighted else torch.ones(len(words))
    ours = emd(x, words, offsets, index, cost=cost, word_weights=weights if weighted else None, solver=solver)
    for pair, image in enumerate(index):
        span = slice(offsets[pair], offsets[pair + 1])
        matrix = pairwise_distances(x[image].double().numpy(), words[span].double().numpy(), METRICS[cost])
        b = weights[span].double().numpy() / weights[span].double().sum().item()
        assert ours[pair].item() == pytest.approx(ot.emd2([], b, matrix), rel=1e-5)


@pytest.mark.parametrize("cost", METRICS)
@pytest.mark.parametrize("seed", range(5))
def test_gradient_equals_that_of_pots_plan(cost, seed):
    x, words, offsets, index = problem(seed)
    words[offsets[-1] // 2] += 0.5  # no repeated word: one optimum
    factor = torch.randn(len(index))
    ours = [x.clone().requires_grad_(), words.clone().requires_grad_()]
    (emd(*ours, offsets, index, cost=cost) * factor).sum().backward()
    theirs = [x.double().requires_grad_(), words.double().requires_grad_()]
    for pair, image in enumerate(index):
        y = theirs[1][offsets[pair] : offsets[pair + 1]]
        distance = torch.cdist(theirs[0][image], y)
        if cost == "cosine":
            distance = 1 - torch.nn.functional.cosine_similarity(theirs[0][image][:, None], y[None], dim=-1)
        matrix = distance.square() if cost == "sqeuclidean" else distance
        plan = ot.emd([], [], matrix.detach().numpy())
        (factor[pair] * (torch.from_numpy(plan) * matrix).sum()).backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=0, atol=1e-6 * other.grad.abs().max().item())


@pytest.mark.parametrize("cost", METRICS)
def test_gradient_equals_finite_differences(cost):
    x, words, offsets, index = problem(3)
    ours = x.clone().requires_grad_()
    emd(ours, words, offsets, index, cost=cost).sum().backward()

    def reference(shift):
        moved, total = x.double() + shift, 0.0
        for pair, image in enumerate(index):
            y = words[offsets[pair] : offsets[pair + 1]].double().numpy()
            total += ot.emd2([], [], pairwise_distances(moved[image].numpy(), y, METRICS[cost]))
        return total

    for place in [(0, 0, 0), (1, 3, 2), (2, 6, 4), (0, 5, 1)]:
        shift = torch.zeros(x.shape, dtype=torch.float64)
        shift[place] = 1e-5
        difference = (reference(shift) - reference(-shift)) / 2e-5
        assert ours.grad[place].item() == pytest.approx(difference, abs=1e-6 * ours.grad.abs().max().item() + 1e-9)


def test_points_that_coincide_have_a_finite_gradient():
    x = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]], requires_grad=True)
    for cost in METRICS:
        emd(x, torch.tensor([[1.0, 2.0], [0.0, 0.0]]), [0, 2], [0], cost=cost).sum().backward()
    assert x.grad.isfinite().all()


def test_captions_of_an_image_may_stand_apart_and_an_image_may_have_none():
    x, words, offsets, index = problem(1)
    order = [4, 0, 2, 5, 1, 3]
    spans = [range(offsets[pair], offsets[pair + 1]) for pair in order]
    moved = torch.tensor([word for span in spans for word in span])
    apart = [torch.cat([torch.randn(1, *x.shape[1:]), x]).requires_grad_(), words[moved].requires_grad_()]
    together = [x.requires_grad_(), words.requires_grad_()]
    expected = emd(*together, offsets, index, cost="sqeuclidean")
    values = emd(*apart, np.cumsum([0, *map(len, spans)]).tolist(), [index[p] + 1 for p in order], cost="sqeuclidean")
    torch.testing.assert_close(values, expected[order])
    weights = torch.rand(len(order))
    (values * weights).sum().backward()
    (expected[order] * weights).sum().backward()
    torch.testing.assert_close(apart[0].grad[1:], x.grad)
    torch.testing.assert_close(apart[1].grad, words.grad[moved])
    assert not apart[0].grad[0].any()


def test_no_caption_gives_no_value_and_words_of_none_are_refused():
    x, words = torch.randn(2, 4, 5), torch.randn(3, 5)
    assert (
        emd(x, words[:0], [0], [], cost="euclidean").shape == emd(x, words[:0], [0], None, cost="cosine").shape == (0,)
    )
    with pytest.raises(ValueError, match="offsets end at 2, and there are 3 words"):
        emd(x, words, [0, 2], [0], cost="euclidean")


def test_center_moves_the_cosine():
    x, words = torch.randn(1, 4, 5), torch.randn(3, 5)
    center = torch.randn(5)
    expected = pairwise_distances((x[0] - center).numpy(), (words - center).numpy(), "cosine")
    np.testing.assert_allclose(
        cost_matrix(x - center, words - center, torch.arange(3)[None], "cosine")[0], expected, atol=1e-5
    )
    value = emd(x, words, [0, 3], [0], cost="cosine", center=center).item()
    assert value == pytest.approx(ot.emd2([], [], expected.astype(float)), abs=1e-5)


def test_costs_are_float32_whatever_the_model_computes_in():
    x, words, offsets, index = problem(0)
    x, words = x.bfloat16(), words.bfloat16()
    expected = emd(x.float(), words.float(), offsets, index, cost="sqeuclidean")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(emd(x, words, offsets, index, cost="sqeuclidean"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("solver", ["exact", "pot", "sinkhorn"])
def test_words_of_no_weight_do_not_count(solver):
    x, words = torch.randn(1, 4, 5), torch.randn(3, 5)
    alone = emd(x, words[:2], [0, 2], [0], cost="euclidean", solver=solver)
    weights = torch.tensor([2.0, 2.0, 0.0])
    ignored = emd(x, words, [0, 3], [0], cost="euclidean", solver=solver, word_weights=weights)
    torch.testing.assert_close(alone, ignored, rtol=1e-6 if solver != "sinkhorn" else 0.02, atol=0)


@pytest.mark.parametrize("solver", ["exact", "pot", "sinkhorn"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_cost_that_is_not_finite_names_the_pair(bad, solver):
    x, words, offsets, index = problem(1)
    x[1, 0, 0] = bad
    with pytest.raises(ValueError, match=r"pair 2 .image 1.: a ground cost is not finite"):
        emd(x, words, offsets, index, cost="sqeuclidean", solver=solver)


@pytest.mark.parametrize("solver", ["exact", "pot", "sinkhorn"])
@pytest.mark.parametrize("bad", [[0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0]])
def test_weights_that_are_none_name_the_pair(bad, solver):
    x, words = torch.randn(2, 4, 5), torch.randn(5, 5)
    with pytest.raises(ValueError, match=r"pair 1 .image 0.: weights have to be"):
        emd(x, words, [0, 3, 5], [1, 0], cost="cosine", solver=solver, word_weights=torch.tensor([1.0, 1, 1, *bad]))
    with pytest.raises(ValueError, match="pair 1: the caption has no words"):
        emd(x, words, [0, 5, 5], [1, 0], cost="cosine", solver=solver)


def test_sinkhorn_comes_near_from_above():
    x, words, offsets, index = problem(5, tokens=40)
    exact = emd(x, words, offsets, index, cost="sqeuclidean")
    layout = Layout(offsets, index, len(x))
    ground = ground_costs(x, words, layout, "sqeuclidean", None)
    rough, fine = (
        cost_of_plans(ground, sinkhorn(ground.costs, layout, None, r), len(index)) / exact - 1 for r in (0.5, 0.02)
    )
    assert (fine > -0.005).all()
    assert (fine < 0.05).all()
    assert rough.mean() > 3 * fine.mean()
    default = emd(x, words, offsets, index, cost="sqeuclidean", solver="sinkhorn") / exact - 1
    assert default.abs().mean() < fine.abs().mean()


def test_the_first_run_which_compiles_gives_what_later_ones_give(tmp_path):
    """Bit for bit: numba compiles loops that may be reordered one way and loads them in another, and where costs are as
    tied as these the last bit of a price decides between plans that are as good."""
    code = """
import numpy as np
from pipeline.transport.layout import Layout
from pipeline.transport.solve import solve
costs = np.random.default_rng(0).integers(0, 10, (200, 30, 12)).astype(np.float32) / 10
plan = solve(costs, Layout(range(0, 2412, 12), range(200), 200))
print([column.tobytes().hex() for column in plan])
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    first, later = (
        subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True).stdout
        for _ in range(2)
    )
    assert first == later and any(tmp_path.iterdir())


def test_needs_neither_pot_nor_numba_to_be_imported():
    code = """
import sys
sys.modules["ot"] = None
import torch
from pipeline.transport.emd import emd
assert "numba" not in sys.modules
assert emd(torch.ones(1, 2, 3), torch.zeros(2, 3), [0, 2], [0], cost="sqeuclidean").item() == 3
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("cost", METRICS)
def test_each_caption_with_each_image_is_as_if_every_image_had_captions_of_its_own(cost):
    x, words, offsets, _ = problem(5)
    captions, weights = len(offsets) - 1, torch.rand(len(words))
    own = [0, *(i * offsets[-1] + end for i in range(len(x)) for end in offsets[1:])]
    index = [i for i in range(len(x)) for _ in range(captions)]
    grad = torch.randn(len(index), generator=torch.Generator().manual_seed(1))
    results = []
    for repeats, ends, images in ((1, offsets, None), (len(x), own, index)):
        tokens, vocabulary = x.clone().requires_grad_(), words.clone().requires_grad_()
        values = emd(
            tokens, vocabulary.repeat(repeats, 1), ends, images, cost=cost, word_weights=weights.repeat(repeats)
        )
        results.append((values, *torch.autograd.grad(values @ grad, (tokens, vocabulary))))
    for shared, separate in zip(*results, strict=True):
        torch.testing.assert_close(shared, separate)


@pytest.mark.parametrize("unmatched", [0.0, 0.3])
def test_two_batches_in_flight_have_the_values_and_gradients_of_one_after_the_other(monkeypatch, unmatched):
    started, solvers = threading.Event(), []

    def waits(*args, **options):  # until both are started, so nobody may wait for it before
        assert started.wait(10)
        solvers.append((threading.current_thread(), len(args[0])))
        return solve(*args, **options)

    problems = [problem(6), problem(7, images=2, captions=(2, 1))]
    alone, together = (
        [(x.clone().requires_grad_(), w.clone().requires_grad_()) for x, w, *_ in problems] for _ in "ab"
    )
    options = {"cost": "euclidean", "unmatched": unmatched}
    expected = [emd(*sides, *p[2:], **options) for sides, p in zip(alone, problems, strict=True)]
    monkeypatch.setattr(module, "solve", waits)
    losses = [
        start_emd(*sides, *p[2:], **options, background=True) for sides, p in zip(together, problems, strict=True)
    ]
    started.set()
    found = [loss.result() for loss in losses]
    assert [images for _, images in solvers] == [3, 2]
    assert threading.current_thread() not in [thread for thread, _ in solvers]
    for values in (expected, found):
        sum(value.sum() for value in values).backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for mine, other in zip(together, alone, strict=True):
        torch.testing.assert_close([m.grad for m in mine], [o.grad for o in other], rtol=0, atol=0)


def test_what_fails_in_the_background_is_raised_at_the_finish():
    x, words, offsets, index = problem(1)
    x[1, 0, 0] = float("nan")
    started = start_emd(x, words, offsets, index, cost="cosine", background=True)
    with pytest.raises(ValueError, match=r"pair 2 .image 1.: a ground cost is not finite"):
        started.result()


def test_started_values_make_another_that_is_worked_out_when_asked_for():
    asked = []
    one, two = (Started(lambda value=value: asked.append(value) or torch.tensor(value)) for value in (1.0, 2.0))
    both = one.then(lambda value: value + 10 * two.result())
    assert not asked
    assert both.result().item() == 21
    assert asked == [1, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("cost", METRICS)
def test_a_gpu_gives_the_values_and_gradients_of_the_cpu(cost, background, monkeypatch):
    """Also where adapters multiply in TF32, in which the costs would cancel."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    x, words, offsets, index = problem(3, tokens=255)
    words[offsets[-1] // 2] += 0.5  # no repeated word: one optimum
    here, there = (x.clone().to(device).requires_grad_() for device in ("cpu", "cuda"))
    expected = emd(here, words, offsets, index, cost=cost)
    found = start_emd(there, words.to("cuda"), offsets, index, cost=cost, background=background).result()
    expected.sum().backward()
    found.sum().backward()
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=1e-3, atol=1e-5)


def test_compiled_code_goes_where_it_can_be_written(project, monkeypatch, capsys):
    from numba import config
    from numba.core import caching

    from pipeline.transport.exact import can_keep_compiled

    # Neither beside the source nor in the home folder: only what CACHE_DIR names is left.
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [caching.UserProvidedCacheLocator])
    monkeypatch.setattr(config, "CACHE_DIR", "")
    assert can_keep_compiled() and Path(config.CACHE_DIR) == project / "data/numba"
    monkeypatch.setattr(config, "CACHE_DIR", str(project / "mine"))
    assert can_keep_compiled() and Path(config.CACHE_DIR) == project / "mine"
    monkeypatch.setattr(config, "CACHE_DIR", "")
    Path("data/numba").rename("there")
    Path("data/numba").touch()
    assert not capsys.readouterr().err
    assert not can_keep_compiled()
    assert "set NUMBA_CACHE_DIR" in capsys.readouterr().err
