"""Which adapter of a run answers: the best on validation of those that fit the encoder and the LLM of now."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path

from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.runs import Run, remedy

METRICS = "metrics.json"  # of a fine-tuned adapter
LEARNED = {"classify": "names", "caption": "captions"}  # by task


NAMES_ALONE = "was taught names alone: whatever the question, it will likely answer with one"


def taught_names_alone(params: Params, adapter: str, recipe: str) -> bool:
    """Whether a fine-tuned adapter learned from pictures with names and no other text."""
    return {params.data[data].task for data in params.finetune_for(adapter, recipe).data} == {"classify"}


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
        raise not_yet(params, folders[0].parent, "no adapter is trained yet")
    return found


def classes(params: Params) -> list[str]:
    """The data sets that have classes; UserError where none has."""
    return _of_task(params, "classify")


def finetuned(params: Params, task: str) -> dict[Path, float]:
    """The folders of the adapters that were fine-tuned for a task, with their validation losses on one data set.

    That is the first of the task in run.data for which there are any: losses of different data sets do not compare.
    """
    for folders in _candidates(params, task):
        losses = {folder: _read_loss(folder / METRICS, key, folder) for folder, key in folders.items()}
        if found := {folder: loss for folder, loss in losses.items() if loss is not None}:
            return found
    raise _not_finetuned(params, task)


def check_trained(params: Params, *tasks: str, llm: bool = True) -> None:
    """Raises UserError where files tell, without torch, that nothing is trained which answers for any of some tasks.

    Not `llm`: for names by what is pre-trained alone.
    """
    if not llm:
        classes(params)
        pretrained(params)
        return
    asked = learned(params, *tasks)
    if not any((folder / METRICS).exists() for task in asked for some in _candidates(params, task) for folder in some):
        raise _not_finetuned(params, asked[0])


def learned(params: Params, *tasks: str) -> list[str]:
    """Those of some tasks that the run has data sets of; the first where there are none."""
    known = {params.data[data].task for data in params.run.data}
    return [task for task in tasks if task in known] or list(tasks[:1])


def _candidates(params: Params, task: str) -> list[dict[Path, str]]:
    """For each data set of a task: where its fine-tuned adapters are or will be, and the keys of their losses on it.

    Raises UserError where the run has no such data set, or no recipe for one.
    """
    run, recipes = Run.of(params), {name: params.finetune.recipes[name].data for name in params.run.recipes}
    found = [
        {
            run.finetuned(adapter, name): f"val_loss/{data}" if len(sets) > 1 else "val_loss"
            for name, sets in recipes.items()
            if data in sets
            for adapter in params.run.adapters
        }
        for data in _of_task(params, task)
    ]
    if not any(found):
        raise UserError("run.recipes", f"none is on a data set with the task {task}", "add one to params.yaml")
    return found


def _of_task(params: Params, task: str) -> list[str]:
    """The data sets of a task; UserError where the run has none, with what it learns instead."""
    found = [data for data in params.run.data if params.data[data].task == task]
    if not found:
        others = sorted({params.data[data].task for data in params.run.data})
        known, wanted = (" and ".join(LEARNED.get(one, one) for one in some) for some in (others, [task]))
        commands = " or ".join(f"`terraalign {other}`" for other in others if other in LEARNED)
        files = "a folder per class" if task == "classify" else "a captions file beside the pictures"
        remedy = f"{commands or 'take another profile'}, or `terraalign try` with {files} and another --name"
        raise UserError("", f"this run (profile {params.profile}) learns {known}, not {wanted}", remedy)
    return found


def _not_finetuned(params: Params, task: str) -> UserError:
    return not_yet(params, Run.of(params).base / "finetune", f"nothing is fine-tuned for the task {task} yet")


def not_yet(params: Params, where: Path, what: str) -> UserError:
    """That something of a run is not there, in words that are the same wherever it is missed, and what to do."""
    run = f"`terraalign run` runs the profile {params.profile}, and `terraalign plan` says what that takes"
    return UserError(where, what, f"`terraalign try FOLDER` learns from pictures of your own; {run}")


def _read_loss(file: Path, key: str, made: Path) -> float | None:
    try:
        loss = float(json.loads(file.read_text(encoding="utf-8"))[key])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"left out: {file}: not of this recipe ({error!r}); {remedy(made)}", file=sys.stderr)
        return None
    return loss if math.isfinite(loss) else math.inf


def best_finetuned(params: Params, identity: dict[str, str], *tasks: str) -> Path:
    """The best adapter of the first of some tasks that the run has one for."""
    *first, last = learned(params, *tasks)
    for task in first:
        with contextlib.suppress(UserError):
            return best_adapter(params, finetuned(params, task), identity)
    return best_adapter(params, finetuned(params, last), identity)


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
