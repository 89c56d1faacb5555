"""Where and in which precision models compute."""

from __future__ import annotations

import ctypes
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.errors import UserError

CPU = torch.device("cpu")


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning every large tensor to the system and faulting it in again.

    On a 2-core CPU this made EfficientNet-Lite0 2 to 3 times faster. It does nothing on other systems.
    """
    if sys.platform == "linux":
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from musl
        if mallopt is not None:
            mallopt(mmap_max, 0)
            mallopt(trim_threshold, 2**31 - 1)
            mallopt(top_pad, 64 << 20)


def pick_device(wanted: str) -> torch.device:
    """runtime.device; `auto` takes a CUDA GPU when there is one."""
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"runtime.device {wanted}", "torch finds no CUDA GPU", "set it to auto or cpu")
    if wanted != "auto":
        return torch.device(wanted)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; from the CPU to a GPU through pinned memory, so that the caller does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def fast_products() -> None:
    """From now on a GPU multiplies float32 matrices in TF32 (10 bits of mantissa, sums in float32): for training."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products in full float32 in spite of `fast_products`; backward passes are outside."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def mixed_precision(device: torch.device) -> torch.autocast:
    """Matrix products in bfloat16 for what is trained, on a CPU that multiplies in it; on a GPU see `fast_products`.

    Weights, gradients and optimizer stay float32 (Micikevicius et al. 2018, Mixed Precision Training).
    """
    native = (
        device.type == "cpu" and torch.backends.mkldnn.is_available() and pick_dtype("auto", device) == torch.bfloat16
    )
    return torch.autocast("cpu", torch.bfloat16, enabled=native)


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies in it; elsewhere it is emulated, 4 to 25 times slower.

    ATEN_CPU_CAPABILITY=avx2 has a newer x86 processor take float32, as one without AVX-512 does.
    """
    if wanted != "auto":
        return torch.float32 if wanted == "float32" else torch.bfloat16
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities, used = torch.cpu.get_capabilities(), torch.backends.cpu.get_cpu_capability()
        native = capabilities.get("bf16", False) or (
            used == "AVX512" and any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
        )
    return torch.bfloat16 if native else torch.float32


def hash_weights(module: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
