"""What pre-training and each recipe read, as digests: files of their own, so that a change of one data set makes only
those stale that read it. DVC cannot list the data sets of a recipe among the dependencies of its stage."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pipeline.config import Params
from pipeline.files import atomically
from pipeline.runs import EXTRACTED_BY, Run, require


def write_inputs(params: Params) -> None:
    """Write inputs/<recipe>.json for every recipe of the graph, and the same for pre-training and for naming.

    Raises UserError naming the stage that writes what is missing.
    """
    run = Run.of(params)
    recipes = {name: params.finetune.recipes[name].data for name in params.run.recipes}
    classes = [data for data in params.run.data if params.data[data].task == "classify"]
    for name, names in {**recipes, PRETRAIN: params.pretrain.data, CLASSES: [*params.pretrain.data, *classes]}.items():
        digests: dict[str, object] = {data: {"task": params.data[data].task, **_digests(run, data)} for data in names}
        if name == CLASSES:  # stage `name` writes a file for each recipe
            digests["recipes of"] = recipes
        with atomically(run.inputs(name)) as file:
            file.write((json.dumps(digests, indent=1) + "\n").encode())


PRETRAIN, CLASSES = "pretrain-data", "name-data"  # no name of a recipe has a hyphen


def _digests(run: Run, data: str) -> dict[str, str]:
    """SHA-256 of a data set's manifest and of those of its features."""
    files: dict[str, Path] = {
        "prepare": run.manifest(data),
        **{kind: run.features(kind, data) for kind in EXTRACTED_BY},
    }
    return {kind: hashlib.sha256(require(path).read_bytes()).hexdigest() for kind, path in files.items()}
