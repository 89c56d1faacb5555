"""When stages end that are run side by side, as `terraalign run` picks them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from graphlib import TopologicalSorter

from pipeline.plan.estimate import Estimate

SPREAD = 0.75  # of the speed of as many cores, for what a stage computes when it has all of them


def times(
    graph: Mapping[str, list[str]], wanted: Mapping[str, Estimate], idle: float, jobs: int, cores: int,
    urgency: Callable[[str], int],
) -> tuple[dict[str, float], float]:  # fmt: skip
    """Seconds of each wanted stage as it measures itself, and of all of them on the wall.

    `idle` is what DVC takes for each stage of the graph besides. A stage that nothing can run beside has all cores for
    its work.
    """
    sorter = TopologicalSorter(graph)
    sorter.prepare()
    waiting: list[str] = []
    running: list[tuple[float, str]] = []
    found: dict[str, float] = {}
    now = 0.0
    while sorter.is_active():
        waiting += sorter.get_ready()
        while waiting and len(running) < jobs:
            stage = max(waiting, key=urgency)
            waiting.remove(stage)
            own = wanted.get(stage)
            alone = jobs > 1 and not running and not waiting
            speed = max(1.0, SPREAD * cores / max(1, cores // jobs)) if alone else 1.0
            if own:
                found[stage] = own.start + own.work / speed
            heapq.heappush(running, (now + found.get(stage, 0.0) + idle, stage))
        now, done = heapq.heappop(running)
        sorter.done(done)
    return found, now
