"""`terraalign export`: what a run trained, as a folder for others."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.config import Params, load_params
from pipeline.errors import UserError
from pipeline.runs import RESULTS


class Format(StrEnum):
    """Who reads the folder."""

    terraalign = "terraalign"
    llava = "llava"


def export(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[RUN] TO", help="A run, such as data/demo, and the folder to write.", show_default=False
        ),
    ],
    adapter: Annotated[str | None, typer.Option(help="One of run.adapters; else the best by validation loss.")] = None,
    recipe: Annotated[str | None, typer.Option(help="One of run.recipes; else the best one for captions.")] = None,
    format: Annotated[
        Format, typer.Option(help="llava: one model for transformers' LlavaForConditionalGeneration.")
    ] = Format.terraalign,
) -> None:
    """Write a fine-tuned adapter and its LoRA, with a model card and an example that needs no TerraAlign, to a folder.

    Of the active profile, or of the run that is named, which has to be of the same profile. What transformers, PEFT and
    safetensors read, they read from it; docs/serving.md says how to go on.
    """
    if len(paths) > 2:
        raise UserError("", f"{len(paths)} paths", "give a run and a folder to write, or the folder alone")
    params, to = load_params(), paths[-1]
    if len(paths) == 2:
        _check_run(params, paths[0])
    from pipeline.answers.best import best_adapter, finetuned
    from pipeline.export.trained import Trained, encoder_of

    task = _task(params, recipe)
    candidates = finetuned(_only(params, adapter, recipe), task)
    parts, identity = encoder_of(params)
    trained = Trained.of(params, best_adapter(params, candidates, identity), task, parts)
    if format is Format.llava:
        from pipeline.export.llava import export as write
    else:
        from pipeline.export.folder import export as write
    files = write(trained, to)
    print(f"{trained.title}, for {task}: {to}\n  " + "\n  ".join(files))


def _check_run(params: Params, run: Path) -> None:
    """UserError where a folder is no run of the active profile, whose parameters say what was trained."""
    own = RESULTS / params.profile
    if not run.is_dir():
        raise UserError(run, "no such run", f"the active profile's is {own}")
    if run.resolve() != own.resolve():
        raise UserError(run, f"params.yaml is of {own}", f"run `terraalign profile use {run.name}` first")


def _task(params: Params, recipe: str | None) -> str:
    """What the adapter is to answer: what the recipe is for, or captions where a recipe is for them."""
    recipes = [recipe] if recipe else params.run.recipes
    tasks: dict[str, None] = {}
    for name in recipes:
        if name not in params.run.recipes:
            raise UserError(
                f"--recipe {name}", "run.recipes has none of this name", f"it has {', '.join(params.run.recipes)}"
            )
        tasks |= dict.fromkeys(params.data[data].task for data in params.finetune.recipes[name].data)
    return "caption" if "caption" in tasks else next(iter(tasks))


def _only(params: Params, adapter: str | None, recipe: str | None) -> Params:
    """The parameters with the adapter and the recipe alone that are asked for."""
    if adapter and adapter not in params.run.adapters:
        known = ", ".join(params.run.adapters)
        raise UserError(f"--adapter {adapter}", "run.adapters has none of this name", f"it has {known}")
    run = params.run.model_copy(
        update={
            "adapters": [adapter] if adapter else params.run.adapters,
            "recipes": [recipe] if recipe else params.run.recipes,
        }
    )
    return params.model_copy(update={"run": run})
