"""`terraalign caption` and `terraalign classify`: the best adapter of a run on any picture."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.config import Params, load_params
from pipeline.errors import UserError, readable
from pipeline.runs import Run, remedy

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.media.decoding import Decoder, Loaded

Row = dict[str, Any]  # what is said of a picture
Photos = Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.", show_default=False)]
AsJSON = Annotated[
    bool,
    typer.Option("--json", help="One JSON object a line: photo, answer, adapter, and recipe or probability and names."),
]
FORMATS = "give JPEG, PNG, WebP, GIF, BMP or TIFF files, or folders of them"


def caption(photos: Photos, as_json: AsJSON = False) -> None:
    """Caption any pictures with the best fine-tuned adapter of the active profile's run."""
    _answer("caption", photos, as_json, llm=True)


def classify(
    photos: Photos,
    as_json: AsJSON = False,
    llm: Annotated[bool, typer.Option("--llm", help="Ask the fine-tuned language model instead.")] = False,
) -> None:
    """Name what is in any pictures, with probabilities, by the best pre-trained adapter of the active profile's run.

    That is by EMD to the names of all classes and discriminant analysis, weighed on validation pictures, without the
    language model: it answers as soon as stage `name` has run. --llm asks the best fine-tuned adapter.
    """
    _answer("classify", photos, as_json, llm)


def _answer(name: str, photos: list[Path], as_json: bool, llm: bool) -> None:
    """Print an answer per picture; a picture that cannot be read is named on stderr and makes the exit code 1."""
    params = load_params()
    files, missing = pictures_named(photos)
    if not files:
        raise UserError(photos[0], ("no such file or folder" if missing else "no picture in it"), FORMATS)
    candidates = finetuned(params, name) if llm else namers(params)
    from pipeline.devices import pick_device
    from pipeline.encoders.base import Encoder
    from pipeline.encoders.vision import load_vision_encoder

    encoder = load_vision_encoder(params.vision, params.runtime.device)
    decoder = Encoder.of(params.vision).decoder(encoder.preprocess, pick_device(params.runtime.device))
    folder = best_adapter(params, candidates, encoder.identity)
    answer = _by_llm(params, name, folder) if llm else _by_namer(params, folder)
    remaining, failed = iter(files), missing
    while part := list(islice(remaining, params.vision.batch)):
        read = [(file, loaded) for file in part if (loaded := _load(file, decoder)) is not None]
        failed += len(part) - len(read)
        if not read:
            continue
        pixels = decoder.batch([loaded for _, loaded in read], params.vision.batch)  # of the shape of extraction
        for (file, _), row in zip(read, answer(encoder.encode(pixels)[: len(read)]), strict=True):
            say({"photo": str(file), **row}, as_json)
    if failed:
        raise typer.Exit(1)


def _by_llm(params: Params, name: str, folder: Path) -> Callable[[Tensor], list[Row]]:
    """Answers of a fine-tuned adapter, with the hints of its recipe."""
    from pipeline.naming.table import hinted
    from pipeline.store.reader import usable_rows
    from pipeline.tasks.base import Task
    from pipeline.vlm import load_vlm

    task, (adapter, _, recipe) = Task.of(name, params.evaluate), folder.name.partition("-")
    settings = params.finetune_for(adapter, recipe)
    data, count = next(data for data in settings.data if params.data[data].task == name), settings.hints
    model = load_vlm(params.llm, folder, "adapter", params.runtime.device)
    decoding = task.decoding(model, usable_rows(Run.of(params), data))
    namer = _named_by(params, Run.of(params).named(adapter) / data) if count else None

    def answers(tokens: Tensor) -> list[Row]:
        hints = None
        if namer:
            hints = [task.hint(hinted(best, count)) for best in namer(tokens)]
        found = model.generate(tokens, task.prompt, task.max_tokens, hints=hints, **decoding)
        return [{"answer": text, "adapter": adapter, "recipe": recipe} for text in found]

    return answers


def _by_namer(params: Params, folder: Path) -> Callable[[Tensor], list[Row]]:
    """The likeliest names without the LLM."""
    namer, adapter = _named_by(params, folder), folder.parent.name

    def answers(tokens: Tensor) -> list[Row]:
        return [
            {"answer": best[0][0], "probability": round(best[0][1], 4), "adapter": adapter, "names": dict(best[:5])}
            for best in namer(tokens)
        ]

    return answers


def _named_by(params: Params, folder: Path) -> Callable[[Tensor], list[list[tuple[str, float]]]]:
    """All names of a picture with their probabilities, the likeliest first, by a namer and its pre-trained adapter."""
    import torch

    from pipeline.adapters.module import load_adapter
    from pipeline.devices import pick_device
    from pipeline.naming.namer import Namer
    from pipeline.origin import check_start

    namer, pretrained = Namer.load(folder, params.runtime.emd_threads), Run.of(params).pretrained(folder.parent.name)
    check_start(folder, pretrained)
    adapter = load_adapter(pretrained, "last")
    adapter.to(pick_device(params.runtime.device))

    @torch.no_grad()
    def named(tokens: Tensor) -> list[list[tuple[str, float]]]:
        shares = namer.rules(tokens, adapter(tokens.float()))["namer"].exp()
        order = shares.argsort(dim=1, descending=True, stable=True)
        return [[(namer.names[i], shares[row, i].item()) for i in best] for row, best in enumerate(order.tolist())]

    return named


def namers(params: Params) -> dict[Path, float]:
    """The folders of the namers of the first data set of classes that has any, with their losses on validation."""
    run = Run.of(params)
    classes = [data for data in params.run.data if params.data[data].task == "classify"]
    if not classes:
        raise UserError("run.data", "none has the task classify", "add one to params.yaml")
    for data in classes:
        folders = [run.named(adapter) / data for adapter in params.run.adapters]
        found = {folder: _read_loss(folder / "namer.json", "val_loss", folder.parent) for folder in folders}
        if known := {folder: loss for folder, loss in found.items() if loss is not None}:
            return known
    raise UserError(
        run.base / "name", "no adapter names pictures yet", f"run `dvc repro name@{params.run.adapters[0]}`"
    )


def say(row: Row, as_json: bool) -> None:
    r"""Print an answer whatever the terminal's encoding: what it lacks as \u00e9 in JSON, which is the same there."""
    encoding = sys.stdout.encoding or "utf-8"
    text = json.dumps(row, ensure_ascii=False) if as_json else readable(f"{row['photo']}: {_told(row)}")
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = json.dumps(row) if as_json else text.encode(encoding, "backslashreplace").decode(encoding)
    print(text, flush=True)


def _told(row: Row) -> str:
    share = row.get("probability")
    return str(row["answer"]) if share is None else f"{row['answer']} ({share:.0%})"


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
