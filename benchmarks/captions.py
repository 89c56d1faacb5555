"""What a recipe of captions and a way of decoding bring, on validation pictures: choices are made on these.

python benchmarks/captions.py --adapter mlp [--set finetune.recipes.captions.max_steps=48 ...] [--trained]
    [--decode beams=3 no_repeat=3 once=0.1 --decode repetition_penalty=1.2 ...] [--pictures 128]

In a project folder whose adapter is pre-trained: fine-tunes it there, unless --trained; prints a row for each decoding.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline.config import Params
from pipeline.llms.load import load_llm
from pipeline.metrics.caption_scores import cider, tokenised
from pipeline.metrics.evaluate import Candidate
from pipeline.metrics.things import Things, f_score
from pipeline.runs import Run
from pipeline.store.reader import COUNTED, ImageTokens, evenly
from pipeline.tasks.base import Task
from pipeline.tasks.captioning import common_tokens
from pipeline.training.finetune import finetune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--decode", nargs="+", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--show", type=int, default=0, help="print so many captions")
    arguments = parser.parse_args()
    params = changed(yaml.safe_load(Path("params.yaml").read_text()), read(arguments.set))
    began = time.process_time()
    if not arguments.trained:
        finetune(params, arguments.adapter, "captions")
    trained = time.process_time() - began
    for decoding in map(read, arguments.decode or [[]]):
        print(row(params, arguments, decoding) + f" | {trained:.0f} |", flush=True)


def read(pairs: list[str]) -> dict[str, Any]:
    """KEY=VALUE as YAML has it."""
    return {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs)}


def changed(values: dict[str, Any], changes: dict[str, Any]) -> Params:
    """Parameters with some keys, written with dots, set."""
    for path, value in changes.items():
        *sections, key = path.split(".")
        section = values
        for name in sections:
            section = section[name]
        section[key] = value
    return Params.model_validate(values)


def row(params: Params, arguments: argparse.Namespace, decoding: dict[str, Any]) -> str:
    """Adapter, what was set, F1, precision, recall, repeats in %, validation loss, CIDEr-D, seconds of captioning."""
    shown = [f"{key}={value}" for key, value in decoding.items()]
    run, task = Run.of(params), Task.of("caption", params.evaluate)
    images = ImageTokens.open(run, "captions")
    val = images.split("val")
    order = torch.randperm(len(val), generator=torch.Generator().manual_seed(params.seed)).tolist()
    positions = sorted(val[i] for i in order[: arguments.pictures])
    taught = images.rows["captions"].iloc[evenly(images.split("train"), COUNTED)].tolist()
    began = time.process_time()
    with Candidate(load_llm(params.llm, "cpu"), run, arguments.adapter, "captions").finetuned() as model:
        if "once" in decoding:
            decoding["may_repeat"] = common_tokens(taught, model, decoding.pop("once"))
        texts = model.answers(
            images, positions, task.prompt, task.max_tokens, 32, **task.decoding(model, taught) | decoding
        )
    seconds = time.process_time() - began
    texts, captions = [text.split("\n")[0] for text in texts], [list(some) for some in images.rows["captions"]]
    things = Things(captions)
    judged = [things.judge(text, captions[at]) for text, at in zip(texts, positions, strict=True)]
    scored = cider(tokenised([texts])[0], tokenised([captions[at] for at in positions])).mean()
    for text, at in list(zip(texts, positions, strict=True))[: arguments.show]:
        print(f"  {text!r} / {captions[at][0]}")
    scores = [f_score("", judged, *weights, "").value for weights in ((1, 1), (1, 0), (0, 1))]
    loss = json.loads((run.finetuned(arguments.adapter, "captions") / "metrics.json").read_text())["val_loss"]
    shares = " | ".join(f"{100 * value:.1f}" for value in (*scores, sum(one.repeats for one in judged) / len(judged)))
    said = " ".join([*arguments.set, *shown])
    return f"| {arguments.adapter} | {said} | {shares} | {loss:.3f} | {scored:.3f} | {seconds:.0f}"


if __name__ == "__main__":
    main()
