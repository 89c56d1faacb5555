"""What a run named rightly and wrongly, picture by picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from pipeline.errors import UserError
from pipeline.naming.table import TABLE, Named
from pipeline.runs import remedy
from pipeline.serve.album import Album
from pipeline.tasks.naming import Naming, per_class

RULES = {"namer": "EMD and discriminant analysis, no LLM", "emd": "EMD alone, no LLM"}


def tables(album: Album) -> dict[str, str]:
    """Keys of the results on test pictures of classes that are there, with their names for people."""
    return {key: f"{data}: {adapter}, {how}" for key, data, adapter, how, _ in _all(album)}


def table(album: Album, key: str) -> dict[str, Any]:
    """The names of classes; of each test picture its place, the number of its label and of what was predicted.

    The last is None where the answer names no class; then its words are there, too. Also the accuracy of each class,
    and the command that makes the figures. Raises UserError where there is no such table.
    """
    found = next((one for one in _all(album) if one[0] == key), None)
    if found is None:
        raise UserError(key, "no such results", "run `dvc repro`")
    _, data, adapter, _, recipe = found
    if recipe:
        folder = album.run.evaluated(adapter, recipe) / data
        predictions = Naming.read(folder)
    else:
        folder = album.run.named(adapter)
        predictions = _named(Named.read(album.run, adapter, data), key.rpartition("/")[2])
    images = album.images(data)
    place = {row_id: at for at, row_id in enumerate(images.ids)}
    unknown = [row_id for row_id in predictions["id"] if row_id not in place]
    if unknown:
        raise UserError(folder, f"names {len(unknown)} pictures that {data} lacks: {unknown[0]}", remedy(folder, True))
    names = sorted({*predictions["label"], *filter(None, predictions["predicted"])})
    number = {name: i for i, name in enumerate(names)}
    rows = [
        [place[one.id], number[one.label], number.get(one.predicted), "" if one.predicted else one.output]
        for one in predictions.itertuples()
    ]
    classes = [
        [number[one.label], int(one.images), int(one.correct), float(one.accuracy)]
        for one in per_class(predictions).itertuples()
    ]
    command = remedy(folder).removeprefix("run `").removesuffix("`")
    accuracy = float(predictions["correct"].mean()) if len(predictions) else None
    return {"data": data, "names": names, "rows": rows, "classes": classes, "command": command, "accuracy": accuracy}


def _all(album: Album) -> Iterator[tuple[str, str, str, str, str]]:
    """(key, data set, adapter, how it was named, recipe) of all tables."""
    params, run = album.params, album.run
    for data in (data for data in params.run.data if params.data[data].task == "classify"):
        for adapter in params.run.adapters:
            for recipe in params.run.recipes:
                if (run.evaluated(adapter, recipe) / data / "predictions.csv").exists():
                    yield f"{data}/{adapter}/{recipe}", data, adapter, f"fine-tuned on {recipe}", recipe
            if (run.named(adapter) / data / TABLE).exists():
                for rule, how in RULES.items():
                    yield f"{data}/{adapter}//{rule}", data, adapter, how, ""


def _named(named: Named, rule: str) -> pd.DataFrame:
    """The test pictures by a rule of the namer, in the columns of predictions.csv."""
    rows = named.rows[named.rows["split"] == "test"]
    best = named.log_probabilities(rule, list(rows.index)).argmax(1).tolist() if len(rows) else []
    found = pd.DataFrame({"id": rows.index, "label": list(rows["label"]), "predicted": [named.names[i] for i in best]})
    return found.assign(output=found["predicted"], correct=found["predicted"] == found["label"])
