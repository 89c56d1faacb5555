"""This machine: its GPU."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache


@cache
def cuda(device: str) -> tuple[str, int]:
    """Name and free bytes of the GPU; torch (seconds to import) is asked only where the driver sees one."""
    if device == "cpu" or not shutil.which("nvidia-smi"):
        return "", 0
    query = ["nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=3, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "", 0
    line = next(iter(done.stdout.splitlines()), "") if done.returncode == 0 else ""
    name, comma, free = line.rpartition(",")
    return (name.strip(), int(free) * 2**20) if comma and free.strip().isdigit() and _torch_has_cuda() else ("", 0)


def _torch_has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
