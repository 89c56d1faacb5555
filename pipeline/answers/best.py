"""Which adapter of a run answers: the best on validation of those that fit the encoder and the LLM of now."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path

from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.runs import Run, remedy


def namers(params: Params) -> dict[Path, float]:
    """The folders of the namers of the first data set of classes that has any, with their losses on validation.

    None where stage `name` has not run yet.
    """
    run = Run.of(params)
    for data in classes(params):
        folders = [run.named(adapter) / data for adapter in params.run.adapters]
        found = {folder: _read_loss(folder / "namer.json", "val_loss", folder.parent) for folder in folders}
        if known := {folder: loss for folder, loss in found.items() if loss is not None}:
            return known
    return {}


def pretrained(params: Params) -> dict[Path, float]:
    """The folders of the pre-trained adapters, in the order of run.adapters, which stands for a loss here.

    What pre-training minimises compares between adapters of one objective alone.
    """
    folders = [Run.of(params).pretrained(adapter) for adapter in params.run.adapters]
    found = {folder: float(place) for place, folder in enumerate(folders) if (folder / "last.safetensors").exists()}
    if not found:
        raise UserError(folders[0], "no adapter is trained yet", remedy(folders[0]))
    return found


def classes(params: Params) -> list[str]:
    """The data sets that have classes; UserError where none has."""
    found = [data for data in params.run.data if params.data[data].task == "classify"]
    if not found:
        raise UserError("run.data", "none has the task classify", "add one to params.yaml")
    return found


def finetuned(params: Params, task: str) -> dict[Path, float]:
    """The folders of the adapters that were fine-tuned for a task, with their validation losses on one data set.

    That is the first of the task in run.data for which there are any: losses of different data sets do not compare.
    """
    run, recipes = Run.of(params), {name: params.finetune.recipes[name].data for name in params.run.recipes}
    asked = [data for data in params.run.data if params.data[data].task == task]
    if not any(data in sets for data in asked for sets in recipes.values()):
        raise UserError("run.recipes", f"none is on a data set with the task {task}", "add one to params.yaml")
    for data in asked:
        pairs = [(adapter, name) for name, sets in recipes.items() if data in sets for adapter in params.run.adapters]
        folders = [(run.finetuned(adapter, name), len(recipes[name]) > 1) for adapter, name in pairs]
        losses = {folder: _loss(folder, data if several else None) for folder, several in folders}
        if found := {folder: loss for folder, loss in losses.items() if loss is not None}:
            return found
    raise UserError(run.base / "finetune", f"nothing is fine-tuned for the task {task} yet", "run `dvc repro`")


def _loss(folder: Path, data: str | None) -> float | None:
    """The validation loss of a fine-tuned adapter, on one of several data sets; None where it is of another recipe."""
    return _read_loss(folder / "metrics.json", f"val_loss/{data}" if data else "val_loss", folder)


def _read_loss(file: Path, key: str, made: Path) -> float | None:
    try:
        loss = float(json.loads(file.read_text(encoding="utf-8"))[key])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"left out: {file}: not of this recipe ({error!r}); {remedy(made)}", file=sys.stderr)
        return None
    return loss if math.isfinite(loss) else math.inf


def best_adapter(params: Params, losses: Mapping[Path, float], identity: dict[str, str]) -> Path:
    """Of the adapters that fit encoder and LLM, the one with the lowest validation loss; the test part has no say.

    Those that do not fit are named on stderr. Raises UserError when none fits.
    """
    from pipeline.origin import check_encoder, check_llm_named

    faults = {}
    for folder in losses:
        try:
            check_encoder(folder, identity)
            check_llm_named(folder, params.llm)
        except UserError as fault:
            faults[folder] = fault
    fitting = [folder for folder in losses if folder not in faults]
    if not fitting:
        raise next(iter(faults.values()))
    for left_out in faults.values():
        print(f"left out: {left_out}", file=sys.stderr)
    return min(fitting, key=losses.__getitem__)
