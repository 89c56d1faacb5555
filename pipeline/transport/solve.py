"""Optimal plans on the CPU, by our own solver or by POT's, on threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Literal

import numpy as np

from pipeline.transport.layout import Layout
from pipeline.transport.plan import Plan

ExactSolver = Literal["exact", "pot"]
SMALL = 20_000  # costs of a batch: below, waking another thread takes longer than solving
POT_ITERATIONS, POT_OPTIMAL = 1_000_000, 1
NOT_FINITE = "a ground cost is not finite"


def solve(
    costs: np.ndarray,
    layout: Layout,
    *,
    word_weights: np.ndarray | None = None,
    unmatched: float = 0.0,
    solver: ExactSolver = "exact",
    threads: int = 1,
) -> Plan:
    """Optimal plans for costs [B, N, L], float32 or float64, an image's captions in them as in the layout.

    Tokens weigh alike; words alike, or by word_weights [T], normalised within a caption. At most N + m - 1 entries for
    a pair of m words; marginals are exact to rounding (1e-12), a weight below 1e-16 of its caption's sum counts as
    none. `unmatched` of the tokens' mass is not in the plan: it goes to a dummy word of each caption at no cost, which
    makes partial transport a whole one (Chapel et al. 2020; here only tokens may stay behind, so one dummy is enough).
    Raises ValueError naming the pair when a cost is not finite, weights are negative or sum to nothing, or no optimum
    is found.
    """
    costs, dummies = np.ascontiguousarray(costs), int(unmatched > 0)
    mass = layout.word_mass(word_weights, unmatched)
    begin = np.cumsum([0, *(costs.shape[1] + layout.length + dummies - 1)])  # room for the entries of each pair
    room = Plan(*(np.empty(begin[-1], kind) for kind in (np.int64, np.int64, np.int64, np.float64)))
    run = _exact if solver == "exact" else _pot
    spans = layout.spans(1 if costs.shape[1] * layout.offsets[-1] < SMALL else threads)

    def entries(span: tuple[int, int]) -> slice:
        """Solves a run of pairs, whose plans then stand one after the other here."""
        return slice(begin[span[0]], run(span, costs, layout, mass, dummies, begin[span[0]], room))

    # Both solvers run without the GIL.
    parts = list((map if len(spans) == 1 else solver_threads(threads).map)(entries, spans))
    return Plan(*(np.concatenate([column[part] for part in parts]) for column in room))


@cache
def solver_threads(count: int) -> ThreadPoolExecutor:
    """Threads for solving, kept as long as the process: to start them costs as much as a small batch."""
    return ThreadPoolExecutor(count, "emd-solver")


def _exact(
    span: tuple[int, int], costs: np.ndarray, layout: Layout, mass: np.ndarray, dummies: int, at: int, room: Plan
) -> int:
    """Write the plans of a run of pairs from entry `at` on; returns where they end."""
    from pipeline.transport import exact

    places = layout.image, layout.column, layout.offsets
    end, pair, status = exact.solve_pairs(*span, costs, *places, mass, dummies, at, *room)
    if status == exact.NOT_FINITE:
        raise layout.error(pair, NOT_FINITE)
    if status == exact.NO_OPTIMUM:
        raise layout.error(pair, "the solver found no optimum")
    return int(end)


def _pot(
    span: tuple[int, int], costs: np.ndarray, layout: Layout, mass: np.ndarray, dummies: int, at: int, room: Plan
) -> int:
    """The same with POT's network simplex (Bonneel et al. 2011)."""
    from ot.lp.emd_wrap import emd_c

    tokens = costs.shape[1]
    a = np.full(tokens, 1 / tokens)
    for pair in range(*span):
        first, words, column = layout.offsets[pair], layout.length[pair], layout.column[pair]
        matrix = np.zeros((tokens, words + dummies))
        matrix[:, :words] = costs[layout.image[pair], :, column : column + words]
        if not np.isfinite(matrix).all():
            raise layout.error(pair, NOT_FINITE)
        b = mass[first + dummies * pair :][: words + dummies]
        flow, _, _, _, code = emd_c(a, b * (a.sum() / b.sum()), matrix, POT_ITERATIONS, 1, None, None)
        if code != POT_OPTIMAL:
            raise layout.error(pair, f"the solver found no optimum (code {code})")
        token, word = np.nonzero(flow[:, :words])
        here, at = slice(at, at + len(token)), at + len(token)
        for entries, found in zip(room, (pair, token, word + first, flow[token, word]), strict=True):
            entries[here] = found
    return at
