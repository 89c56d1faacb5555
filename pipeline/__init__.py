"""TerraAlign: cached image tokens, adapters aligned by Earth Mover's Distance, QLoRA fine-tuning.

For programs: `from pipeline import Model, Features`, as docs/python.md shows.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.answers.model import Model
    from pipeline.store.features import Features

__all__ = ["Features", "Model"]
_MODULES = dict(Model="pipeline.answers.model", Features="pipeline.store.features")  # noqa: C408


def __getattr__(name: str) -> Any:
    """Loaded when they are asked for: `import pipeline` alone is quick, and no stage depends on either."""
    if name not in _MODULES:
        raise AttributeError("module 'pipeline' has no attribute " + name)
    return getattr(import_module(_MODULES[name]), name)
