"""Quantised weights: NF4, the only 4-bit loading code, and GGUF's, which are expanded."""

from __future__ import annotations

import functools
import hashlib
import os
from contextlib import suppress
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.files import atomic_folder
from pipeline.llms.gguf_header import check_header
from pipeline.runs import MODELS

# bitsandbytes decorates functions that are not used here with torch.compile, whose compiler takes seconds to import.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# On processors with AVX-512 and bfloat16 it asks a hub for a kernel as it is imported, and warns that there is none.
getLogger("bitsandbytes.backends.cpu.ops").setLevel(ERROR)


def dequantised(file: Path) -> Path:
    """A GGUF file as a safetensors folder below data/models, converted once.

    Converting takes 16 s; and transformers refuses a bitsandbytes configuration beside a GGUF file.
    Raises Damaged when the file is not one, or not whole.
    """
    with file.open("rb") as content:
        folder = MODELS / f"{file.stem}-{hashlib.file_digest(content, 'sha256').hexdigest()[:16]}"
    if folder.exists():
        return folder
    check_header(file)
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils
    from transformers.utils import logging

    options = {"gguf_file": file.name}
    logging.disable_progress_bar()
    vars(modeling_gguf_pytorch_utils)["tqdm"] = logging.tqdm  # its own bar, which is not switched off with the others
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


def load_nf4(source: str, options: dict[str, Any], dtype: torch.dtype, place: torch.device, expand: bool) -> Any:
    """QLoRA's quantisation (Dettmers et al. 2023): 4-bit NormalFloat, double quantisation.

    `expand`: on a CPU, 4-bit weights are expanded once, to the very values they stand for, where that takes no more
    than half of the free memory. A model that was converted into data/models is kept beside it as it comes out: a CPU
    starts 1 to 2 s earlier with what is quantised, and needs no bitsandbytes for what is expanded.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    converted = Path(source).parent == MODELS  # other folders are not ours to write beside
    quantised = Path(f"{source}-nf4-{str(dtype).removeprefix('torch.')}")
    expanded = Path(f"{quantised}-expanded")
    options = options | {"dtype": dtype, "device_map": {"": place}}
    if converted and expand and expanded.exists() and _fits(_bytes_of(expanded), place):
        return AutoModelForCausalLM.from_pretrained(expanded, **options)
    if converted and quantised.exists():
        network = AutoModelForCausalLM.from_pretrained(quantised, **options)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        network = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, **options)
    is_expanded = expand and _fits(dense_bytes(network, dtype), place)
    if is_expanded:
        logging.set_verbosity_error()  # that it does what it is asked to
        network = network.dequantize(dtype)
    folder = expanded if is_expanded else quantised
    if converted and not folder.exists():
        _save_whole(folder, network)
    return network


def dense_bytes(network: nn.Module, dtype: torch.dtype) -> int:
    """What a 4-bit model takes when it is expanded: two weights lie in a byte."""
    return sum(2 * p.numel() if p.dtype == torch.uint8 else p.numel() for p in network.parameters()) * dtype.itemsize


def _fits(size: int, place: torch.device) -> bool:
    """Whether a CPU has twice so many bytes of memory free."""
    import psutil

    return place.type == "cpu" and 2 * size < psutil.virtual_memory().available


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


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
