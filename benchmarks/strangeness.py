"""How often pictures of one data set are told to be unlike those of another: what `Familiar` is worth.

    python benchmarks/strangeness.py data/photos:classes data/photos:captions data/demo:classes

Prints, for each data set taken as known, the share of test pictures of each that lie beyond `STRANGE` of its validation
pictures: of its own that is false alarm. Runs of other projects are named by their paths; one encoder for all.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import torch

from pipeline.answers.familiar import STRANGE, Familiar, distances
from pipeline.extraction.near import HELD_OUT, KNOWN, mean_tokens
from pipeline.runs import Run
from pipeline.store.reader import ImageTokens


def opened(name: str) -> ImageTokens:
    folder, _, data = name.rpartition(":")
    path = Path(folder).resolve()
    with contextlib.chdir(path.parents[1]):
        return ImageTokens.open(Run(path.name), data)


def unit(images: ImageTokens, part: str, most: int) -> torch.Tensor:
    return torch.nn.functional.normalize(mean_tokens(images, [part], most), dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="RUN:DATA")
    names = parser.parse_args().sets
    images = {name: opened(name) for name in names}
    tests = {name: unit(one, "test", KNOWN) for name, one in images.items()}
    for name, one in images.items():
        known = unit(one, "train", KNOWN)
        familiar = Familiar(known, distances(unit(one, "val", HELD_OUT), known).sort().values)
        shares = {
            other: sum(share >= STRANGE for share in familiar.of_means(pictures)) / len(pictures)
            for other, pictures in tests.items()
        }
        told = ", ".join(f"{other} {share:.0%}" for other, share in shares.items())
        print(f"{name} known ({len(known)} pictures): {told}", flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
