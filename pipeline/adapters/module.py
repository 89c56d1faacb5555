"""An adapter: a trainable module from image tokens [B, N, d_in] to the LLM's embedding space [B, M, d_out]."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.adapters.base import Architecture
from pipeline.adapters.blocks import Mixture
from pipeline.config import components
from pipeline.devices import mixed_precision
from pipeline.errors import UserError, reason


class Adapter(nn.Module):
    """A body, then a linear layer to the LLM's width.

    `pool` first averages a square grid of tokens down to pool x pool; `dropout` acts on the input tokens.
    Absent at first, and where pre-training may start from: `offset` [M, d_out], a constant token set, and `skip`, a
    linear map from the mean of the tokens past the body, which is added to each token that comes out. Last of all
    `mixture`, where asked for, makes each token a mixture of words.
    """

    def __init__(self, body: nn.Module, out: nn.Linear, pool: int | None = None, dropout: float = 0.0):
        super().__init__()
        self.pool, self.dropout = pool, dropout
        self.body, self.out = body, out
        self.register_parameter("offset", None)
        self.skip: nn.Linear | None = None
        self.mixture: Mixture | None = None
        self.config: dict[str, Any] = {}

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, d_in] to [B, M, d_out]."""
        pooled = F.dropout(self.pooled(tokens), self.dropout, self.training)
        tokens = self.out(self.body(pooled))
        if self.skip is not None:
            tokens = tokens + self.skip(pooled.mean(1, keepdim=True))
        if self.offset is not None:
            tokens = tokens + self.offset
        return tokens if self.mixture is None else self.mixture(tokens)

    def trained(self, tokens: Tensor) -> Tensor:
        """The same in training, float32 whatever it is computed in; a body of somebody's own may bear float32 alone."""
        with mixed_precision(tokens.device) if not components.is_foreign(self.config["name"]) else nullcontext():
            return self(tokens).float()

    def pooled(self, tokens: Tensor) -> Tensor:
        """What the body is given of image tokens [B, N, d_in]: [B, pool * pool, d_in], or all."""
        return tokens if self.pool is None else pool_grid(tokens, self.pool)

    @torch.no_grad()
    def start_at(self, constant_set: Tensor, tokens: Tensor) -> None:
        """Start at a constant token set [M, d_out], plus a tenth of its spread that depends on the image.

        `tokens` [B, N, d_in] are a sample to measure the spread on: it differs tenfold between architectures.
        """
        self.out.bias.zero_()
        spread = self(tokens).std()
        self.out.weight.mul_(0.1 * constant_set.std() / spread)
        self.offset = nn.Parameter(constant_set.clone())

    @torch.no_grad()
    def skip_by(self, fitted: Tensor) -> None:
        """Add a linear map of the mean token, to be called after `start_at`.

        Its values are the first d_in rows of `fitted` [d_in + 1, d_out]; the last row is subtracted.
        """
        assert self.offset is not None, "start_at comes first"
        self.skip = nn.Linear(len(fitted) - 1, fitted.shape[1], bias=False, device=fitted.device)
        self.skip.weight.copy_(fitted[:-1].T)
        self.offset.sub_(fitted[-1])

    def mix(self, words: Tensor) -> None:
        """From now on give mixtures of words [T, d_out], to be called after `start_at` and `skip_by`."""
        self.mixture = Mixture(words.clone())

    def save(self, folder: Path, weights: str) -> None:
        """Write adapter.json and <weights>.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter.json").write_text(json.dumps(self.config, indent=1) + "\n")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / f"{weights}.safetensors")


def pool_grid(tokens: Tensor, side: int) -> Tensor:
    """Average a square grid of tokens [B, s * s, D] down to [B, side * side, D]."""
    count = tokens.shape[1]
    grid = round(count**0.5)
    if grid * grid != count:
        raise UserError("adapters.*.architecture.pool", f"{count} image tokens are no square grid", "leave pool out")
    if grid == side:
        return tokens
    square = tokens.transpose(1, 2).unflatten(2, (grid, grid))
    return F.adaptive_avg_pool2d(square, side).flatten(2).transpose(1, 2)


def build_adapter(kind: str, d_in: int, d_out: int, /, **architecture: Any) -> Adapter:
    """An adapter of a kind, one of ours or a `package.module:Class`, with random weights by torch's own state.

    `architecture` are the keys of adapters.<name>.architecture. Raises UserError naming one that is at fault.
    """
    part = Architecture.of(kind, architecture)
    body, width = part.body(d_in, d_out)
    adapter = Adapter(body, nn.Linear(width, d_out), part.settings.pool, part.settings.dropout)
    adapter.config = {"name": kind, "d_in": d_in, "d_out": d_out, "architecture": architecture}
    return adapter


def load_adapter(folder: Path, weights: str) -> Adapter:
    """The adapter saved in a folder under a name (first, last, adapter), in eval mode.

    Raises UserError when its files are missing or do not fit together.
    """
    path = folder / f"{weights}.safetensors"
    try:
        config = json.loads((folder / "adapter.json").read_text())
        if not components.is_trusted("adapter", config["name"]):
            what = f"is of the class {config['name']}, which params.yaml does not name, so its code is not run"
            raise UserError(folder / "adapter.json", what, "name it as an architecture's kind if you trust it")
        state = load_file(path)
        adapter = build_adapter(config["name"], config["d_in"], config["d_out"], **config["architecture"])
        if "offset" in state:
            adapter.offset = nn.Parameter(torch.empty_like(state["offset"]))
        if "skip.weight" in state:
            adapter.skip = nn.Linear(config["d_in"], config["d_out"], bias=False)
        if "mixture.words" in state:
            adapter.mix(state["mixture.words"])
        adapter.load_state_dict(state)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(path, f"cannot be loaded as an adapter ({reason(error)})", "run `dvc repro`") from None
    return adapter.eval()
