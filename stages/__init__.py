"""The command line: one thin file per stage of dvc.yaml. Parse, call `pipeline`, write the declared outputs.

Nothing in `pipeline` imports this package. Heavy imports (torch, transformers, matplotlib) stand inside the command
functions, so that `terraalign --help` and a mistake in params.yaml answer at once.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator
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
    from pipeline.params import Params

__all__ = ["timed"]


@contextmanager
def timed(params: Params, stage: str) -> Iterator[None]:
    """Measure a stage; on success write data/<profile>/seconds/<stage>.json, e.g. seconds/pretrain@mlp.json.

    `stage` is the name in dvc.yaml. A stage that raises writes nothing. The file is not a DVC output: a timing
    differs on every run and must not make the stages after it stale.
    """
    began = time.monotonic()
    yield
    path = Path("data") / params.profile / "seconds" / f"{stage}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"seconds": round(time.monotonic() - began, 3)}) + "\n", encoding="utf-8")
    temporary.replace(path)
