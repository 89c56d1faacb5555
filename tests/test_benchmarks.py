"""The script that measures a GPU runs on machines where nobody can repair it: it has to work at the first attempt."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"


def test_gpu_script_runs_every_step_tiny_on_a_cpu(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(SCRIPT), "--tiny"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for figure in ("extract_images captions, decoder torchvision", "solver, ", "constant token; constant set of 255",
                   "pretrain mlp, steps", "fine-tune mlp, activations recomputed", "evaluate, the stages", "pca, ",
                   "answers, captions"):  # fmt: skip
        assert figure in done.stdout
    assert "FAILED" not in done.stdout
