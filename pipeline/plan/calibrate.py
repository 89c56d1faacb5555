"""Short measurements on this machine, of what the stages do over and over; by two processes side by side, as stages
are run."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config import Params, components
from pipeline.llms.base import Loader
from pipeline.llms.gguf import GGUF
from pipeline.plan.costs import llm_shape, tokens_per_picture
from pipeline.plan.rows import Rows
from pipeline.runs import MODELS, Run

if TYPE_CHECKING:
    from pipeline.objectives.base import Objective
    from pipeline.objectives.pairs import Pairs

LAYERS, LARGEST = 6, 4e8  # of the network that the LLM is reckoned from, and its parameters
BEHIND, ANSWER = 20, 8  # tokens behind an image, and of them those that are answered
LONG = 1.0  # seconds; what takes longer is done once
MOST = 4  # rows of a batch that is trained on
STEPS, MANY = 4, 32  # of decoding, and rows
SAMPLE, OTHERS = 32, 16  # pictures that objectives are measured on, and captions that each is held against


@dataclass(frozen=True)
class Language:
    """Seconds and bytes of a process with the LLM, on its share of the cores."""

    start: float  # until all is imported
    load: float  # of the LLM, without its weights
    trained: float  # of a token in a step of fine-tuning
    read: float  # of a token in a pass without gradients
    written: dict[int, float]  # of a step of decoding, by rows
    resident: float  # bytes, with the LLM's weights


@dataclass(frozen=True)
class Pretraining:
    """Seconds of an adapter's objective."""

    step: float
    held_out: float  # of a picture and its captions
    pair: float  # of a picture and one of many captions


@dataclass(frozen=True)
class Vision:
    """Seconds and bytes of a process without the LLM."""

    start: float
    load: float  # of the encoder
    encoded: float  # of a picture
    decoded: float  # of a picture
    axes: float  # of a covariance as wide as an image token
    adapters: dict[str, Pretraining]
    resident: float
    stored: dict[str, int]  # pictures of each prepared data set whose image tokens are in the store already


def calibrate(params: Params, rows: dict[str, Rows], jobs: int) -> tuple[Language, Vision]:
    """Measure for some 15 s, most of them imports, with as many threads as a stage beside `jobs` - 1 others has."""
    context = multiprocessing.get_context("spawn")
    with _threads(jobs), ProcessPoolExecutor(2, mp_context=context) as pool:
        began = time.time()
        language = pool.submit(_language, params, rows, began)
        vision = pool.submit(_vision, params, rows, began)
        return language.result(), vision.result()


@contextmanager
def _threads(jobs: int) -> Iterator[None]:
    """OpenMP reads it when a process starts."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]


def _language(params: Params, rows: dict[str, Rows], began: float) -> Language:
    """What depends on the LLM: by a network of its width with some of its layers, and so without its weights."""
    import pipeline.training.finetune  # noqa: F401  all that a stage with the LLM imports
    from pipeline.devices import fast_products, pick_device

    _quiet()
    start, device = time.time() - began, pick_device(params.runtime.device)
    fast_products()
    size, width, depth = llm_shape(params)
    resident = _peak() + 4 * size * (device.type == "cpu")
    length = max(int(one.tokens) for one in rows.values()) + tokens_of(params) + BEHIND
    batch = min(MOST, max(recipe.batch for recipe in params.finetune.recipes.values()))
    words = _words(size) * width
    layer = (size - words) / depth
    layers = max(1, min(depth, LAYERS, int(LARGEST / layer)))
    built = time.perf_counter()
    network = _of_shape(params, device, layers)
    load = time.perf_counter() - built
    trained, read, one, many = _of_network(params, network, (batch, length), device)

    def whole(measured: float, answers: float) -> float:
        """Of all layers; the table of words takes part for so many answers a token."""
        return measured * (depth * layer + answers * words) / (layers * layer + answers * words)

    share = ANSWER / length
    written = {1: whole(one, 1), MANY: whole(many, 1)}
    return Language(start, load, whole(trained, share), whole(read, share), written, resident)


def _words(size: float) -> int:
    """Words of a vocabulary that is usual at a size."""
    return 49_152 if size < 1e9 else 32_000


def is_there(params: Params) -> bool:
    """Whether the LLM can be loaded at once; a GGUF file is converted first."""
    loader = Loader.of(params.llm)
    return loader.need().ok and not (isinstance(loader, GGUF) and not [*MODELS.glob(f"{loader.file().stem}-*")])


def _of_shape(params: Params, device: Any, layers: int) -> Any:
    """A Llama (Touvron et al. 2023) of the LLM's width; numbers cost the same, whichever they are."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from pipeline.devices import pick_dtype

    size, width, depth = llm_shape(params)
    heads = max(1, width // 64)
    inner = max(width, int((size - _words(size) * width - 3 * depth * width**2) / (3 * depth * width)))
    config = LlamaConfig(
        vocab_size=_words(size), hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=pick_dtype(params.llm.dtype, device))
    network = network.to_empty(device=device).eval().requires_grad_(False)
    for tensor in [*network.parameters(), *network.buffers()]:
        tensor.fill_(0.01)
    return network


def _of_network(params: Params, network: Any, shape: tuple[int, int], device: Any) -> tuple[float, float, float, float]:
    """Seconds of a trained token, of a read one, and of a step of decoding of one row and of many."""
    import torch

    from pipeline.llms.load import LanguageModel
    from pipeline.vlm import add_lora

    embed = network.get_input_embeddings().weight
    batch, length = shape
    last = torch.arange(-ANSWER, 0, device=device)  # one by one, as training names them: a slice costs more

    def prompts(count: int, long: int) -> Any:
        return torch.rand(count, long, embed.shape[1], device=device).to(embed.dtype) / 10

    @torch.no_grad()
    def read(count: int, long: int) -> None:
        network(inputs_embeds=prompts(count, long), logits_to_keep=last)

    @torch.no_grad()
    def write(count: int) -> float:
        cache = network(inputs_embeds=prompts(count, 2), use_cache=True, logits_to_keep=1).cache
        token = torch.zeros(count, 1, dtype=torch.long, device=device)
        return _timed(lambda: network(token, cache=cache, use_cache=True), device, STEPS)

    found = _warmed(read, shape, device) / (batch * length), write(1), write(MANY)
    lora = add_lora(LanguageModel(network, None, None, 0), params.finetune.lora)

    def step(count: int, long: int) -> None:
        logits = network(inputs_embeds=prompts(count, long).requires_grad_(), logits_to_keep=last).logits
        logits.float().logsumexp(-1).sum().backward()

    trained = _warmed(step, shape, device) / (batch * length)
    lora.unload()
    return trained, *found


def _vision(params: Params, rows: dict[str, Rows], began: float) -> Vision:
    """What depends on the encoder and on the objectives."""
    import torch

    import pipeline.training.pretrain  # noqa: F401  all that pre-training imports
    from pipeline.devices import pick_device
    from pipeline.encoders.base import Encoder
    from pipeline.encoders.vision import load_vision_encoder

    _quiet()
    start, device, built = time.time() - began, pick_device(params.runtime.device), time.perf_counter()
    if not Encoder.of(params.vision).need().ok:
        load, encoded, decoded, stored = 0.0, 0.0, 0.0, dict[str, int]()
    else:
        encoder = load_vision_encoder(params.vision, params.runtime.device)
        load = time.perf_counter() - built
        encoded, decoded = _of_encoder(params, encoder)
        there = [name for name in rows if Run.of(params).manifest(name).is_file()]
        stored = {name: _stored(params, name, encoder) for name in there}
    width = tokens_per_picture(params)[1]
    square = torch.rand(2 * width, width, dtype=torch.float64)
    square = square.T @ square
    axes = _timed(lambda: torch.linalg.eigh(square), torch.device("cpu"))
    adapters = {name: _of_objective(params, rows, name, device) for name in params.run.adapters}
    return Vision(start, load, encoded, decoded, axes, adapters, _peak(), stored)


def _of_encoder(params: Params, encoder: Any) -> tuple[float, float]:
    """Seconds of encoding and of decoding a picture, made up here."""
    import io

    import torch
    from PIL import Image

    from pipeline.devices import pick_device
    from pipeline.encoders.base import Encoder

    device, picture = pick_device(params.runtime.device), io.BytesIO()
    noise = torch.randint(256, (40, 50, 3), dtype=torch.uint8).numpy()
    Image.fromarray(noise).resize((500, 400)).save(picture, "JPEG", quality=90)
    decoder = Encoder.of(params.vision).decoder(encoder.preprocess, device)
    loaded = decoder.load(picture.getvalue())
    batch = decoder.batch([loaded] * params.vision.batch, params.vision.batch)
    encoded = _timed(lambda: encoder.encode(batch), device) / params.vision.batch
    return encoded, _timed(lambda: decoder.load(picture.getvalue()), device, 4)


def _stored(params: Params, name: str, encoder: Any) -> int:
    """Pictures of a prepared data set whose image tokens need not be computed."""
    from pipeline.extraction.images import ImageShards

    work = ImageShards(params, name, encoder)
    there = [part for path, part in work.parts.items() if path.exists()]
    rest = [part for path, part in work.parts.items() if not path.exists()]
    kept = sum(work.donors.find(sha256) is not None for part in rest for sha256 in part["sha256"])
    return sum(map(len, there)) + kept


def _of_objective(params: Params, rows: dict[str, Rows], name: str, device: Any) -> Pretraining:
    """Of an adapter with its objective and solver, on random tokens and captions of the right length."""
    import torch

    from pipeline.adapters.module import build_adapter
    from pipeline.objectives.base import Means

    settings = params.pretrain_for(name)
    found: type[Objective] = components.find("objective", settings.objective.name)
    if found.needs_llm:
        return Pretraining(0.0, 0.0, 0.0)  # the LLM's passes are reckoned by `Language`
    pairs = _pairs(params, rows, settings.data, max(SAMPLE, settings.batch), device)
    objective = found(settings.objective, pairs, Means(params.seed, params.runtime.emd_threads))
    (_, d_in), width = tokens_per_picture(params), pairs.table.shape[1]
    adapter = build_adapter(params.kind_of(name), d_in, width, **params.adapter(name).architecture).to(device)
    batch = list(range(settings.batch))

    def step() -> None:
        objective.start(adapter.trained(pairs.tokens(batch)), batch).result().backward()

    step()  # which compiles the solver where that was not done yet
    captions = [pairs.captions[at][0] for at in range(OTHERS)]
    with torch.no_grad():
        held = _timed(lambda: objective.held_out(lambda some: adapter(pairs.tokens(some))), device) / len(pairs.val)
        tokens = adapter(pairs.tokens(batch[:OTHERS]))
        pair = _timed(lambda: objective.all_distances(tokens, captions), device) / (len(tokens) * OTHERS)
    return Pretraining(_timed(step, device), held, pair)


def _pairs(params: Params, rows: dict[str, Rows], data: list[str], count: int, device: Any) -> Pairs:
    """Made-up pictures with captions as long as those of the data sets, in their shares."""
    import torch

    from pipeline.objectives.pairs import Names, Pairs

    (length, d_in), width = tokens_per_picture(params), llm_shape(params)[1]
    table = torch.randn(2000, width, device=device) / 8
    tokens = torch.rand(count, length, d_in, device=device)
    ends = [round(count * sum(rows[one].train for one in data[: at + 1]) / max(1, sum(rows[one].train for one in data)))
            for at in range(len(data))]  # fmt: skip
    captions: list[list[list[int]]] = []
    names: list[Names] = []
    for one, end in zip(data, ends, strict=True):
        own, start = rows[one], len(captions)
        shape = (max(own.classes, end - start), max(1, round(own.texts)), max(1, round(own.tokens)))
        texts = torch.randint(len(table), shape).tolist()
        if own.classes:
            named = [text[0] for text in texts[: own.classes]]
            names.append(Names(named, {start + i: i % own.classes for i in range(end - start)}))
            texts = [[named[i % own.classes]] for i in range(end - start)]
        captions += texts[: end - start]
    held = list(range(min(SAMPLE, ends[0] or count)))
    words, positions = list(range(len(table))), list(range(count))
    return Pairs(lambda some: tokens[some], captions, table, words, positions, held, ends[0], names, [0])


def tokens_of(params: Params) -> int:
    """Image tokens that the LLM gets, of the adapter that gives most."""
    from pipeline.adapters.base import Architecture

    count = tokens_per_picture(params)[0]
    kinds = ((params.kind_of(name), params.adapter(name).architecture) for name in params.run.adapters)
    return max(Architecture.of(*one).tokens(count) for one in kinds)


def _warmed(work: Callable[[int, int], None], shape: tuple[int, int], device: Any) -> float:
    """Seconds of work on a batch [rows, tokens], which the first time fetches its memory: up to half as much again."""
    work(*shape)
    return _once(lambda: work(*shape), device)


def _once(work: Callable[[], Any], device: Any) -> float:
    import torch

    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _timed(work: Callable[[], Any], device: Any, times: int = 1) -> float:
    """Seconds of doing something; what is short is done again, so that its first time does not count."""
    first = _once(work, device)
    return first if first > LONG else sum(_once(work, device) for _ in range(times)) / times


def _peak() -> float:
    """Bytes that this process held at most."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def _quiet() -> None:
    """What libraries have to say is said when the stages run."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
