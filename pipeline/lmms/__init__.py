"""A run as a model of lmms-eval, under the name terraalign: `pip install lmms_eval`, then `--model terraalign`."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval asks the entry points of the group lmms_eval.models for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("terraalign", simple_class_path="pipeline.lmms.model.TerraAlign")
