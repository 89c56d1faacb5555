"""Numbers as cache.dtype keeps them, and back: float16, bfloat16, float32, or int8 with a scale per token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.devices import CPU, to_device

Columns = dict[str, np.ndarray[Any, Any]]
"""Columns of some rows of a shard, by name: [R, ...] each."""


class DoesNotFit(ValueError):
    """A number is not finite in the stored type; `row` is the first row that has one."""

    def __init__(self, row: int):
        self.row = row


def pack(tokens: Tensor, dtype: str) -> Columns:
    """Float32 tokens [R, ..., D] as the columns that keep them: tokens [R, ..., D], for int8 also scale [R, ...].

    int8 is symmetric: scale = max |x| / 127 of each token. bfloat16 becomes its bits in uint16, numpy has no name for
    it. Raises DoesNotFit.
    """
    if dtype == "int8":
        scale = tokens.abs().amax(-1) / 127
        steps = (tokens / torch.where(scale > 0, scale, 1)[..., None]).round().clamp(-127, 127)
        columns = {"tokens": steps, "scale": scale}
    else:
        columns = {"tokens": tokens.to(getattr(torch, dtype))}
    # The largest of a row is finite if all are; that takes a quarter of the time of looking at each.
    whole = torch.stack([x.flatten(1).abs().amax(1).isfinite() for x in columns.values()]).all(0)
    if not whole.all():
        raise DoesNotFit(int(whole.long().argmin()))
    if dtype == "int8":
        columns["tokens"] = columns["tokens"].to(torch.int8)
    if dtype == "bfloat16":
        columns["tokens"] = columns["tokens"].view(torch.uint16)
    return {name: column.numpy() for name, column in columns.items()}


def unpack(stored: Columns, dtype: str, device: torch.device = CPU) -> Tensor:
    """What `pack` made, as float32 [R, ..., D] on a device, to which it goes as it is kept."""
    columns = {name: to_device(torch.from_numpy(column), device) for name, column in stored.items()}
    tokens = columns["tokens"].view(torch.bfloat16) if dtype == "bfloat16" else columns["tokens"]
    return tokens.float() * columns["scale"][..., None] if dtype == "int8" else tokens.float()
