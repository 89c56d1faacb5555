"""An adapter as LLaVA's projector (Liu et al. 2023b): linear, an activation, linear; both as wide as the LLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.adapters.blocks import Positions
from pipeline.adapters.module import Adapter
from pipeline.errors import UserError


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
    same for all tokens is added to the others. Raises UserError naming the key that LLaVA has no room for.
    """
    kind, key = adapter.config["name"], f"adapters.{name}.architecture"
    if kind not in ("linear", "mlp"):
        raise UserError(
            f"{key}.kind is {kind}", "LLaVA's projector is a linear or an mlp adapter", "train one of these"
        )
    start = f"adapters.{name}.pretrain.objective"
    if adapter.pool is not None and adapter.pool**2 != count:
        why = f"LLaVA averages no tokens, and the encoder gives {count}"
        raise UserError(f"{key}.pool is {adapter.pool}", why, "leave pool out and train anew")
    if adapter.mixture is not None:
        raise UserError(f"{start}.tokens is mixture", "LLaVA's projector mixes no words", "take `tokens: free`")
    if adapter.skip is not None:
        why = "it adds a map of the mean of all tokens, and LLaVA's projector sees one at a time"
        raise UserError(f"{start}.start is closed_form", why, "take `start: random`")
    bias = adapter.out.bias.clone()
    if adapter.offset is not None:
        why = "it adds another vector to each place, and LLaVA's projector treats all places alike"
        bias += _same_for_all(adapter.offset, UserError(f"{start}.start is constant_set", why, "take `start: random`"))
    wide = adapter.out.out_features
    if kind == "linear":
        return Projector((adapter.out.weight, torch.zeros(wide)), "linear", (torch.eye(wide), bias))
    layers = list(adapter.body.children())
    fc1 = layers[0]
    assert isinstance(fc1, nn.Linear) and isinstance(layers[-1], nn.GELU), "as adapters/mlp.py builds it"
    hidden = fc1.out_features
    if hidden > wide:
        why = f"LLaVA's projector has as many units as the LLM is wide, {wide}"
        raise UserError(f"{key}.hidden is {hidden}", why, f"set it to {wide} or less and train anew")
    first_bias = fc1.bias.clone()
    for part in layers[1:-1]:
        assert isinstance(part, Positions)
        why = "LLaVA's projector knows no places"
        first_bias += _same_for_all(part.bias, UserError(f"{key}.positions is {len(part.bias)}", why, "leave it out"))
    first, second = torch.zeros(wide, fc1.in_features), torch.zeros(wide, wide)
    first[:hidden], second[:, :hidden] = fc1.weight, adapter.out.weight
    padded = torch.zeros(wide)
    padded[:hidden] = first_bias
    return Projector((first, padded), "gelu", (second, bias))


def _same_for_all(rows: Tensor, refusal: UserError) -> Tensor:
    """The one vector that all rows are."""
    if not bool((rows == rows[0]).all()):
        raise refusal
    return rows[0]
