"""Low-rank adaptation (LoRA, Hu et al. 2022) of a frozen network: to answer with, and what PEFT trains it with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipeline.errors import UserError, reason

ROOT = "base_model.model."  # what PEFT puts before a module's name


class LowRank:
    """A module's output W x with alpha / r * B A x added, as PEFT computes it; a forward hook."""

    def __init__(self, down: Tensor, up: Tensor, scale: float):
        """down A [r, d_in], up B [d_out, r]."""
        self.down, self.up, self.scale = down, up, scale

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        added = F.linear(F.linear(inputs[0].to(self.down.dtype), self.down), self.up)
        return (output + added * self.scale).to(output.dtype)


class QuickDropout(nn.Dropout):
    """nn.Dropout, but that on a CPU it draws 16 bits for an entry: torch's takes a sixth of a fine-tuning step there.

    The share that is dropped is p, rounded to 1/65536.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape and floating dtype to the same."""
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        dropped = min(round(self.p * 2**16), 2**16 - 1)  # of 2**16 numbers that may be drawn
        drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # None: all 64 bits
        kept = drawn.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
        return x * kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))


def insert_lora(network: nn.Module, folder: Path) -> list[RemovableHandle]:
    """Have a network answer with the LoRA that PEFT has saved; returns hooks, which take it out again when removed.

    PEFT itself takes two seconds to import and two more to wrap the 210 layers of a small LLM.
    Raises UserError, with the network as it was, when its files are missing, or are not of modules that it has.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors, found = load_file(folder / "adapter_model.safetensors"), []
        for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
            name = key.removesuffix(".lora_A.weight")
            module = network.get_submodule(name.removeprefix(ROOT))
            place = next(module.parameters()).device
            down, up = tensors.pop(key).to(place), tensors.pop(f"{name}.lora_B.weight").to(place)
            found.append((module, LowRank(down, up, config["lora_alpha"] / config["r"])))
        if tensors:
            raise ValueError(f"{min(tensors)} belongs to another method")
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(
            folder, f"cannot be loaded as a LoRA of this LLM ({reason(error)})", "run `dvc repro`"
        ) from None
    return [module.register_forward_hook(hook) for module, hook in found]  # all, or none: others share the network
