"""Exact Earth Mover's Distance between adapted image tokens and caption words (docs/emd.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, ParamSpec

import numpy as np
import torch
from torch import Tensor

from pipeline.devices import to_device
from pipeline.started import Started
from pipeline.transport.costs import TINY, Cost, ground_costs
from pipeline.transport.gradient import cost_of_plans
from pipeline.transport.layout import Layout
from pipeline.transport.plan import Entries, Plan
from pipeline.transport.sinkhorn import sinkhorn
from pipeline.transport.solve import solve

Solver = Literal["exact", "pot", "sinkhorn"]
BACKGROUND = ThreadPoolExecutor(1, "emd")  # one, so that batches are solved in order, each on all solver threads
Arguments = ParamSpec("Arguments")


def start_emd(
    tokens: Tensor,
    words: Tensor,
    offsets: Sequence[int],
    image_index: Sequence[int] | None,
    *,
    cost: Cost,
    word_weights: Tensor | None = None,
    center: Tensor | None = None,
    unmatched: float = 0.0,
    solver: Solver = "exact",
    threads: int = 1,
    background: bool = False,
) -> Started:
    """Start the EMD of P pairs (image, caption): [P], float32, differentiable in `tokens` and `words`.

    With `background` an exact solver works in another thread from now on, without it when the values are asked for; on
    a GPU starting does not wait for the device.

    tokens [B, N, D]; words [T, D] of all captions one after the other, caption p is words[offsets[p]:offsets[p + 1]];
    image_index [P] names each caption's image, so the captions of an image share its tokens and its cost matrix. None:
    each caption with each image, all captions of the first image first; the images then share the words.
    Tokens weigh alike; words weigh alike, or by word_weights [T], normalised within a caption. `center` [D] is
    subtracted from both sides before the cosine. Costs are float32 whatever the inputs' dtype, under autocast too.
    unmatched: this share of an image's token mass, in [0, 1), need not become a word and costs nothing; the caption
    gets the rest, cheapest for it. That is partial transport (Caffarelli & McCann 2010), exact; not with Sinkhorn.

    solver: "exact" is our own (exact.py), "pot" POT's network simplex (Bonneel et al. 2011), which has to give the
    same; both on `threads` threads of the CPU. "sinkhorn" is an approximation for comparison only, on the tokens'
    device.

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
    layout, weights = Layout(offsets, image_index, len(tokens)), _numpy(word_weights)
    ground, pairs = ground_costs(tokens, words, layout, cost, center), len(layout.image)
    if solver == "sinkhorn":
        return Started(lambda: cost_of_plans(ground, sinkhorn(ground.costs, layout, weights), pairs))
    find = partial(solve, layout=layout, word_weights=weights, unmatched=unmatched, solver=solver, threads=threads)
    plans = _start_plans(ground.costs, layout, find, background)
    return Started(lambda: cost_of_plans(ground, plans(), pairs))


def _at_once(start: Callable[Arguments, Started]) -> Callable[Arguments, Tensor]:
    def emd(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        """EMD of P pairs (image, caption), [P]: `start_emd`, finished at once."""
        return start(*args, **kwargs).result()

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
    layout = Layout(offsets, [0] * (len(offsets) - 1), 1)
    _, y, _, _, costs = ground_costs(tokens[None], words, layout, cost, center)
    plan = solve(
        costs.cpu().numpy(), layout, word_weights=_numpy(word_weights), unmatched=unmatched,
        solver="pot" if solver == "pot" else "exact", threads=threads,
    )  # fmt: skip
    pair, token, word, mass = (to_device(torch.from_numpy(column), y.device) for column in plan)
    place, mass = token * len(y) + word, mass.float() * pair_weights[pair]
    chosen = costs.view(-1)[place]
    norm = chosen if cost == "euclidean" else torch.linalg.vector_norm(y, dim=-1)[word]
    pull = mass if cost == "sqeuclidean" else mass / norm.clamp_min(TINY**0.5)
    weights = costs.new_zeros(costs.numel()).index_add_(0, place, pull).view(costs.shape[1:])
    return (chosen * mass).sum().item(), weights


def _start_plans(
    costs: Tensor, layout: Layout, find: Callable[[np.ndarray], Plan], background: bool
) -> Callable[[], Entries]:
    """Have plans found for costs that may still be computed, by another thread or when they are asked for."""
    on_host, arrived = _to_host(costs)

    def plans() -> Tensor:
        """Place, pair and mass of the entries in one piece [3, E], int64; the mass by its bits."""
        arrived()
        plan = find(on_host.numpy())
        return torch.from_numpy(np.stack([layout.places(plan, costs.shape[1]), plan.pair, plan.mass.view(np.int64)]))

    found = BACKGROUND.submit(plans).result if background else plans

    def entries() -> Entries:
        place, pair, mass = to_device(found(), costs.device)  # a GPU is sent the plans and not waited for
        return Entries(place, pair, mass.view(torch.float64))

    return entries


def _to_host(costs: Tensor) -> tuple[Tensor, Callable[[], object]]:
    """Costs on the CPU, and what waits until they are there: a GPU copies them when it gets to it."""
    if costs.device.type != "cuda":
        return costs.cpu(), lambda: None
    on_host = torch.empty(costs.shape, dtype=costs.dtype, pin_memory=True).copy_(costs, non_blocking=True)
    arrived = torch.cuda.Event(blocking=True)  # whoever waits for it sleeps
    arrived.record(torch.cuda.current_stream(costs.device))
    return on_host, arrived.synchronize


def _numpy(weights: Tensor | None) -> np.ndarray | None:
    return None if weights is None else weights.detach().double().cpu().numpy()
