"""Frozen language models: tokenizer, input embeddings, and the network; the only 4-bit loading code."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from pipeline.backbones.devices import keep_freed_memory, pick_device, pick_dtype
from pipeline.errors import UserError
from pipeline.params import LLM

# Before torch starts its threads: spinning OpenMP threads make a step many times slower beside another process.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# bitsandbytes decorates functions that are not used here with torch.compile, whose compiler takes seconds to import.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
MODELS = Path("data/models")


@dataclass(frozen=True)
class LanguageModel:
    """A causal LM of Hugging Face's kind, its tokenizer, and how prompts are to be written for it."""

    network: Any
    tokenizer: Any
    system_prompt: str | None

    @property
    def width(self) -> int:
        """Size of an input embedding."""
        return int(self.network.get_input_embeddings().weight.shape[1])


def load_llm(params: LLM, device: str = "auto", *, for_answers: bool = False) -> LanguageModel:
    """The LLM that params.llm names: frozen, in eval mode, 4-bit where asked.

    `for_answers`: on a CPU, 4-bit weights are expanded once, to the very values they stand for, where they fit into
    half of the free memory; else every generated token expands them again.
    Raises UserError naming what is missing when files cannot be found.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    keep_freed_memory()
    place = pick_device(device)
    dtype = pick_dtype(params.dtype, place)
    source, revision = _source(params)
    with _FilesOf(params):
        if params.quantization == "nf4":
            network = _load_nf4(source, revision, dtype, place)
        else:
            network = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, revision=revision).to(place)
    if for_answers and params.quantization == "nf4" and _fits_dense(network, place, dtype):
        network = network.dequantize()
    _keep_gradients(network)
    network.eval().requires_grad_(False)
    return LanguageModel(network, load_tokenizer(params), params.system_prompt)


def load_tokenizer(params: LLM) -> Any:
    """The LLM's own tokenizer."""
    from transformers import AutoTokenizer

    source, revision = _source(params)
    with _FilesOf(params):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    if tokenizer.eos_token_id is None or tokenizer.chat_template is None:
        raise UserError(f"llm.model {params.model}: its tokenizer has no chat template; take an instruct model")
    return tokenizer


def load_embedding(params: LLM) -> nn.Embedding:
    """The LLM's own input-embedding module, float32 and never quantised, without loading the rest of the model.

    The architecture is built on the meta device and only the embedding's tensor is read from its safetensors file.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source, revision = _source(params)
    with _FilesOf(params):
        config = AutoConfig.from_pretrained(source, revision=revision)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
        embedding: nn.Embedding = network.get_input_embeddings()
        key = next(name for name, module in network.named_modules() if module is embedding) + ".weight"
        weight = _read_tensor(source, revision, key)
    embedding.weight = nn.Parameter(weight.float(), requires_grad=False)
    if any(buffer.is_meta for buffer in embedding.buffers()):
        raise UserError(f"llm.model {params.model}: its embedding module keeps more than its weight; not supported yet")
    return embedding.eval()


def load_embedding_matrix(params: LLM) -> Tensor:
    """The whole vocabulary's input embeddings, float32 [V, D]."""
    return load_embedding(params).weight.detach()


def _read_tensor(source: str, revision: str | None, key: str) -> Tensor:
    """One tensor out of a model's safetensors files, which may be split (with an index) or whole."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    optional = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(source, "model.safetensors.index.json", revision=revision, **optional)
    name = json.loads(Path(index).read_text())["weight_map"][key] if index else "model.safetensors"
    with safe_open(cached_file(source, name, revision=revision), framework="pt") as tensors:
        return tensors.get_tensor(key)


def _source(params: LLM) -> tuple[str, str | None]:
    """What from_pretrained takes: a folder or hub id, and the revision."""
    if params.loader == "gguf":
        return str(_dequantised(params.model)), None
    return params.model, params.revision


def _dequantised(model: str) -> Path:
    """A GGUF file as a safetensors folder below data/models, converted once.

    Converting takes 16 s; and transformers refuses a bitsandbytes configuration beside a GGUF file.
    """
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = _gguf_file(model)
    with file.open("rb") as content:
        folder = MODELS / f"{file.stem}-{hashlib.file_digest(content, 'sha256').hexdigest()[:16]}"
    if folder.exists():
        return folder
    options = {"gguf_file": file.name}
    # transformers parses the file three times, 4 s each; it looks the reader up at every call.
    with mock.patch("gguf.GGUFReader", functools.cache(gguf.GGUFReader)):
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **options)
        network = AutoModelForCausalLM.from_pretrained(
            str(file.parent), **options, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    network.config.quantization_config = None
    _save_whole(folder, network, tokenizer)
    return folder


def _gguf_file(model: str) -> Path:
    """A .gguf file, given as such or as the installed package that holds it (found without importing it)."""
    if model.endswith(".gguf"):
        path = Path(model)
        if path.is_file():
            return path
        raise UserError(f"llm.model {model}: no such file")
    spec = importlib.util.find_spec(model) if model.isidentifier() else None
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if len(files) != 1:
        raise UserError(
            f"llm.model {model}: no installed package with one .gguf file; `pip install {model.replace('_', '-')}`"
        )
    return files[0]


def _load_nf4(source: str, revision: str | None, dtype: torch.dtype, place: torch.device) -> Any:
    """QLoRA's quantisation (Dettmers et al. 2023): 4-bit NormalFloat, double quantisation.

    A model that was converted into data/models is quantised once and kept beside it: a CPU starts 1 to 2 s earlier.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": place}}
    converted = Path(source).parent == MODELS
    quantised = Path(f"{source}-nf4-{str(dtype).removeprefix('torch.')}")
    if converted and quantised.exists():
        return AutoModelForCausalLM.from_pretrained(quantised, **options)
    network = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, revision=revision, **options)
    if converted:  # other folders are not ours to write beside
        _save_whole(quantised, network)
    return network


def _fits_dense(network: nn.Module, place: torch.device, dtype: torch.dtype) -> bool:
    """Whether a CPU has twice the memory free that a 4-bit model needs when expanded (two weights lie in a byte)."""
    import psutil

    size = sum(2 * p.numel() if p.dtype == torch.uint8 else p.numel() for p in network.parameters()) * dtype.itemsize
    return place.type == "cpu" and 2 * size < psutil.virtual_memory().available


def _save_whole(folder: Path, *parts: Any) -> None:
    """Save a model and its tokenizer under a name that appears when all is written."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    for part in parts:
        part.save_pretrained(temporary)
    try:
        temporary.rename(folder)
    except OSError:  # another process was faster; its folder is the same
        shutil.rmtree(temporary)


def _keep_gradients(network: nn.Module) -> None:
    """Stop bitsandbytes from repacking its layers for CPU inference: repacked ones give no gradients, silently."""
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


class _FilesOf:
    """Turns any failure to find a model's files into one line."""

    def __init__(self, params: LLM):
        self.model = params.model

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, OSError | ValueError):
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UserError(
                f"llm.model {self.model} cannot be loaded: {reason}; `terraalign doctor` says how"
            ) from None
