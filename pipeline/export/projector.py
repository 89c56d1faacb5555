"""An adapter as LLaVA's projector (Liu et al. 2023b): linear, an activation, linear; both as wide as the LLM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.adapters.blocks import Positions
from pipeline.adapters.module import Adapter
from pipeline.errors import UserError, UserErrors


@dataclass(frozen=True)
class Projector:
    """fc2(act(fc1(x))); `act` as transformers names it."""

    first: tuple[Tensor, Tensor]  # weight [D, d_in] and bias [D]
    act: str
    second: tuple[Tensor, Tensor]  # [D, D] and [D]


@torch.no_grad()
def projector_of(adapter: Adapter, name: str, count: int) -> Projector:
    """Of an adapter of `count` image tokens.

    A hidden layer that is narrower than the LLM is filled up with zeros, which GELU leaves zero; a bias that is the
    same for all tokens is added to the others. Raises UserErrors naming each key that LLaVA has no room for.
    """
    if faults := list(_refusals(adapter, name, count)):
        raise UserErrors(faults)
    bias, wide = adapter.out.bias.clone(), adapter.out.out_features
    if adapter.offset is not None:
        bias += adapter.offset[0]
    if adapter.config["name"] == "linear":
        return Projector((adapter.out.weight, torch.zeros(wide)), "linear", (torch.eye(wide), bias))
    layers = list(adapter.body.children())
    fc1 = layers[0]
    assert isinstance(fc1, nn.Linear) and isinstance(layers[-1], nn.GELU), "as adapters/mlp.py builds it"
    hidden, first_bias = fc1.out_features, fc1.bias.clone()
    for part in layers[1:-1]:
        assert isinstance(part, Positions)
        first_bias += part.bias[0]
    first, second = torch.zeros(wide, fc1.in_features), torch.zeros(wide, wide)
    first[:hidden], second[:, :hidden] = fc1.weight, adapter.out.weight
    padded = torch.zeros(wide)
    padded[:hidden] = first_bias
    return Projector((first, padded), "gelu", (second, bias))


def _refusals(adapter: Adapter, name: str, count: int) -> Iterator[UserError]:
    """All that LLaVA's projector has no room for."""
    kind, key, start = adapter.config["name"], f"adapters.{name}.architecture", f"adapters.{name}.pretrain.objective"
    if kind not in ("linear", "mlp"):
        yield UserError(
            f"{key}.kind is {kind}", "LLaVA's projector is a linear or an mlp adapter", "train one of these"
        )
    if adapter.pool is not None and adapter.pool**2 != count:
        why = f"LLaVA averages no tokens, and the encoder gives {count}"
        yield UserError(f"{key}.pool is {adapter.pool}", why, "leave pool out and train anew")
    if adapter.mixture is not None:
        yield UserError(f"{start}.tokens is mixture", "LLaVA's projector mixes no words", "take `tokens: free`")
    if adapter.skip is not None:
        why = "it adds a map of the mean of all tokens, and LLaVA's projector sees one at a time"
        yield UserError(f"{start}.start is closed_form", why, "take `start: random`")
    if adapter.offset is not None and _differ(adapter.offset):
        why = "it adds another vector to each place, and LLaVA's projector treats all places alike"
        yield UserError(f"{start}.start is constant_set", why, "take `start: random`")
    if kind == "mlp":
        yield from _of_mlp(list(adapter.body.children()), key, adapter.out.out_features)


def _of_mlp(layers: list[nn.Module], key: str, wide: int) -> Iterator[UserError]:
    hidden = next(layer.out_features for layer in layers if isinstance(layer, nn.Linear))
    if hidden > wide:
        why = f"LLaVA's projector has as many units as the LLM is wide, {wide}"
        yield UserError(f"{key}.hidden is {hidden}", why, f"set it to {wide} or less and train anew")
    for part in layers:
        if isinstance(part, Positions) and _differ(part.bias):
            yield UserError(f"{key}.positions is {len(part.bias)}", "LLaVA's projector knows no places", "leave it out")


def _differ(rows: Tensor) -> bool:
    return not bool((rows == rows[0]).all())
