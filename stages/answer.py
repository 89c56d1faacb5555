"""`terraalign caption` and `terraalign classify`: the best adapter of a run on any picture."""

from __future__ import annotations

import json
import math
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.config import Params, load_params
from pipeline.errors import UserError, readable
from pipeline.runs import Run, remedy

if TYPE_CHECKING:
    from pipeline.media.decoding import Decoder, Loaded

Photos = Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.", show_default=False)]
AsJSON = Annotated[bool, typer.Option("--json", help="One JSON object a line: photo, answer, adapter, recipe.")]
FORMATS = "give JPEG, PNG, WebP, GIF, BMP or TIFF files, or folders of them"


def caption(photos: Photos, as_json: AsJSON = False) -> None:
    """Caption any pictures with the best fine-tuned adapter of the active profile's run."""
    _answer("caption", photos, as_json)


def classify(photos: Photos, as_json: AsJSON = False) -> None:
    """Name what is in any pictures with the best fine-tuned adapter of the active profile's run."""
    _answer("classify", photos, as_json)


def _answer(name: str, photos: list[Path], as_json: bool) -> None:
    """Print an answer per picture; a picture that cannot be read is named on stderr and makes the exit code 1."""
    params = load_params()
    files, missing = pictures_named(photos)
    if not files:
        raise UserError(photos[0], ("no such file or folder" if missing else "no picture in it"), FORMATS)
    losses = finetuned(params, name)
    from pipeline.devices import pick_device
    from pipeline.encoders.base import Encoder
    from pipeline.encoders.vision import load_vision_encoder
    from pipeline.tasks.base import Task
    from pipeline.vlm import load_vlm

    task = Task.of(name, params.evaluate)
    encoder = load_vision_encoder(params.vision, params.runtime.device)
    decoder = Encoder.of(params.vision).decoder(encoder.preprocess, pick_device(params.runtime.device))
    folder = best_adapter(params, losses, encoder.identity)
    adapter, _, recipe = folder.name.partition("-")
    model = load_vlm(params.llm, folder, "adapter", params.runtime.device)
    remaining, failed = iter(files), missing
    while part := list(islice(remaining, params.vision.batch)):
        read = [(file, loaded) for file in part if (loaded := _load(file, decoder)) is not None]
        failed += len(part) - len(read)
        if not read:
            continue
        pixels = decoder.batch([loaded for _, loaded in read], params.vision.batch)  # of the shape of extraction
        tokens = encoder.encode(pixels)[: len(read)]
        answers = model.generate(tokens, task.prompt, task.max_tokens, **task.decoding)
        for (file, _), answer in zip(read, answers, strict=True):
            say({"photo": str(file), "answer": answer, "adapter": adapter, "recipe": recipe}, as_json)
    if failed:
        raise typer.Exit(1)


def say(row: dict[str, str], as_json: bool) -> None:
    r"""Print an answer whatever the terminal's encoding: what it lacks as \u00e9 in JSON, which is the same there."""
    encoding = sys.stdout.encoding or "utf-8"
    text = json.dumps(row, ensure_ascii=False) if as_json else readable(f"{row['photo']}: {row['answer']}")
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = json.dumps(row) if as_json else text.encode(encoding, "backslashreplace").decode(encoding)
    print(text, flush=True)


def pictures_named(photos: list[Path]) -> tuple[list[Path], int]:
    """The pictures named and those below the folders named, and how many names lead nowhere; these are said."""
    from pipeline.sources.folders import pictures_below
    from pipeline.sources.texts import by_reason

    files: list[Path] = []
    missing = 0
    for photo in photos:
        if photo.is_dir():
            tree = pictures_below(photo, any_name=True)
            files += tree.files.values()
            if left_out := [(str(one), one.reason) for one in tree.left_out if not one.hidden]:
                print(f"warning: {len(left_out)} not used: {by_reason(left_out)}", file=sys.stderr)
        elif photo.exists():
            files.append(photo)
        else:
            missing += 1
            print(f"error: {readable(photo)}: no such file or folder", file=sys.stderr)
    return files, missing


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
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        loss = float(metrics[f"val_loss/{data}" if data else "val_loss"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"left out: {folder / 'metrics.json'}: not of this recipe ({error!r}); {remedy(folder)}", file=sys.stderr)
        return None
    return loss if math.isfinite(loss) else math.inf


def best_adapter(params: Params, losses: dict[Path, float], identity: dict[str, str]) -> Path:
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


def _load(file: Path, decoder: Decoder) -> Loaded | None:
    from pipeline.media.pictures import decode, read

    try:
        content = read(str(file))
        decode(content)  # what is broken, PIL decides, as in `prepare`
        return decoder.load(content)
    except (OSError, ValueError) as error:
        print(f"error: {readable(file)}: not a readable picture ({error})", file=sys.stderr)
        return None
