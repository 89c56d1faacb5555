"""What a profile needs in bytes, on disk and in memory."""

from __future__ import annotations

from itertools import product

from pipeline.adapters.base import Architecture
from pipeline.config import Params
from pipeline.encoders.base import Encoder
from pipeline.llms.base import Loader
from pipeline.sources.prepare import source_of

GIB = 2**30
ASSUMED_TOKENS = (256, 1024)  # N x D of an encoder that only an extraction can ask
ASSUMED_LLM = (7.25e9, 4096, 32)  # parameters, width and layers of an LLM that is not there yet
TOKEN_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1}
BYTES_PER_WEIGHT = {"none": 2.0, "nf4": 0.6}
# Activation bytes per token, unit of width and layer: as measured at 7 billion parameters (docs/benchmarks.md, GPU).
ACTIVATION_BYTES = {"keep": 50, "recompute": 5}
# On a CPU they are float32, as are weights that are not in 4 bits, and what is freed is kept: as measured at 135
# million parameters. torch and transformers alone hold more than a GiB there.
CPU_ACTIVATIONS, CPU_WEIGHT, CPU_LIBRARIES = 6, 4.0, 1.2 * GIB
PROMPT_TOKENS = 40


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
    """Disk for the image tokens of all data sets."""
    return sum(pictures(params, name) for name in params.run.data) * picture_bytes(params)


def picture_bytes(params: Params) -> float:
    """Disk for the image tokens of a picture: views x N x D x bytes."""
    count, width = tokens_per_picture(params)
    return views(params) * count * width * TOKEN_BYTES[params.cache.dtype]


def views(params: Params) -> int:
    """How many views of a picture are encoded and kept, the plain one among them."""
    return 1 + len(params.vision.views)


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
    copies = 2 * (5 * len(params.run.adapters) + len(fine_tunings(params)))
    return token_bytes(params) + copies * 4 * adapter_parameters(params) + missing + GIB


def memory_bytes(params: Params, on_cpu: bool = False) -> float:
    """Fine-tuning: LLM, adapter with gradients and Adam's moments (16 bytes), activations; on a CPU libraries, too."""
    batch = max(params.finetune_for(*pair).batch for pair in fine_tunings(params))
    activations = batch * sequence(params) * activation_bytes(params, on_cpu)
    each = CPU_WEIGHT if on_cpu and params.llm.quantization == "none" else BYTES_PER_WEIGHT[params.llm.quantization]
    held = each * llm_shape(params)[0] + 16 * adapter_parameters(params) + activations
    return held + (CPU_LIBRARIES if on_cpu else 0.0)


def activation_bytes(params: Params, on_cpu: bool = False) -> float:
    """Of a token in a step of fine-tuning."""
    _, width, layers = llm_shape(params)
    return ACTIVATION_BYTES[params.runtime.activations] * width * layers * (CPU_ACTIVATIONS if on_cpu else 1)


def fine_tunings(params: Params) -> list[tuple[str, str]]:
    """Adapter and recipe of each, those from scratch too."""
    run = params.run
    return [*product(run.adapters, run.recipes), *product(run.scratch, run.scratch_recipes)]


def sequence(params: Params) -> int:
    """Tokens of one training example: soft prompt, prompt and answer."""
    count, _ = tokens_per_picture(params)
    return max(architecture.tokens(count) for architecture in _architectures(params)) + PROMPT_TOKENS


def gib(size: float) -> str:
    """A size as people read it."""
    return f"{size / GIB:.1f} GiB"
