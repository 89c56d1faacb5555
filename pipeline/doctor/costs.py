"""What a profile will cost: bytes on disk and in memory, and the time of fine-tuning, with the formula of each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from pipeline.adapters.base import Architecture
from pipeline.config import Params
from pipeline.doctor.machine import cuda
from pipeline.encoders.base import Encoder
from pipeline.llms.base import Loader
from pipeline.runs import Run
from pipeline.sources.prepare import source_of

GIB = 2**30
ASSUMED_TOKENS = (256, 1024)  # N x D of an encoder that only an extraction can ask
ASSUMED_LLM = (7.25e9, 4096, 32)  # parameters, width and layers of an LLM that is not there yet
TOKEN_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1}
BYTES_PER_WEIGHT = {"none": 2.0, "nf4": 0.6}
# Activation bytes per token, unit of width and layer: as measured at 7 billion parameters (docs/benchmarks.md, GPU).
ACTIVATION_BYTES = {"keep": 50, "recompute": 5}
CPU_SPEED, GPU_SPEED = 1e11, 3e13  # FLOP/s: one core, one large GPU; orders of magnitude
PROMPT_TOKENS = 40


@dataclass(frozen=True)
class Estimate:
    """A cost, as text with its unit, and the formula behind it."""

    name: str
    amount: str
    formula: str


def pictures(params: Params, name: str) -> int:
    """How many pictures a data set has or, where only `prepare` can tell, is assumed to have."""
    source = source_of(params, name)
    return source.pictures() or source.assumed


def tokens_per_picture(params: Params) -> tuple[int, int]:
    """N and D of the image tokens, or what is assumed where only an extraction can tell."""
    return Encoder.of(params.vision).tokens() or ASSUMED_TOKENS


def llm_shape(params: Params) -> tuple[float, int, int]:
    """Parameters, width and layers of the LLM, or what is assumed where it is not there."""
    return Loader.of(params.llm).shape() or ASSUMED_LLM


def needs_gpu(params: Params) -> bool:
    """Whether the LLM is too large for a processor: its 4-bit layers run there, at minutes a step."""
    return params.llm.quantization == "nf4" and llm_shape(params)[0] >= 1e9


def token_bytes(params: Params) -> float:
    """Disk for the image tokens of all data sets: images x N x D x bytes."""
    count, width = tokens_per_picture(params)
    return sum(pictures(params, name) for name in params.run.data) * count * width * TOKEN_BYTES[params.cache.dtype]


def _architectures(params: Params) -> list[Architecture]:
    return [Architecture.of(params.kind_of(name), params.adapter(name).architecture) for name in params.run.adapters]


def adapter_parameters(params: Params) -> int:
    """Parameters of the largest adapter that the graph trains."""
    (_, d_in), d_out = tokens_per_picture(params), llm_shape(params)[1]
    return max(architecture.parameters(d_in, d_out) for architecture in _architectures(params))


def disk_bytes(params: Params) -> float:
    """Image tokens, weights of adapters (DVC may have to copy), weights still to fetch, and 1 GiB.

    An adapter has weights of its first and last epoch, a checkpoint with two moments, and those of each fine-tuning.
    """
    missing = 0.0 if Loader.of(params.llm).need().ok else 2 * llm_shape(params)[0]
    copies = 2 * (5 * len(params.run.adapters) + len(_fine_tunings(params)))
    return token_bytes(params) + copies * 4 * adapter_parameters(params) + missing + GIB


def memory_bytes(params: Params) -> float:
    """Fine-tuning: LLM weights, adapter with gradients and Adam's moments (16 bytes), activations."""
    count, width, layers = llm_shape(params)
    batch = max(params.finetune_for(*pair).batch for pair in _fine_tunings(params))
    activations = ACTIVATION_BYTES[params.runtime.activations] * batch * _sequence(params) * width * layers
    return BYTES_PER_WEIGHT[params.llm.quantization] * count + 16 * adapter_parameters(params) + activations


def _fine_tunings(params: Params) -> list[tuple[str, str]]:
    """Adapter and recipe of each, those from scratch too."""
    run = params.run
    return [*product(run.adapters, run.recipes), *product(run.scratch, run.scratch_recipes)]


def _sequence(params: Params) -> int:
    """Tokens of one training example: soft prompt, prompt and answer."""
    count, _ = tokens_per_picture(params)
    return max(architecture.tokens(count) for architecture in _architectures(params)) + PROMPT_TOKENS


def finetune_seconds(params: Params) -> float:
    """All fine-tuning runs: 4 FLOP x LLM parameters x tokens (its weights get no gradient), at an assumed speed."""
    speed, _ = _speed(params)
    examples = 0
    for adapter, name in _fine_tunings(params):
        recipe = params.finetune_for(adapter, name)
        pool = sum(pictures(params, data) for data in recipe.data)
        whole = int(recipe.epochs * 0.7 * pool)  # about the training part of any layout
        examples += min(whole, (recipe.max_steps or whole) * recipe.batch * recipe.accumulate)
    return 4 * llm_shape(params)[0] * _sequence(params) * examples / speed


def _speed(params: Params) -> tuple[float, str]:
    """FLOP/s to reckon with, and its name."""
    if needs_gpu(params) or cuda(params.runtime.device)[0]:
        return GPU_SPEED, "one large GPU"
    cores = os.cpu_count() or 1
    return CPU_SPEED * cores, f"{cores} cores"


def estimates(params: Params, disk: float, memory: float) -> list[Estimate]:
    """Disk, memory and time, and what the stages took when they last ran here."""
    known, (count, width_of_token) = Encoder.of(params.vision).tokens(), tokens_per_picture(params)
    images = sum(pictures(params, name) for name in params.run.data)
    shape = f"{count} x {width_of_token}" + ("" if known else " (assumed: this encoder's are known after extraction)")
    each, (_, width, layers) = ACTIVATION_BYTES[params.runtime.activations], llm_shape(params)
    found = [
        Estimate(
            "image tokens", gib(token_bytes(params)),
            f"{images:,} pictures x {shape} x {TOKEN_BYTES[params.cache.dtype]} bytes",
        ),
        Estimate("disk in all", gib(disk), "image tokens + checkpoints + weights to fetch + 1 GiB"),
        Estimate(
            "memory, fine-tuning", gib(memory),
            f"weights + 16 x adapter + {each} x batch x {_sequence(params)} tokens x {width} x {layers}",
        ),
        Estimate(
            "time, fine-tuning", _duration(finetune_seconds(params)),
            f"4 x LLM parameters x tokens / speed of {_speed(params)[1]}; order of magnitude",
        ),
    ]  # fmt: skip
    return found + list(_last_run(Run.of(params).seconds("any").parent))


def _last_run(folder: Path) -> Iterable[Estimate]:
    """What the stages took when they last ran here."""
    seconds = [json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in sorted(folder.glob("*.json"))]
    if seconds:
        yield Estimate("time, last run here", _duration(sum(seconds)), f"{len(seconds)} stages, measured")


def gib(size: float) -> str:
    """A size as people read it."""
    return f"{size / GIB:.1f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"
