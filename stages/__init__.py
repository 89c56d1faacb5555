"""The command line: one thin file per stage of dvc.yaml. Parse, call `pipeline`, write the declared outputs.

Nothing in `pipeline` imports this package. Heavy imports (torch, transformers, matplotlib) stand inside the command
functions, so that `terraalign --help` and a mistake in params.yaml answer at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.files import atomically, check_writable

if TYPE_CHECKING:
    from pipeline.params import Params

__all__ = ["timed"]


@contextmanager
def timed(params: Params, stage: str) -> Iterator[None]:
    """Measure a stage; on success write data/<profile>/seconds/<stage>.json, e.g. seconds/pretrain@mlp.json.

    `stage` is the name in dvc.yaml. A stage that raises writes nothing. The file is not a DVC output: a timing
    differs on every run and must not make the stages after it stale. Raises UserError, before the work, when the
    profile's folder can't be written to.
    """
    path = Path("data") / params.profile / "seconds" / f"{stage}.json"
    check_writable(path.parent)
    began = time.monotonic()
    yield
    with atomically(path) as file:
        file.write((json.dumps({"seconds": round(time.monotonic() - began, 3)}) + "\n").encode())
