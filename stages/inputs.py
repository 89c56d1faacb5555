"""Stage inputs."""

from __future__ import annotations

from pipeline.config import load_params
from stages import timed


def inputs() -> None:
    """Note which features pre-training and each recipe read.

    Writes data/<profile>/inputs/<recipe>.json, digests of the manifests of its data sets: when one of several data
    sets changes, only those stages that read it run again.
    """
    params = load_params()
    from pipeline.inputs import write_inputs

    with timed(params, "inputs"):
        write_inputs(params)
