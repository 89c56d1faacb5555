"""The command line: one thin file per stage of dvc.yaml. Parse, call `pipeline`, write the declared outputs.

Nothing in `pipeline` imports this package. Heavy imports (torch, transformers, matplotlib) stand inside the command
functions, so that `terraalign --help` and a mistake in params.yaml answer at once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from configparser import ConfigParser
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING


def _own_pipeline() -> None:
    """Take the `pipeline` beside this package, whatever else of that name comes before it on Python's path.

    The name is a common one, and PYTHONPATH goes before what is installed.
    """
    file = Path(__file__).parents[1] / "pipeline" / "__init__.py"
    there = sys.modules.get("pipeline")
    if there is None:
        spec = importlib.util.spec_from_file_location("pipeline", file, submodule_search_locations=[str(file.parent)])
        assert spec is not None and spec.loader is not None, "a path that ends in .py always has both"
        sys.modules["pipeline"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    elif not Path(str(there.__file__)).samefile(file):
        raise SystemExit(f"error: {there.__file__} is in the way of {file}; take its folder off PYTHONPATH")


_own_pipeline()

if TYPE_CHECKING:
    from pipeline.config import Params

__all__ = ["DATA", "RECIPE", "timed"]

TOLD = "TERRAALIGN_TOLD"  # set where `try` has said what `prepare` would say
DATA = "A data set of params.yaml, by its name under data."
RECIPE = "A recipe of params.yaml, by its name under finetune.recipes."


def _check_data_folder() -> None:
    """Before the work: what DVC would say after it, of results behind a link."""
    from pipeline.errors import UserError
    from pipeline.runs import RESULTS

    path = RESULTS
    if not (os.environ.get("DVC_ROOT") and path.is_symlink()):
        return
    config = ConfigParser()
    config.read([".dvc/config", ".dvc/config.local"])
    if not config.getboolean("core", "no_scm", fallback=False):
        raise UserError(
            "data",
            (
                f"a link to {path.resolve()}, and in a git repository DVC refuses results behind a link; link "
                "data/store instead, where the features are"
            ),
            (
                "for all results mount the disk at data (mount --bind), or run `dvc config --local core.no_scm "
                "true`, which costs `dvc exp`"
            ),
        )


@contextmanager
def timed(params: Params, stage: str) -> Iterator[dict[str, float]]:
    """Measure a stage; on success write data/<profile>/seconds/<stage>.json, e.g. seconds/pretrain@mlp.json.

    `stage` is the name in dvc.yaml. A stage that raises writes nothing. The file is not a DVC output: a timing
    differs on every run and must not make the stages after it stale. What the stage puts into the dictionary stands
    there too, beside its peak memory in bytes. Raises UserError, before the work, when the profile's folder can't be
    written to.
    """
    from pipeline.files import atomically, check_writable
    from pipeline.runs import Run

    _check_data_folder()
    path = Run.of(params).seconds(stage)
    check_writable(path.parent)
    began, also = time.monotonic(), dict[str, float]()
    yield also
    measured = {"seconds": round(time.monotonic() - began, 3), **also, **_peak_memory()}
    with atomically(path) as file:
        file.write((json.dumps(measured) + "\n").encode())


def _peak_memory() -> dict[str, float]:
    """What this process, and PyTorch on a GPU, held at most, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"peak_bytes": float(peak if sys.platform == "darwin" else 1024 * peak)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["peak_gpu_bytes"] = float(torch.cuda.max_memory_allocated())
    return found
