"""What an interrupted run goes on from, and what runs share: a state under the hash of all that decides it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.files import atomically
from pipeline.runs import Run
from pipeline.training.code import digest_of


@dataclass
class Checkpoint:
    """Where a run is kept while it is under way, or what runs share; `key` is a hash of all that decides it."""

    path: Path
    key: str

    @classmethod
    def of(cls, run: Run, stage: str, decides: Sequence[object], files: Sequence[Path], code: str) -> Checkpoint:
        """The checkpoint of a stage below data/<profile>/checkpoints; outside DVC's outputs, which a rerun deletes.

        `decides` are values and `files` inputs that decide the run's course; `code` is the module that makes it, which
        decides it with all that it imports.
        """
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
        text = json.dumps([*map(str, decides), *digests, digest_of(code)])
        return cls(run.checkpoint(stage), hashlib.sha256(text.encode()).hexdigest())

    def save(self, state: dict[str, Any]) -> None:
        with atomically(self.path) as file:
            torch.save({"key": self.key, **state}, file)

    def load(self) -> dict[str, Any] | None:
        """The state saved by an interrupted run of exactly this key; anything else is left aside, and said."""
        if not self.path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, weights_only=True)
        except Exception as error:  # torch raises half a dozen kinds for a damaged file
            print(f"{self.path}: not readable ({type(error).__name__}); starting afresh", file=sys.stderr)
            return None
        if state["key"] != self.key:
            print(f"{self.path}: of a run with other parameters or inputs; starting afresh", file=sys.stderr)
            return None
        return state

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
