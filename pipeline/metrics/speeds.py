"""How many pictures a second each way of naming takes on: beside the seconds of stages, and like these no output."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.files import atomically
from pipeline.runs import Run


def timed(work: Callable[[Sequence[int]], Any], positions: Sequence[int], part: int) -> float:
    """Pictures per second of wall time, in parts, after one part to warm up; there has to be a picture."""
    work(positions[:part])
    began = time.perf_counter()
    for at in range(0, len(positions), part):
        work(positions[at : at + part])
    return len(positions) / (time.perf_counter() - began)


def keep_speeds(run: Run, stage: str, speeds: Mapping[str, Mapping[str, float]]) -> None:
    """Write pictures per second by data set and rule."""
    path = run.speeds(stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = {data: {rule: round(speed, 3) for rule, speed in rules.items()} for data, rules in speeds.items()}
    with atomically(path) as file:
        file.write((json.dumps(rounded) + "\n").encode())


def read_speeds(run: Run, stage: str, data: str) -> dict[str, float]:
    """By rule; nothing where the stage did not run here or its file is not readable: a timing is worth no failure."""
    try:
        found = json.loads(run.speeds(stage).read_text(encoding="utf-8"))[data]
        return {rule: float(speed) for rule, speed in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
