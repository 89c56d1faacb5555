"""Exact Earth Mover's Distance between adapted image tokens and caption words, and its gradient (docs/emd.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Literal, NamedTuple, NoReturn, ParamSpec

import numpy as np
import torch
from torch import Tensor

from pipeline.devices import exact_products, to_device

Cost = Literal["euclidean", "sqeuclidean", "cosine"]
Solver = Literal["exact", "pot", "sinkhorn"]
TINY = 1e-12  # a squared distance or a norm below this counts as zero, and has no gradient
SMALL = 20_000  # costs of a batch: below, waking another thread takes longer than solving
POT_ITERATIONS, POT_OPTIMAL = 1_000_000, 1
SINKHORN_ITERATIONS = 200
SINKHORN_REGULARISATION = 0.01  # times the mean cost of a pair
BACKGROUND = ThreadPoolExecutor(1, "emd")  # one, so that batches are solved in order, each on all solver threads
Arguments = ParamSpec("Arguments")
Entries = tuple[Tensor, Tensor, Tensor]  # of plans, [E] each: place in the flattened costs, pair, mass


class Plan(NamedTuple):
    """Transport plans of P pairs: entry e moves mass[e] of its pair from a token to a word."""

    pair: np.ndarray  # [E] int64
    token: np.ndarray  # [E] int64
    word: np.ndarray  # [E] int64, counted through all captions
    mass: np.ndarray  # [E] float64, sums to 1 in each pair, less what is unmatched
    potential: np.ndarray  # [T] float64: v of an optimal dual; min over words of (cost - v) is the tokens' potential


def start_emd(
    tokens: Tensor,
    words: Tensor,
    offsets: Sequence[int],
    image_index: Sequence[int] | None,
    *,
    cost: Cost,
    word_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
    center: Tensor | None = None,
    unmatched: float = 0.0,
    solver: Solver = "exact",
    threads: int = 1,
    regularisation: float = SINKHORN_REGULARISATION,
    background: bool = False,
) -> Callable[[], Tensor]:
    """Start the EMD of P pairs (image, caption), and return what finishes it and gives the values.

    Values are [P], float32, differentiable in `tokens` and `words`. With `background` an exact solver works in another
    thread from now on, without it when the values are asked for; on a GPU starting does not wait for the device.

    tokens [B, N, D]; words [T, D] of all captions one after the other, caption p is words[offsets[p]:offsets[p + 1]];
    image_index [P] names each caption's image, so the captions of an image share its tokens and its cost matrix. None:
    each caption with each image, all captions of the first image first; the images then share the words.
    Tokens weigh alike, or by token_weights [B, N]; words weigh alike, or by word_weights [T]; both are normalised,
    within an image and within a caption. `center` [D] is subtracted from both sides before the cosine.
    Costs are float32 whatever the inputs' dtype, under autocast too.
    unmatched: this share of an image's token mass, in [0, 1), need not become a word and costs nothing; the caption
    gets the rest, cheapest for it. That is partial transport (Caffarelli & McCann 2010), exact; not with Sinkhorn.

    solver: "exact" is our own (pipeline/transport.py), "pot" POT's network simplex (Bonneel et al. 2011), which has to
    give the same; both on `threads` threads of the CPU. "sinkhorn" is an approximation for comparison only, on the
    tokens' device; `regularisation`, times a pair's mean cost, is its temperature.

    The gradient is that of sum(plan * cost) with the plan held fixed: for an exact plan that is the gradient of the
    EMD wherever it has one (envelope theorem, Danskin 1967); for Sinkhorn's it is wrong by far more than the value.
    Weights and center get none. Finishing raises ValueError naming the pair when a cost is not finite, weights are
    negative or sum to nothing, or no optimum is found; starting does when a caption has no words, the offsets do not
    end with the words, or unmatched mass is asked of Sinkhorn.
    """
    if unmatched and solver == "sinkhorn":
        raise ValueError("unmatched mass is for the exact solvers, not for sinkhorn")
    if offsets[-1] != len(words):
        raise ValueError(f"the offsets end at {offsets[-1]}, and there are {len(words)} words")
    all_pairs = image_index is None
    if image_index is None:
        offsets, image_index, word_weights = _all_pairs(len(tokens), offsets, word_weights)
    layout = _Layout(offsets, image_index, len(tokens))
    word_at = torch.arange(len(words))[None] if all_pairs else torch.from_numpy(layout.word_at())
    word_at = to_device(word_at, tokens.device)
    weights = _numpy(token_weights), _numpy(word_weights)
    with torch.autocast(tokens.device.type, enabled=False):
        x, y = tokens.float(), words.float()
        if center is not None and cost == "cosine":
            x, y = x - center, y - center
        costs = cost_matrix(x.detach(), y.detach(), word_at, cost)

    def value(place: Tensor, pair: Tensor, mass: Tensor) -> Tensor:
        """EMD [P] by plans, differentiable."""
        found: Tensor = _EMD.apply(x, y, cost, costs, word_at, place, pair, mass, len(layout.image))
        return found

    if solver == "sinkhorn":
        return lambda: value(*_sinkhorn(costs, layout, *weights, regularisation))
    on_host, arrived = _to_host(costs)

    def plans() -> Tensor:
        """Place, pair and mass of the entries in one piece [3, E], int64; the mass by its bits."""
        arrived()
        plan = solve(
            on_host.numpy(), offsets, image_index, token_weights=weights[0], word_weights=weights[1],
            unmatched=unmatched, solver=solver, threads=threads,
        )  # fmt: skip
        return torch.from_numpy(np.stack([layout.places(plan, costs.shape), plan.pair, plan.mass.view(np.int64)]))

    found = BACKGROUND.submit(plans).result if background else plans

    def finish() -> Tensor:
        place, pair, mass = to_device(found(), costs.device)  # a GPU is sent the plans and not waited for
        return value(place, pair, mass.view(torch.float64))

    return finish


def _at_once(start: Callable[Arguments, Callable[[], Tensor]]) -> Callable[Arguments, Tensor]:
    def emd(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        """EMD of P pairs (image, caption), [P]: `start_emd`, finished at once."""
        return start(*args, **kwargs)()

    return emd


emd = _at_once(start_emd)


def barycentric_weights(
    tokens: Tensor,
    words: Tensor,
    offsets: Sequence[int],
    pair_weights: Tensor,
    *,
    cost: Cost,
    word_weights: Tensor,
    center: Tensor,
    unmatched: float,
    solver: Solver,
    threads: int,
) -> tuple[float, Tensor]:
    """How to better one set of tokens [M, D] for P captions: their weighted EMD, and weights [M, T] of all words.

    The set of words' means by these weights has no larger EMD: it is the minimum for the present plans of the squared
    distance (Cuturi & Doucet 2014, algorithm 2), of a bound on the distance (Weiszfeld 1937), or of the cosine.
    pair_weights [P]; the rest and the errors are those of `start_emd`. A token without mass has no weights.
    """
    x, y = (side - center if cost == "cosine" else side for side in (tokens, words))
    costs = cost_matrix(x[None], y, torch.arange(len(y), device=y.device)[None], cost)
    plan = solve(
        costs.cpu().numpy(), offsets, [0] * (len(offsets) - 1), word_weights=_numpy(word_weights), unmatched=unmatched,
        solver="pot" if solver == "pot" else "exact", threads=threads,
    )  # fmt: skip
    pair, token, word, mass = (to_device(torch.from_numpy(column), y.device) for column in plan[:4])
    place, mass = token * len(y) + word, mass.float() * pair_weights[pair]
    chosen = costs.view(-1)[place]
    norm = chosen if cost == "euclidean" else torch.linalg.vector_norm(y, dim=-1)[word]
    pull = mass if cost == "sqeuclidean" else mass / norm.clamp_min(TINY**0.5)
    weights = costs.new_zeros(costs.numel()).index_add_(0, place, pull).view(costs.shape[1:])
    return (chosen * mass).sum().item(), weights


def _to_host(costs: Tensor) -> tuple[Tensor, Callable[[], object]]:
    """Costs on the CPU, and what waits until they are there: a GPU copies them when it gets to it."""
    if costs.device.type != "cuda":
        return costs.cpu(), lambda: None
    on_host = torch.empty(costs.shape, dtype=costs.dtype, pin_memory=True).copy_(costs, non_blocking=True)
    arrived = torch.cuda.Event(blocking=True)  # whoever waits for it sleeps
    arrived.record(torch.cuda.current_stream(costs.device))
    return on_host, arrived.synchronize


def _all_pairs(
    images: int, offsets: Sequence[int], word_weights: Tensor | None
) -> tuple[list[int], list[int], Tensor | None]:
    """Offsets, image index and word weights as if each image had captions of its own."""
    ends = np.asarray(offsets[1:]) + offsets[-1] * np.arange(images)[:, None]
    index = np.repeat(np.arange(images), len(offsets) - 1)
    return (
        [0, *ends.ravel().tolist()],
        index.tolist(),
        word_weights if word_weights is None else word_weights.repeat(images),
    )


def cost_matrix(x: Tensor, y: Tensor, word_at: Tensor, cost: Cost) -> Tensor:
    """Ground costs [B, N, L] between tokens x [B, N, D] and words of y [T, D], for image b those at word_at[b].

    word_at is [B, L], or [1, L] for all images the same; a column without a word, -1, costs anything.
    """
    norm_x, norm_y = torch.linalg.vector_norm(x, dim=-1)[..., None], torch.linalg.vector_norm(y, dim=-1)
    norm_y = norm_y[word_at][:, None]
    with exact_products():  # the squares below cancel
        products = _products(x, y, word_at)
    if cost == "cosine":
        return 1 - products / (norm_x.clamp_min(TINY) * norm_y.clamp_min(TINY))
    squared = (norm_x.square() + norm_y.square()).sub_(products, alpha=2).clamp_min_(TINY)
    return squared.sqrt_() if cost == "euclidean" else squared


def _products(x: Tensor, y: Tensor, word_at: Tensor) -> Tensor:
    """Inner products [B, N, L] for `cost_matrix`; on a CPU image by image where the words of each are consecutive."""
    if x.device.type != "cpu" or len(word_at) == 1:
        return x @ y[word_at if len(word_at) > 1 else word_at[0]].mT
    count, column = (word_at >= 0).sum(1), torch.arange(word_at.shape[1])
    if not torch.equal(word_at, torch.where(column < count[:, None], word_at[:, :1] + column, -1)):
        return x @ y[word_at].mT
    products = x.new_zeros(*x.shape[:2], len(column))
    for image, words in enumerate(count.tolist()):
        if words:  # neither copied nor filled up to as many as another image has
            start = int(word_at[image, 0])
            products[image, :, :words] = x[image] @ y[start : start + words].T
    return products


class _EMD(torch.autograd.Function):
    """sum(plan * cost) of each pair; backward goes from the sparse plan straight to both sides.

    The gradient of a cost c(x, y) is p x - q y in x and r y - q x in y: for the squared distance p = q = r = 2; for the
    distance d, 1 / d; for the cosine s, q = 1 / (|x| |y|), p = s / |x|^2, r = s / |y|^2.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        cost: Cost,
        costs: Tensor,
        word_at: Tensor,
        place: Tensor,
        pair: Tensor,
        mass: Tensor,
        pairs: int,
    ) -> Tensor:
        chosen, (tokens, slots) = costs.view(-1)[place], costs.shape[1:]
        of_x = place // slots  # rows of x.view(-1, D)
        of_y = word_at[place // (tokens * slots) % len(word_at), place % slots]
        ctx.cost = cost
        ctx.save_for_backward(x, y, of_x, of_y, pair, mass, chosen)
        return chosen.new_zeros(pairs, dtype=mass.dtype).index_add_(0, pair, chosen * mass).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y, of_x, of_y, pair, mass, chosen = ctx.saved_tensors
        weight = mass.float() * grad[pair]
        if ctx.cost == "cosine":
            norm_x = torch.linalg.vector_norm(x, dim=-1).view(-1)[of_x]
            norm_y = torch.linalg.vector_norm(y, dim=-1)[of_y]
            weight = torch.where((norm_x > TINY) & (norm_y > TINY), weight, 0)
            q = weight / (norm_x * norm_y).clamp_min(TINY**2)
            p, r = ((1 - chosen) * weight / norm.clamp_min(TINY).square() for norm in (norm_x, norm_y))
        else:
            scale = chosen.reciprocal() if ctx.cost == "euclidean" else 2
            zero = TINY**0.5 if ctx.cost == "euclidean" else TINY
            p = q = r = torch.where(chosen > zero, weight * scale, 0)
        rows = x.flatten(0, 1)
        grad_x = _side(rows, of_x, p, y, of_y, q).view_as(x) if ctx.needs_input_grad[0] else None
        grad_y = _side(y, of_y, r, rows, of_x, q) if ctx.needs_input_grad[1] else None
        return grad_x, grad_y, None, None, None, None, None, None, None


def _side(x: Tensor, of_x: Tensor, p: Tensor, y: Tensor, of_y: Tensor, q: Tensor) -> Tensor:
    """The sum over entries of p x - q y at the rows of x; the plan is so sparse that this beats a matrix product."""
    order = of_x.argsort()
    begin = torch.searchsorted(of_x[order], torch.arange(len(x), device=x.device))
    pulled = torch.nn.functional.embedding_bag(of_y[order], y, begin, mode="sum", per_sample_weights=-q[order])
    own = p.new_zeros(len(x), 1).index_add_(0, of_x, p[:, None])
    return pulled.addcmul_(x, own)  # in place: fresh memory costs more than the sum


class _Layout:
    """Where the words of each pair stand in the cost matrix of its image: captions of an image stand side by side."""

    def __init__(self, offsets: Sequence[int], image_index: Sequence[int], images: int):
        self.offsets, self.image = np.asarray(offsets, np.int64), np.asarray(image_index, np.int64)
        self.length = np.diff(self.offsets)
        if (self.length < 1).any():
            raise ValueError(f"EMD of pair {self.length.argmin()}: the caption has no words")
        used = np.bincount(self.image, self.length, images).astype(np.int64)  # columns of each image
        order = np.argsort(self.image, kind="stable")  # pairs by image
        self.column = np.empty_like(self.image)  # of a pair's first word
        self.column[order] = np.cumsum(self.length[order]) - self.length[order]
        self.column -= (np.cumsum(used) - used)[self.image]
        self.images, self.slots = images, int(used.max())
        self.image_of_word = np.repeat(self.image, self.length)
        self.slot_of_word = np.arange(self.offsets[-1]) - np.repeat(self.offsets[:-1] - self.column, self.length)

    def word_at(self) -> np.ndarray:
        """The word of each column of an image [B, L], -1 where an image has fewer."""
        word_at = np.full((self.images, self.slots), -1)
        word_at[self.image_of_word, self.slot_of_word] = np.arange(self.offsets[-1])
        return word_at

    def weights(
        self, tokens: int, token_weights: np.ndarray | None, word_weights: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of tokens [B, N] and words [T], float64, checked but not normalised; ones where there are none."""
        a = np.ones((self.images, tokens)) if token_weights is None else np.asarray(token_weights, np.float64)
        b = np.ones(self.offsets[-1]) if word_weights is None else np.asarray(word_weights, np.float64)
        bad_image = ~((a >= 0).all(1) & (a.sum(1) > 0) & (a.sum(1) < np.inf))
        least, mass = np.minimum.reduceat(b, self.offsets[:-1]), np.add.reduceat(b, self.offsets[:-1])
        bad = bad_image[self.image] | ~((least >= 0) & (mass > 0) & (mass < np.inf))
        if bad.any():
            pair = int(bad.argmax())
            _fail(pair, int(self.image[pair]), "weights have to be finite, not negative, and not all zero")
        return a, b

    def with_dummies(self, weights: np.ndarray, unmatched: float) -> np.ndarray:
        """Words' weights [T] with one of `unmatched` behind each caption's own, which share the rest: [T + P]."""
        share = weights / np.repeat(np.add.reduceat(weights, self.offsets[:-1]), self.length) * (1 - unmatched)
        mass = np.full(len(weights) + len(self.length), unmatched)
        mass[np.arange(len(weights)) + np.repeat(np.arange(len(self.length)), self.length)] = share
        return mass

    def spans(self, count: int) -> list[tuple[int, int]]:
        """The pairs in at most `count` runs (first, last + 1) that take about equally long to solve."""
        if count == 1:
            return [(0, len(self.length))]
        work = np.cumsum(self.length)
        ends = np.searchsorted(work, work[-1] * np.arange(1, count + 1) / count)
        ends = np.unique(np.minimum(ends + 1, len(work)))
        return list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))

    def places(self, plan: Plan, shape: Sequence[int]) -> np.ndarray:
        """Of a plan's entries in the flattened cost matrices [B, N, L]."""
        return (self.image[plan.pair] * shape[1] + plan.token) * shape[2] + self.slot_of_word[plan.word]


def solve(
    costs: np.ndarray,
    offsets: Sequence[int],
    image_index: Sequence[int],
    *,
    token_weights: np.ndarray | None = None,
    word_weights: np.ndarray | None = None,
    unmatched: float = 0.0,
    solver: Literal["exact", "pot"] = "exact",
    threads: int = 1,
) -> Plan:
    """Optimal plans for costs [B, N, L], float32 or float64: an image's captions in order, one column a word.

    The other arguments, and errors, are those of `emd`. At most N + m - 1 entries for a pair of m words; marginals are
    exact to rounding (1e-12), a weight below 1e-16 of its side's sum counts as none. Unmatched mass is not in the plan:
    it goes to a dummy word of each caption at no cost, which makes partial transport a whole one (Chapel et al. 2020;
    here only tokens may stay behind, so one dummy is enough).
    """
    layout, dummies = _Layout(offsets, image_index, len(costs)), int(unmatched > 0)
    of_tokens, of_words = layout.weights(costs.shape[1], token_weights, word_weights)
    if unmatched:
        of_words = layout.with_dummies(of_words, unmatched)
    begin = np.cumsum([0, *(costs.shape[1] + layout.length + dummies - 1)])  # room for the entries of each pair
    columns = [np.empty(begin[-1], np.int64) for _ in range(3)] + [np.empty(begin[-1])]
    potential = np.empty(layout.offsets[-1])
    places = np.ascontiguousarray(costs), layout.image, layout.column, layout.offsets
    inputs = (*places, of_tokens.ravel(), of_words, dummies)
    run: Callable[..., int] = _exact if solver == "exact" else _pot
    spans = layout.spans(1 if costs.shape[1] * layout.offsets[-1] < SMALL else threads)

    def entries(span: tuple[int, int]) -> slice:
        """Solves a run of pairs, whose plans then stand one after the other here."""
        return slice(begin[span[0]], run(span, *inputs, begin[span[0]], *columns, potential))

    # Both solvers run without the GIL.
    parts = list((map if len(spans) == 1 else solver_threads(threads).map)(entries, spans))
    pair, token, word, mass = (np.concatenate([column[part] for part in parts]) for column in columns)
    return Plan(pair, token, word, mass, potential)


@cache
def solver_threads(count: int) -> ThreadPoolExecutor:
    """Threads for solving, kept as long as the process: to start them costs as much as a small batch."""
    return ThreadPoolExecutor(count, "emd-solver")


def _fail(pair: int, image: int, why: str) -> NoReturn:
    raise ValueError(f"EMD of pair {pair} (image {image}): {why}")


def _exact(span: tuple[int, int], costs: np.ndarray, image: np.ndarray, *arrays: Any) -> int:
    """Solve a range of pairs into the arrays, as exact.solve_pairs has them; returns where their plans end."""
    from pipeline.transport import exact

    end, pair, status = exact.solve_pairs(*span, costs, image, *arrays)
    if status != exact.SOLVED:
        why = {
            exact.NOT_FINITE: "a ground cost is not finite",
            exact.NO_OPTIMUM: "the solver found no optimum",
        }
        _fail(pair, image[pair], why[status])
    return int(end)


def _pot(
    span: tuple[int, int],
    costs: np.ndarray,
    image: np.ndarray,
    column: np.ndarray,
    offsets: np.ndarray,
    token_weights: np.ndarray,
    word_weights: np.ndarray,
    dummies: int,
    at: int,
    pair: np.ndarray,
    token: np.ndarray,
    word: np.ndarray,
    mass: np.ndarray,
    potential: np.ndarray,
) -> int:
    """The same with POT's network simplex."""
    from ot.lp.emd_wrap import emd_c

    for p in range(*span):
        mine = slice(offsets[p], offsets[p + 1])
        real, first = mine.stop - mine.start, mine.start + dummies * p
        matrix = np.zeros((costs.shape[1], real + dummies))
        matrix[:, :real] = costs[image[p], :, column[p] : column[p] + real]
        if not np.isfinite(matrix).all():
            _fail(p, image[p], "a ground cost is not finite")
        a, b = token_weights.reshape(len(costs), -1)[image[p]], word_weights[first : first + real + dummies]
        a = a / a.sum()
        flow, _, _, dual, code = emd_c(a, b * (a.sum() / b.sum()), matrix, POT_ITERATIONS, 1, None, None)
        if code != POT_OPTIMAL:
            _fail(p, image[p], f"the solver found no optimum (code {code})")
        i, j = np.nonzero(flow[:, :real])
        here, at = slice(at, at + len(i)), at + len(i)
        pair[here], token[here], word[here], mass[here] = p, i, j + offsets[p], flow[i, j]
        potential[mine] = dual[:real]
    return at


def _sinkhorn(
    costs: Tensor,
    layout: _Layout,
    token_weights: np.ndarray | None,
    word_weights: np.ndarray | None,
    regularisation: float,
) -> Entries:
    """Entropic plans (Cuturi 2013), log domain, all pairs at once: P * N * m entries.

    Tokens' marginals are exact, words' not quite; raises ValueError as `emd` does when a cost is not finite.
    """
    device, (_, tokens, slots) = costs.device, costs.shape
    image, column, length = (torch.from_numpy(a).to(device) for a in (layout.image, layout.column, layout.length))
    slot = torch.arange(int(length.max()), device=device)
    real = slot < length[:, None]  # [P, m]
    place = (image[:, None] * tokens + torch.arange(tokens, device=device))[..., None] * slots
    place = place + torch.where(real, column[:, None] + slot, column[:, None])[:, None]  # [P, N, m]
    cost = costs.view(-1)[place]
    finite = cost.isfinite().flatten(1).all(1)
    if not finite.all():
        pair = int(finite.logical_not().nonzero()[0])
        _fail(pair, int(image[pair]), "a ground cost is not finite")
    of_tokens, of_words = layout.weights(tokens, token_weights, word_weights)
    a, b = torch.from_numpy(of_tokens).to(cost)[image], torch.zeros_like(cost[:, 0])
    b[real] = torch.from_numpy(of_words).to(cost)
    log_a, log_b = ((side / side.sum(1, keepdim=True)).log() for side in (a, b))
    mean = (cost * real[:, None]).sum((1, 2)) / (tokens * length)
    scaled = cost / (regularisation * mean.clamp_min(torch.finfo(cost.dtype).tiny))[:, None, None]
    f, g = torch.zeros_like(log_a), torch.where(b > 0, 0.0, -torch.inf)
    for _ in range(SINKHORN_ITERATIONS):
        f = log_a - (g[:, None] - scaled).logsumexp(2)
        g = log_b - (f[..., None] - scaled).logsumexp(1)
    f = log_a - (g[:, None] - scaled).logsumexp(2)
    mass = (f[..., None] + g[:, None] - scaled).exp()
    keep = real[:, None].expand_as(place)
    pair_of = torch.arange(len(image), device=device)[:, None, None].expand_as(place)
    return place[keep], pair_of[keep], mass[keep]


def _numpy(weights: Tensor | None) -> np.ndarray | None:
    return None if weights is None else weights.detach().double().cpu().numpy()
