"""Networks of timm: their features as image tokens, and their checkpoints, with or without a head."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipeline.errors import UserError


class TimmTokens:
    """Image tokens of a timm network, [B, N, D], by the layout that timm declares for it.

    timm's networks give a map [B, D, H, W], a map [B, H, W, D] (`output_fmt`) or tokens [B, prefix + H * W, D]. What
    comes is held against the width and the grid that the network declares; of what does not fit, `unfit` makes the
    UserError that is raised.
    """

    def __init__(self, network: Any, unfit: Callable[[str], UserError]):
        self.network, self.unfit, self.width = network, unfit, network.num_features
        stages = list(getattr(network, "feature_info", None) or [])
        self.reduction = dict(stages[-1]).get("reduction") if stages else None
        own = 1 if getattr(network, "cls_token", None) is not None else 0  # VOLO has one and declares nothing
        self.prefix = getattr(network, "num_prefix_tokens", own)

    def __call__(self, x: Tensor) -> Tensor:
        y = self.network.forward_features(x)
        if not isinstance(y, Tensor):
            kind = f"{len(y)} of them" if isinstance(y, list | tuple) else type(y).__name__
            raise self.unfit(f"gives no single map or row of image tokens, but {kind}")
        if y.ndim == 3:
            return self._row(y, x)
        last = getattr(self.network, "output_fmt", "NCHW") == "NHWC"
        if y.ndim != 4 or y.shape[-1 if last else 1] != self.width:
            raise self.unfit(f"gives features {_by(y)}, where {self.width} channels were due")
        return y.flatten(1, 2) if last else y.flatten(2).transpose(1, 2)

    def _row(self, y: Tensor, x: Tensor) -> Tensor:
        """Tokens [B, prefix + H * W, D] without the prefix; x [B, 3, H, W] is what they are of."""
        if not self.reduction:
            raise self.unfit("does not say how large its grid of image tokens is")
        height, width = (math.ceil(side / self.reduction) for side in x.shape[-2:])
        if y.shape[1:] != (self.prefix + height * width, self.width):
            wanted = f"{self.prefix} and {height} x {width} tokens of {self.width}"
            raise self.unfit(f"gives features {_by(y)}, and says it has {wanted}")
        return y[:, self.prefix :]


def _by(tokens: Tensor) -> str:
    """The shape of one picture's features."""
    return " x ".join(map(str, tokens.shape[1:]))


def load_checkpoint(network: Any, path: Path) -> None:
    """A checkpoint, with or without its classification head, into a network that has none: wholly, or ValueError."""
    from timm.models import load_checkpoint as load_jax
    from timm.models import load_state_dict

    if path.suffix in (".npz", ".npy"):
        load_jax(network, str(path))  # which the network itself knows to read
        return
    found = load_state_dict(str(path), weights_only=True)
    fault = _misfit(network, weights := _without_head(network, found))
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if fault and convert is not None:  # it may be a file of the architecture's authors
        with suppress(Exception):  # the converters expect their own and raise anything about others
            weights = _without_head(network, convert(found, network))
    if fault and _misfit(network, weights):
        raise ValueError(f"its weights are not this model's: {fault}")
    network.load_state_dict(weights)


def _without_head(network: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    heads = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    own = network.state_dict()
    return {key: value for key, value in state.items() if key in own or key.rpartition(".")[0] not in heads}


def _misfit(network: nn.Module, state: Mapping[str, Any]) -> str | None:
    """The first difference between a network's weights and a file's, or None."""
    own = network.state_dict()
    for key, tensor in own.items():
        if key not in state:
            return f"{key} is missing"
        if not isinstance(state[key], Tensor) or state[key].shape != tensor.shape:
            shape = list(state[key].shape) if isinstance(state[key], Tensor) else []
            return f"{key} is {shape} instead of {list(tensor.shape)}"
    return next((f"{key} has no place in it" for key in state if key not in own), None)
