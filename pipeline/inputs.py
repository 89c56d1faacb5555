"""What pre-training and each recipe read, as digests: files of their own, so that a change of one data set makes only
those stale that read it. DVC cannot list the data sets of a recipe among the dependencies of its stage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from pipeline.config import Params, components
from pipeline.files import atomically
from pipeline.runs import EXTRACTED_BY, Run, require

CLASSES = "name-data"  # no name of a recipe has a hyphen


def write_inputs(params: Params) -> None:
    """Write inputs/<recipe>.json for every recipe of the graph, pretrain-<adapter>.json, and name-data.json for naming.

    The language model is input to the pre-training of those adapters alone whose objective asks it. Raises UserError
    naming the stage that writes what is missing.
    """
    recipes = {name: params.finetune.recipes[name].data for name in params.run.recipes}
    for name, names in recipes.items():
        _write(params, name, names)
    for adapter in params.run.adapters:
        settings = params.pretrain_for(adapter)
        asks = components.find("objective", settings.objective.name).needs_llm
        llm = {"the LLM": params.llm.model_dump(mode="json")} if asks else {}
        _write(params, f"pretrain-{adapter}", settings.data, llm)
    classes = [data for data in params.run.data if params.data[data].task == "classify"]
    # Stage `name` writes a file for each recipe.
    _write(params, CLASSES, [*params.pretrain.data, *classes], {"recipes of": recipes})


def _write(params: Params, name: str, data: list[str], more: Mapping[str, object] | None = None) -> None:
    run = Run.of(params)
    digests = {one: {"task": params.data[one].task, **_digests(run, one)} for one in data}
    with atomically(run.inputs(name)) as file:
        file.write((json.dumps({**digests, **(more or {})}, indent=1) + "\n").encode())


def _digests(run: Run, data: str) -> dict[str, str]:
    """SHA-256 of a data set's manifest and of those of its features."""
    files: dict[str, Path] = {
        "prepare": run.manifest(data),
        **{kind: run.features(kind, data) for kind in EXTRACTED_BY},
    }
    return {kind: hashlib.sha256(require(path).read_bytes()).hexdigest() for kind, path in files.items()}
