"""This machine: its GPU, and whether the model hub can be reached."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from functools import cache


class Hub:
    """One HEAD request to the model hub, started at once and given three seconds: it can be late, it cannot hang."""

    def __init__(self, seconds: float = 3.0) -> None:
        self.seconds, self.reached = seconds, False
        self.offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}
        self.thread = threading.Thread(target=self.probe, daemon=True)
        if not self.offline:
            self.thread.start()

    def probe(self) -> None:
        from huggingface_hub import constants

        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            with urllib.request.urlopen(request, timeout=self.seconds):
                self.reached = True
        except urllib.error.HTTPError:
            self.reached = True  # it answers, if not with a page
        except (OSError, ValueError):
            self.reached = False

    def answer(self) -> str:
        """One line about the hub."""
        if self.offline:
            return "hub: switched off by HF_HUB_OFFLINE; only local files are used"
        self.thread.join(self.seconds)
        return "hub: reachable" if self.reached else "hub: not reachable (offline); only local files are used"


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
