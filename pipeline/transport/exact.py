"""Exact optimal transport between many points and few, compiled with numba; docs/emd.md explains the algorithm.

Importing numba takes most of a second, so solve.py imports this module when it first solves something.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np
from numba import config, njit

from pipeline.runs import RESULTS

SOLVED, NOT_FINITE, NO_OPTIMUM = 0, 1, 2
UNITS = 2.0**52  # of mass in a problem at most: whole numbers that float64 holds exactly
GAP = 1e-9  # what still counts as an optimum: duality gap over the largest cost
HOP = 1e-14  # of the largest cost: what each arc of a path costs extra, so that of tied paths the shortest wins
SOFTENING, ITERATIONS = 0.15, 4  # of the start: temperature over the mean regret, Sinkhorn iterations
FAINT, FLAT = 1e-14, 1e-300  # least value of its kernel, about exp(-32); regrets below this in all are none
ZERO, ONE = np.uint64(0), np.uint64(1)  # indices are unsigned: no wrap-around to check, so loops vectorise


def can_keep_compiled() -> bool:
    """Whether numba finds a folder for compiled code: NUMBA_CACHE_DIR, beside this file, ~/.cache, else data/numba."""
    for folder in (config.CACHE_DIR, str((RESULTS / "numba").resolve())):
        config.CACHE_DIR = folder
        try:
            njit(cache=True)(lambda: None)
        except RuntimeError:  # no folder can be written
            continue
        return True
    print(
        "no folder for compiled code can be written: the solver is compiled at every start, up to a minute; "
        "set NUMBA_CACHE_DIR to a folder that can be",
        file=sys.stderr,
    )
    return False


_keep = can_keep_compiled()
compiled = njit(cache=_keep, nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
entry = njit(cache=_keep, nogil=True, error_model="numpy")


class _State(NamedTuple):
    """A problem of n rows and m <= n columns, and its flow; arrays are large enough for every pair of the batch."""

    cost: np.ndarray  # [n, m] float64
    flow: np.ndarray  # [n, m] int64, units
    member: np.ndarray  # [m, n] uint64: the rows with flow to a column, in no order
    place: np.ndarray  # [n, m] uint64: where a row stands in its column's members
    filled: np.ndarray  # [m] uint64: how many members
    excess: np.ndarray  # [m] int64: units a column has beyond its share
    price: np.ndarray  # [m]: v; flow goes only to columns that minimise cost[i, j] - v[j]
    arc: np.ndarray  # [m, m]: the cheapest move of a unit from one column to another, min over members
    kernel: np.ndarray  # [n, m] scratch
    key: np.ndarray  # [n] scratch


@compiled
def _move(flow, member, place, filled, i, j, k, units):
    """Move units of row i from column j to column k."""
    if flow[i, k] == 0:
        place[i, k] = filled[k]
        member[k, filled[k]] = i
        filled[k] += ONE
    flow[i, k] += units
    flow[i, j] -= units
    if flow[i, j] == 0:
        filled[j] -= ONE
        last = member[j, filled[j]]
        member[j, place[i, j]] = last
        place[last, j] = place[i, j]


@compiled
def _soften(cost, price, kernel, least, a, b, n, m):
    """Prices nearer to the optimum by a few Sinkhorn iterations; only the start depends on them, not the result."""
    regret = 0.0
    for i in range(n):
        best, total = cost[i, 0] - price[0], 0.0
        for j in range(m):
            best = min(best, cost[i, j] - price[j])
            total += cost[i, j] - price[j]
        least[i] = best
        regret += total - m * best
    if regret < FLAT:
        return
    temperature = SOFTENING * regret / (n * m)
    for i in range(n):
        for j in range(m):  # (1 - x / 32)^32 for exp(-x)
            power = max(0.0, 1 - (cost[i, j] - price[j] - least[i]) / (32 * temperature))
            for _ in range(5):
                power *= power
            kernel[i, j] = power + FAINT
    scale, received = np.ones(m), np.empty(m)
    for _ in range(ITERATIONS):
        received[:] = 0
        for i in range(n):
            reach = 0.0
            for j in range(m):
                reach += kernel[i, j] * scale[j]
            for j in range(m):
                received[j] += kernel[i, j] * (a[i] / reach)
        for j in range(m):
            scale[j] = b[j] / received[j]
    for j in range(m):
        if b[j] > 0:
            price[j] += temperature * np.log(scale[j])


@compiled
def _start(s, a, b, n, m):
    """Give each row to its cheapest column."""
    cost, price, flow, excess = s.cost, s.price, s.flow, s.excess
    _soften(cost, price, s.kernel, s.key, a, b, n, m)
    for j in range(m):
        s.filled[j] = ZERO
        excess[j] = -b[j]
    for i in range(n):
        for j in range(m):
            flow[i, j] = 0
        if a[i] > 0:
            best, k = np.inf, ZERO
            for c in range(m):
                reduced = cost[i, c] - price[c]
                if reduced < best:
                    best, k = reduced, np.uint64(c)
            s.place[i, k] = s.filled[k]
            s.member[k, s.filled[k]] = np.uint64(i)
            s.filled[k] += ONE
            flow[i, k] = a[i]
            excess[k] += a[i]


@compiled
def _arcs_of(cost, member, filled, arc, j, m):
    """The cheapest moves out of column j, from all its members."""
    for k in range(m):
        arc[j, k] = np.inf
    for p in range(filled[j]):
        _offer(cost, arc, member[j, p], j, m)


@compiled
def _offer(cost, arc, i, j, m):
    """Row i, a member of column j, may carry its moves."""
    own = cost[i, j]
    for k in range(m):
        arc[j, k] = min(arc[j, k], cost[i, k] - own)


@compiled
def _mover(cost, member, filled, arc, j, k):
    """The member of column j that makes the cheapest move to column k."""
    for p in range(filled[j]):
        i = member[j, p]
        if cost[i, k] - cost[i, j] == arc[j, k]:
            return i
    return ZERO  # never: a length is some member's to the last bit


@compiled
def _replace(cost, member, filled, arc, gone, j, m):
    """A row has left column j: the arcs that it carried go to the next best member."""
    for k in range(m):
        if cost[gone, k] - cost[gone, j] == arc[j, k]:
            best = np.inf
            for p in range(filled[j]):
                i = member[j, p]
                best = min(best, cost[i, k] - cost[i, j])
            arc[j, k] = best


@compiled
def _shortest(excess, price, arc, m, hop, distance, before, waiting):
    """Dijkstra from all over-full columns to the nearest under-full one, arcs reduced by the prices; -1: none."""
    for k in range(m):
        before[k] = -1
        distance[k] = waiting[k] = 0.0 if excess[k] > 0 else np.inf
    while True:
        near, j = np.inf, -1
        for k in range(m):
            if waiting[k] < near:
                near, j = waiting[k], k
        if j < 0 or excess[j] < 0:
            break
        waiting[j] = np.inf
        base = near + price[j] + hop
        for k in range(m):  # a settled column is no farther than `near`, so it does not change
            through = max(near, base + arc[j, k] - price[k])
            better = through < distance[k]
            distance[k] = through if better else distance[k]
            waiting[k] = through if better else waiting[k]
            before[k] = j if better else before[k]
    if j >= 0:
        for k in range(m):
            price[k] -= max(0.0, near - distance[k])
    return j


@compiled
def _balance(s, n, m, hop):
    """Move units along successive shortest paths until no column is over-full; False when that takes too many."""
    cost, price, arc = s.cost, s.price, s.arc
    flow, member, place, filled, excess = s.flow, s.member, s.place, s.filled, s.excess
    distance, before, waiting = np.empty(m), np.empty(m, np.int64), np.empty(m)
    mover = np.empty(m, np.uint64)  # over the path's arc to a column
    over = 0
    for j in range(m):
        _arcs_of(cost, member, filled, arc, j, m)
        over += max(0, excess[j])
    for _ in range(1000 + 100 * (n + m)):
        if over == 0:
            return True
        end = _shortest(excess, price, arc, m, hop, distance, before, waiting)
        if end < 0:
            return False
        units, k = -excess[end], end
        while before[k] >= 0:
            j = before[k]
            mover[k] = _mover(cost, member, filled, arc, j, k)
            units = min(units, flow[mover[k], j])
            k = j
        units = min(units, excess[k])
        excess[k] -= units
        excess[end] += units
        over -= units
        k = end
        while before[k] >= 0:
            j = before[k]
            i = mover[k]
            _move(flow, member, place, filled, i, j, k, units)
            if flow[i, j] == 0:
                _replace(cost, member, filled, arc, i, j, m)
            _offer(cost, arc, i, k, m)
            k = j
    return False


@compiled
def _state(n, m):
    unsigned = np.uint64
    return _State(
        np.empty((n, m)), np.empty((n, m), np.int64), np.empty((m, n), unsigned), np.empty((n, m), unsigned),
        np.empty(m, unsigned), np.empty(m, np.int64), np.empty(m), np.empty((m, m)),
        np.empty((n, m)), np.empty(n),
    )  # fmt: skip


@compiled
def _load(s, costs, image, column, tokens, real, words):
    """Copy the costs of an image and a caption, turned when words are more; prices start at the columns' means.

    Words from `real` on cost nothing.

    Returns the largest magnitude of a cost, inf when one is not finite.
    """
    turned, n, m = words > tokens, max(tokens, words), min(tokens, words)
    for i in range(tokens):
        for j in range(words):
            each = costs[image, i, column + j] if j < real else 0.0
            if turned:
                s.cost[j, i] = each
            else:
                s.cost[i, j] = each
    cost, price, top, share = s.cost, s.price, s.key, 1 / n
    for j in range(m):
        price[j] = top[j] = 0.0
    for i in range(n):
        for j in range(m):
            price[j] += cost[i, j] * share
            top[j] = max(top[j], abs(cost[i, j]))
    largest = 0.0
    for j in range(m):
        if not np.isfinite(price[j]):  # any cost that is not makes the sum so
            return np.inf
        largest = max(largest, top[j])
    return largest


@compiled
def _units(weights, first, size, total, out):
    """Weights as whole units that sum to `total`; the rounding goes to the heaviest."""
    mass = 0.0
    for i in range(size):
        mass += weights[first + i]
    left, heaviest = total, 0
    for i in range(size):
        out[i] = np.int64(np.rint(weights[first + i] / mass * total))
        left -= out[i]
        if out[i] > out[heaviest]:
            heaviest = i
    out[heaviest] += left


@compiled
def _cycle(flow, n, m, parent, depth, stack):
    """An edge that closes a cycle of flow, as two nodes (columns first, then rows), with the tree it closes it in."""
    for node in range(n + m):
        depth[node] = -1
    for root in range(m):
        if depth[root] >= 0:
            continue
        stack[0], parent[root], depth[root], size = root, -1, 0, 1
        while size:
            size -= 1
            u = stack[size]
            for other in range(n if u < m else m):
                w = other + m if u < m else other
                units = flow[other, u] if u < m else flow[u - m, other]
                if units == 0 or w == parent[u]:
                    continue
                if depth[w] >= 0:
                    return u, w
                parent[w], depth[w], stack[size] = u, depth[u] + 1, w
                size += 1
    return -1, -1


@compiled
def _thin(flow, n, m):
    """Cancel cycles of flow, which only tied costs can cause and which cost nothing, until none is left."""
    parent, depth, stack = np.empty(n + m, np.int64), np.empty(n + m, np.int64), np.empty(n + m, np.int64)
    while True:
        u, w = _cycle(flow, n, m, parent, depth, stack)
        if u < 0:
            return
        units = np.int64(UNITS)
        for change in range(2):  # first find how much every second edge can give up, then do it
            if change:
                flow[max(u, w) - m, min(u, w)] += units
            x, y, sign_x, sign_y = u, w, -1, -1
            while x != y:
                if depth[x] >= depth[y]:
                    node, sign = x, sign_x
                    x, sign_x = parent[x], -sign_x
                else:
                    node, sign = y, sign_y
                    y, sign_y = parent[y], -sign_y
                i, j = max(node, parent[node]) - m, min(node, parent[node])
                if change:
                    flow[i, j] += sign * units
                elif sign < 0:
                    units = min(units, flow[i, j])


@compiled
def _entries(s, m):
    entries = 0
    for j in range(m):
        entries += np.int64(s.filled[j])
    return entries


@compiled
def _write(s, n, m, total, at, turned, first, real, token, word, mass):
    """Write the plan from entry `at` on, at most n + m - 1 entries; returns its duality gap and where it ends.

    Words from `real` on are not written.
    """
    cost, price, flow = s.cost, s.price, s.flow
    gap = 0.0
    for i in range(n):
        best = np.inf
        for j in range(m):
            best = min(best, cost[i, j] - price[j])
        s.key[i] = best
        for j in range(m):
            if flow[i, j] > 0:
                moved, to = flow[i, j] / total, i if turned else j
                gap += moved * (cost[i, j] - price[j] - best)
                if to < real:
                    token[at], word[at], mass[at] = j if turned else i, first + to, moved
                    at += 1
    return gap, at


@entry
def solve_pairs(start, stop, costs, image, column, offsets, word_weights, dummies, at, pair, token, word, mass):
    """Solve the pairs from `start` to before `stop`; returns (where their plans end, the pair that failed, why).

    costs [B, N, L]: pair p is image[p], columns column[p] and on, one for each of words offsets[p] to offsets[p + 1].
    Tokens weigh alike, words by word_weights [T], any sum in a caption. If `dummies` is 1 and not 0, each caption's
    words are followed by one that costs nothing, has a place of its own in word_weights [T + P], and is not in the
    plan. The plans go one after the other to `at` and on of pair, token, word (index into the T words) and mass, with
    room for N + m - 1 entries each, a dummy counted.
    """
    tokens, widest = costs.shape[1], 0
    for p in range(start, stop):
        widest = max(widest, offsets[p + 1] - offsets[p] + dummies)
    s = _state(max(tokens, widest), min(tokens, widest))
    a, b = np.empty(max(tokens, widest), np.int64), np.empty(max(tokens, widest), np.int64)
    for p in range(start, stop):
        real = offsets[p + 1] - offsets[p]
        words = real + dummies
        turned, n, m = words > tokens, max(tokens, words), min(tokens, words)
        largest = _load(s, costs, image[p], column[p], tokens, real, words)
        if not np.isfinite(largest):
            return at, p, NOT_FINITE
        total = np.int64(np.floor(UNITS / (n * m))) * n * m  # so that equal weights are whole units
        of_tokens, of_words = (b, a) if turned else (a, b)
        of_tokens[:tokens] = total // tokens
        _units(word_weights, offsets[p] + dummies * p, words, total, of_words)
        _start(s, a, b, n, m)
        if not _balance(s, n, m, HOP * largest):
            return at, p, NO_OPTIMUM
        if _entries(s, m) > n + m - 1:
            _thin(s.flow, n, m)
        gap, end = _write(s, n, m, total, at, turned, offsets[p], real, token, word, mass)
        if not gap <= GAP * largest:
            return at, p, NO_OPTIMUM
        pair[at:end] = p
        at = end
    return at, -1, SOLVED
