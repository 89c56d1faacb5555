"""Frozen language models: tokenizer, input embeddings, and the network, of any loader."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import LLM
from pipeline.devices import keep_freed_memory, pick_device, pick_dtype
from pipeline.errors import UserError
from pipeline.llms.base import Loader
from pipeline.llms.files import stateful_fault
from pipeline.llms.quantise import keep_gradients, load_nf4

# Before torch starts its threads: spinning OpenMP threads make a step many times slower beside another process.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@dataclass(frozen=True)
class LanguageModel:
    """A causal LM of Hugging Face's kind, its tokenizer, and how prompts are to be written for it."""

    network: Any
    tokenizer: Any
    system_prompt: str | None
    max_caption_tokens: int

    @property
    def width(self) -> int:
        """Size of an input embedding."""
        return int(self.network.get_input_embeddings().weight.shape[1])


def load_llm(params: LLM, device: str = "auto", *, expand: bool = True) -> LanguageModel:
    """The LLM that params.llm names: frozen, in eval mode, 4-bit where asked.

    `expand`: 4-bit weights are expanded once, as `load_nf4` has it; else every pass expands them again.
    Raises UserError naming what is missing when files cannot be found.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    keep_freed_memory()
    place = pick_device(device)
    dtype = pick_dtype(params.dtype, place)
    with _files(params) as (source, options):
        if params.quantization == "nf4":
            network = load_nf4(source, options, dtype, place, expand)
        else:
            network = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options).to(place)
        tokenizer = _tokenizer(params, source, options)
    _refuse_stateful(params, network)
    keep_gradients(network)
    network.eval().requires_grad_(False)
    return LanguageModel(network, tokenizer, params.system_prompt, params.max_caption_tokens)


def load_tokenizer(params: LLM) -> Any:
    """The LLM's own tokenizer; UserError when it has no chat template or no end-of-turn token."""
    with _files(params) as (source, options):
        return _tokenizer(params, source, options)


def _tokenizer(params: LLM, source: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if tokenizer.chat_template is None:
        raise UserError(f"llm.model {params.model}", "its tokenizer has no chat template", "take an instruct model")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"llm.model {params.model}",
            "its tokenizer names no end-of-turn token",
            "set eos_token in its tokenizer_config.json",
        )
    return tokenizer


def load_embedding(params: LLM) -> nn.Embedding:
    """The LLM's own input-embedding module, float32 and never quantised, without loading the rest of the model.

    The architecture is built on the meta device and only the embedding's tensor is read from its safetensors file.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with _files(params, tokenizer=False) as (source, options):
        config = AutoConfig.from_pretrained(source, **options)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        _refuse_stateful(params, network)
        embedding: nn.Embedding = network.get_input_embeddings()
        weight = _read_embedding(source, options, network)
        for name, buffer in embedding.named_buffers():  # such as Gemma's scale, which no file holds
            setattr(embedding, name, torch.zeros_like(buffer, device="cpu"))
        network._init_weights(embedding)  # fills them; the weight is still without memory
    embedding.weight = nn.Parameter(weight.float(), requires_grad=False)
    return embedding.eval()


@torch.no_grad()
def load_embedding_matrix(params: LLM) -> Tensor:
    """The whole vocabulary's input embeddings as the LLM's first layer gets them, float32 [V, D]."""
    embedding = load_embedding(params)
    rows: Tensor = embedding(torch.arange(embedding.num_embeddings))
    return rows


def context_length(params: LLM) -> int | None:
    """How many tokens the LLM can take at once; None where its configuration names no limit."""
    from transformers import AutoConfig

    with _files(params, tokenizer=False) as (source, options):
        return context_of(AutoConfig.from_pretrained(source, **options))


def context_of(config: Any) -> int | None:
    """The same, from a model's configuration."""
    text = config.get_text_config()
    lengths = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((int(length) for length in lengths if length), None)


def _refuse_stateful(params: LLM, network: Any) -> None:
    """Raises UserError for a network whose cache of a prompt can't be repeated for the rows of a batch."""
    from transformers import DynamicCache

    try:
        layers = DynamicCache(config=network.config.get_text_config()).layers
    except (AttributeError, KeyError):  # an architecture with a cache of its own
        layers = []
    if network._is_stateful or not all(hasattr(layer, "batch_repeat_interleave") for layer in layers):
        fault = stateful_fault(network.config.model_type)
        raise UserError(f"llm.model {params.model} cannot be loaded", fault.found, fault.remedy)


def _read_embedding(source: str, options: dict[str, Any], network: Any) -> Tensor:
    """The input embeddings out of a model's safetensors files, which may be split (with an index) or whole.

    The key is the module's name in the network. As from_pretrained has it, files may hold the base model alone, without
    its prefix, or prefix the base model further; and of tied weights the output layer's alone.
    """
    from safetensors import safe_open
    from transformers.utils import cached_file

    names = cached_file(source, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **options)
    whole = None if names else cached_file(source, "model.safetensors", **options)
    if names:
        places: dict[str, str] = json.loads(Path(names).read_text(encoding="utf-8"))["weight_map"]
    else:
        with safe_open(whole, framework="pt") as tensors:
            places = dict.fromkeys(tensors.keys(), "")
    embedding = network.get_input_embeddings()
    key = _embedding_key(network, set(places))
    with safe_open(whole or cached_file(source, places[key], **options), framework="pt") as tensors:
        weight: Tensor = tensors.get_tensor(key)
    if weight.shape != embedding.weight.shape:
        found, wanted = (" x ".join(map(str, tensor.shape)) for tensor in (weight, embedding.weight))
        raise ValueError(f"{key} is {found}, but config.json makes it {wanted}")
    return weight


def _embedding_key(network: Any, keys: set[str]) -> str:
    """Which of the keys of a model's files holds its input embeddings; ValueError when none does."""
    modules = {id(module): name for name, module in network.named_modules()}
    name = modules[id(network.get_input_embeddings())] + ".weight"
    bare = name.removeprefix(f"{network.base_model_prefix}.")
    for key in (name, bare, f"{network.base_model_prefix}.{name}"):
        if key in keys:
            return key
    longer = [key for key in keys if key.endswith(f".{bare}") or bare.endswith(f".{key}")]
    if len(longer) == 1:
        return longer[0]
    output = network.get_output_embeddings()
    tied = modules.get(id(output), "") + ".weight"
    if getattr(network.config.get_text_config(), "tie_word_embeddings", False) and tied in keys:
        return tied
    raise ValueError(f"no tensor {name} in its safetensors files")


@contextmanager
def _files(params: LLM, *, tokenizer: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """What from_pretrained takes: a folder or hub id, and its options; what is raised inside becomes one line.

    Raises UserError when files are missing or damaged.
    """
    loader = Loader.of(params)
    with loader.loading():
        source, revision = loader.source(tokenizer=tokenizer)
        # Never None: transformers would ask on the terminal whether to run a model's own code.
        yield source, {"revision": revision, "trust_remote_code": False}
