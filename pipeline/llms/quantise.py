"""Quantised weights: NF4, the only 4-bit loading code, and GGUF's, which are expanded."""

from __future__ import annotations

import functools
import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.files import atomic_folder
from pipeline.runs import MODELS

# bitsandbytes decorates functions that are not used here with torch.compile, whose compiler takes seconds to import.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def dequantised(file: Path) -> Path:
    """A GGUF file as a safetensors folder below data/models, converted once.

    Converting takes 16 s; and transformers refuses a bitsandbytes configuration beside a GGUF file.
    """
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with file.open("rb") as content:
        folder = MODELS / f"{file.stem}-{hashlib.file_digest(content, 'sha256').hexdigest()[:16]}"
    if folder.exists():
        return folder
    options = {"gguf_file": file.name}
    reader = gguf.GGUFReader
    vars(gguf)["GGUFReader"] = functools.cache(reader)  # transformers parses the file three times, 4 s each
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **options)
        network = AutoModelForCausalLM.from_pretrained(
            str(file.parent), **options, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    finally:
        vars(gguf)["GGUFReader"] = reader
    network.config.quantization_config = None
    _save_whole(folder, network, tokenizer)
    return folder


def load_nf4(source: str, options: dict[str, Any], dtype: torch.dtype, place: torch.device) -> Any:
    """QLoRA's quantisation (Dettmers et al. 2023): 4-bit NormalFloat, double quantisation.

    A model that was converted into data/models is quantised once and kept beside it: a CPU starts 1 to 2 s earlier.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    options = options | {"dtype": dtype, "device_map": {"": place}}
    converted = Path(source).parent == MODELS
    quantised = Path(f"{source}-nf4-{str(dtype).removeprefix('torch.')}")
    if converted and quantised.exists():
        return AutoModelForCausalLM.from_pretrained(quantised, **options)
    network = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, **options)
    if converted:  # other folders are not ours to write beside
        _save_whole(quantised, network)
    return network


def fits_dense(network: nn.Module, place: torch.device, dtype: torch.dtype) -> bool:
    """Whether a CPU has twice the memory free that a 4-bit model needs when expanded (two weights lie in a byte)."""
    import psutil

    size = sum(2 * p.numel() if p.dtype == torch.uint8 else p.numel() for p in network.parameters()) * dtype.itemsize
    return place.type == "cpu" and 2 * size < psutil.virtual_memory().available


def _save_whole(folder: Path, *parts: Any) -> None:
    """Save a model and its tokenizer under a name that appears when all is written."""
    with suppress(FileExistsError), atomic_folder(folder) as temporary:  # of a faster process: the same files
        for part in parts:
            part.save_pretrained(temporary)


def keep_gradients(network: nn.Module) -> None:
    """Stop bitsandbytes from repacking its layers for CPU inference: repacked ones give no gradients, silently."""
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
