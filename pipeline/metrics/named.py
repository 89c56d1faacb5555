"""The figures of names: by rule, those without the LLM as soon as an adapter is pre-trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.adapters.module import load_adapter
from pipeline.config import Params
from pipeline.files import atomically
from pipeline.metrics.base import Figure, write_figures
from pipeline.metrics.rules import figures_of
from pipeline.metrics.speeds import keep_speeds, timed
from pipeline.naming.classes import labelled
from pipeline.naming.fit import name_all
from pipeline.naming.namer import Namer
from pipeline.naming.nearest import PART, adapted_by
from pipeline.naming.rules import RULES
from pipeline.naming.table import TABLE, Named
from pipeline.runs import Run
from pipeline.store.reader import ImageTokens

if TYPE_CHECKING:
    import pandas as pd

TIMED = 256  # pictures


def name_and_measure(params: Params, adapter: str) -> None:
    """Stage `name`: names without the LLM, and their figures, into name/<adapter>/<data>."""
    folder = Run.of(params).named(adapter)
    folder.mkdir(parents=True, exist_ok=True)  # an output that DVC expects also where no data set has classes
    speeds: dict[str, dict[str, float]] = {}
    for data, named in name_all(params, adapter).items():
        figures = [figure for rule in RULES for figure in figures_without_llm(named, rule)]
        write_figures(folder, data, figures, list(tested(named).index))
        speeds[data] = speeds_without_llm(params, adapter, data)
    keep_speeds(Run.of(params), f"name@{adapter}", speeds)
    for recipe in params.run.recipes:
        _write_digests(params, folder, recipe)


def _write_digests(params: Params, folder: Path, recipe: str) -> None:
    """Which names a recipe reads, in a file of its own: DVC can't list the data sets of a recipe among its inputs."""
    tables = {data: folder / data / TABLE for data in params.finetune.recipes[recipe].data}
    digests = {data: sha256(path.read_bytes()).hexdigest() for data, path in tables.items() if path.exists()}
    with atomically(folder / f"{recipe}.json") as file:
        file.write((json.dumps(digests, indent=1) + "\n").encode())


def speeds_without_llm(params: Params, adapter: str, data: str) -> dict[str, float]:
    """Pictures per second by each of RULES, from cached tokens, measured on at most TIMED pictures."""
    run = Run.of(params)
    images = ImageTokens.open(run, data)
    namer = Namer.load(run.named(adapter) / data, params.runtime.emd_threads)
    adapted = adapted_by(load_adapter(run.pretrained(adapter), "last"), images.tokens)
    works: dict[str, Callable[[Sequence[int]], Any]] = {
        "emd": lambda some: namer.nearest.scores(adapted(list(some))),
        "discriminant": lambda some: namer.discriminant.scores(images.tokens(list(some))),
        "namer": lambda some: namer.rules(images.tokens(list(some)), adapted(list(some))),
    }
    some = labelled(images, "test", "val")[:TIMED]
    return {rule: timed(work, some, PART) for rule, work in works.items()}


def tested(named: Named) -> pd.DataFrame:
    """The rows of the test pictures."""
    return named.rows[named.rows["split"] == "test"]


def figures_without_llm(named: Named, rule: str) -> list[Figure]:
    """Those of a rule of the namer on the test pictures; none where there are none."""
    rows = tested(named)
    if rows.empty:
        return []
    own = [named.names.index(label) for label in rows["label"]]
    return figures_of(rule, named.log_probabilities(rule, list(rows.index)), own)
