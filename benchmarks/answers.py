"""Seconds to a first answer from a cold start, what of them imports alone take, and many pictures against one by one.

    python benchmarks/answers.py PHOTO... [--repeat 3]      in a project whose active profile has run

Starts are the least of some repeats, in turn, each in a process of its own. One by one: in one process, a picture at a
time (`--batch 1`), so that loading counts in neither; a call for each picture would cost the cold start each time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from pipeline.answers.model import Model
from pipeline.config import load_params

LEAN = "from pipeline.answers.lean import transformers_for_answers as imported\nwith imported(): pass"
STARTS = {
    "import torch": ["-c", "import torch"],
    "import torch and transformers' Llama": ["-c", "import torch, transformers.models.llama.modeling_llama"],
    "the same, as answers import them": ["-c", LEAN],
    "torch, transformers' Llama and peft": ["-c", "import torch, transformers.models.llama.modeling_llama, peft"],
    "classify": ["-m", "stages.cli", "classify"],
    "caption": ["-m", "stages.cli", "caption"],
}


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    own = parser.parse_args()
    best: dict[str, float] = {}
    for _ in range(own.repeat):
        for name, command in STARTS.items():
            photo = [str(own.photos[0])] if command[0] == "-m" else []
            best[name] = min(best.get(name, float("inf")), seconds(command + photo))
    for name, took in best.items():
        print(f"{name}: {took:.1f} s", flush=True)
    model = Model(load_params())
    for name, ask in {"classify": model.names(), "caption": model.captions()}.items():
        took = {}
        list(model.each(own.photos[:2], ask))  # what is compiled and allocated once
        for batch in (1, None):
            began = time.perf_counter()
            list(model.each(own.photos, ask, batch))
            took[batch] = time.perf_counter() - began
        rates = {batch: len(own.photos) / span for batch, span in took.items()}
        print(
            f"{name}, {len(own.photos)} pictures: {rates[None]:.1f} a second, one by one {rates[1]:.1f}, "
            f"{took[1] / took[None]:.1f} times as fast",
            flush=True,
        )


if __name__ == "__main__":
    main()
