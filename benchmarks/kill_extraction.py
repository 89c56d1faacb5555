"""Kill an extraction from outside at random moments, restart it, and compare its bytes with an uninterrupted run.

    python benchmarks/kill_extraction.py [--kills 30] [--encoder timm|tiny]

Each moment is uniform over the time that a whole extraction takes; a run that ends before its moment is not counted,
and the next one starts from nothing. After every kill each file under a final name has to be whole and the same as in
the uninterrupted run.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from pipeline.config import Params
from pipeline.encoders.vision import load_vision_encoder
from pipeline.extraction.images import extract_images
from pipeline.runs import STORE, Run
from pipeline.sources import manifest as manifest_table
from pipeline.sources.prepare import prepare

PROFILE = Path(__file__).parents[1] / "profiles" / "demo.yaml"


class Tiny:
    """An encoder of no layers, slow enough to be killed."""

    def __init__(self) -> None:
        self.identity = {"encoder": "tiny"}

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image.resize((8, 8)), np.float32)).permute(2, 0, 1)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(0.005)
        return pixels.flatten(2).transpose(1, 2)


def extract(params: Params, kind: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the weights of timm's resnet10t are random here
    encoder = Tiny() if kind == "tiny" else load_vision_encoder(params.vision)
    extract_images(params, "classes", encoder, lambda n: None)


def data(pictures: int, shards: int) -> Params:
    """Pictures of noise below the current folder, prepared."""
    generator = np.random.default_rng(0)
    for i in range(pictures):
        path = Path(f"pictures/class{i % 2}/{i:04}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (48, 48, 3), np.uint8)).save(path)
    values = yaml.safe_load(PROFILE.read_text())
    values["data"]["classes"] |= {"source": "imagefolder", "root": "pictures", "count": None}
    values["vision"] |= {"encoder": "timm", "model": "resnet10t", "pretrained": "random", "dtype": "float32"}
    values["cache"]["shards"] = shards
    params = Params.model_validate(values)
    manifest_table.write(prepare(params, "classes"), Run.of(params).manifest("classes"))
    return params


def shards() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in STORE.glob("*/*/*.arrow") if not path.name.startswith(".")}


def run(params: Params, kind: str, kill_after: float | None) -> tuple[float, int | None]:
    """One extraction in a process of its own, killed after some seconds; gives its seconds and exit code."""
    context = multiprocessing.get_context("forkserver")  # has the imports done, so the moments fall into the work
    process = context.Process(target=extract, args=(params, kind))
    began = time.monotonic()
    process.start()
    process.join(kill_after)
    process.kill()
    process.join()
    return time.monotonic() - began, process.exitcode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--encoder", choices=["timm", "tiny"], default="timm")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--shards", type=int, default=16)
    options = parser.parse_args()
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["pipeline.sources", "pipeline.extraction.images", "timm"]
    )
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        params = data(options.pictures, options.shards)
        run(params, options.encoder, None)  # starts the process that has the imports done
        shutil.rmtree(STORE)
        seconds, _ = run(params, options.encoder, None)
        whole = shards()
        dice, killed = random.Random(0), 0
        shutil.rmtree(STORE)
        while killed < options.kills:
            moment = dice.uniform(0, seconds)
            _, code = run(params, options.encoder, moment)
            killed += code == -signal.SIGKILL
            found = shards()
            if any(whole.get(name) != content for name, content in found.items()):
                sys.exit(f"kill {killed} at {moment:.2f} s left a shard that is not whole")
            print(f"{moment:.2f} s: exit code {code}, {len(found)} of {len(whole)} shards there; {killed} kills")
            if len(found) == len(whole):
                shutil.rmtree(STORE)  # nothing left to kill: start again
        _, code = run(params, options.encoder, None)
        if code != 0 or shards() != whole:
            sys.exit("after the last restart the bytes are not those of the uninterrupted run")
    print(f"{killed} kills; {len(whole)} shards have the bytes of the uninterrupted run")


if __name__ == "__main__":
    main()
