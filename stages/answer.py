"""`terraalign caption` and `terraalign classify`: the best adapter of a run on any picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import UserError
from pipeline.params import Dataset, Params, load_params

if TYPE_CHECKING:
    from pipeline.decoding import Decoder, Loaded

Photos = Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.", show_default=False)]
AsJSON = Annotated[bool, typer.Option("--json", help="One JSON object a line: photo, answer, adapter.")]
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def caption(photos: Photos, as_json: AsJSON = False) -> None:
    """Caption any pictures with the best fine-tuned adapter of the active profile's run."""
    params = load_params()
    _answer(params, "captions", photos, params.evaluate.finetuned_prompt, params.evaluate.caption_tokens, as_json)


def classify(photos: Photos, as_json: AsJSON = False) -> None:
    """Name what is in any pictures with the best classes adapter of the active profile's run."""
    params = load_params()
    _answer(params, "classes", photos, params.evaluate.class_prompt, params.evaluate.class_tokens, as_json)


def _answer(params: Params, data: Dataset, photos: list[Path], prompt: str, max_tokens: int, as_json: bool) -> None:
    """Print an answer per picture; a picture that cannot be read is named on stderr and makes the exit code 1."""
    files = list(_files(photos))
    if not files:
        raise UserError(f"{photos[0]}: no picture in it; formats: {', '.join(sorted(SUFFIXES))}")
    losses = _finetuned(params, data)
    from pipeline.backbones.devices import pick_device
    from pipeline.backbones.vision import load_vision_encoder
    from pipeline.decoding import decoder_for
    from pipeline.vlm import load_vlm

    encoder = load_vision_encoder(params.vision, params.runtime.device)
    decoder = decoder_for(params.vision.decoder, encoder.preprocess, pick_device(params.runtime.device))
    folder = _best_adapter(params, losses, encoder.identity)
    adapter = folder.name.removesuffix(f"-{data}")
    model = load_vlm(params.llm, folder, "adapter", params.runtime.device)
    remaining, failed = iter(files), 0
    while part := list(islice(remaining, params.vision.batch)):
        read = [(file, loaded) for file in part if (loaded := _load(file, decoder)) is not None]
        failed += len(part) - len(read)
        if not read:
            continue
        pixels = decoder.batch([loaded for _, loaded in read], params.vision.batch)  # of the shape of extraction
        answers = model.generate(encoder.encode(pixels)[: len(read)], prompt, max_tokens)
        for (file, _), answer in zip(read, answers, strict=True):
            row = {"photo": str(file), "answer": answer, "adapter": adapter}
            print(json.dumps(row, ensure_ascii=False) if as_json else f"{file}: {answer}", flush=True)
    if failed:
        raise typer.Exit(1)


def _files(photos: list[Path]) -> Iterator[Path]:
    for photo in photos:
        if photo.is_dir():
            yield from sorted(file for file in photo.rglob("*") if file.suffix.lower() in SUFFIXES)
        elif photo.exists():
            yield photo
        else:
            raise UserError(f"{photo}: no such file or folder")


def _finetuned(params: Params, data: Dataset) -> dict[Path, float]:
    """The folders of the fine-tuned adapters of run.adapters, with their validation losses."""
    losses = {}
    for name in params.run.adapters:
        folder = Path("data") / params.profile / "finetune" / f"{name}-{data}"
        if (folder / "metrics.json").exists():
            losses[folder] = float(json.loads((folder / "metrics.json").read_text())["val_loss"])
    if not losses:
        raise UserError(f"data/{params.profile}/finetune: no fine-tuned adapter for {data} yet; run `dvc repro`")
    return losses


def _best_adapter(params: Params, losses: dict[Path, float], identity: dict[str, str]) -> Path:
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
    from pipeline.pictures import decode

    try:
        content = file.read_bytes()
        decode(content)  # what is broken, PIL decides, as in `prepare`
        return decoder.load(content)
    except (OSError, ValueError) as error:
        print(f"error: {file}: not a readable picture ({error})", file=sys.stderr)
        return None
