"""The adapters: trainable modules from image tokens [B, N, d_in] to the LLM's embedding space [B, M, d_out]."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import UserError


class Adapter(nn.Module):
    """A body, then a linear layer to the LLM's width.

    `pool` first averages a square grid of tokens down to pool x pool; `dropout` acts on the input tokens.
    `offset` [M, d_out], absent at first, is a constant token set that pre-training may start from.
    """

    def __init__(self, body: nn.Module, out: nn.Linear, pool: int | None = None, dropout: float = 0.0):
        super().__init__()
        self.pool, self.dropout = pool, dropout
        self.body, self.out = body, out
        self.register_parameter("offset", None)
        self.config: dict[str, Any] = {}

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, d_in] to [B, M, d_out]."""
        if self.pool is not None:
            tokens = pool_grid(tokens, self.pool)
        tokens = F.dropout(tokens, self.dropout, self.training)
        tokens = self.out(self.body(tokens))
        return tokens if self.offset is None else tokens + self.offset

    @torch.no_grad()
    def start_at(self, constant_set: Tensor, tokens: Tensor) -> None:
        """Start at a constant token set [M, d_out], plus a tenth of its spread that depends on the image.

        `tokens` [B, N, d_in] are a sample to measure the spread on: it differs tenfold between architectures.
        """
        self.out.bias.zero_()
        spread = self(tokens).std()
        self.out.weight.mul_(0.1 * constant_set.std() / spread)
        self.offset = nn.Parameter(constant_set.clone())

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
        raise UserError(f"adapters.*.architecture.pool: {count} image tokens are no square grid; leave pool out")
    if grid == side:
        return tokens
    square = tokens.transpose(1, 2).unflatten(2, (grid, grid))
    return F.adaptive_avg_pool2d(square, side).flatten(2).transpose(1, 2)


def build_adapter(name: str, d_in: int, d_out: int, **architecture: Any) -> Adapter:
    """An adapter by name: linear, mlp, self_attention or query.

    Keys of `architecture`: pool, dropout (all); hidden, positions (mlp); width, blocks, heads, feed_forward (both
    transformers); queries (query). Raises UserError for any other key.
    """
    bodies: dict[str, Callable[..., tuple[nn.Module, int]]] = {
        "linear": _linear, "mlp": _mlp, "self_attention": _self_attention, "query": _query,
    }  # fmt: skip
    common = {key: architecture[key] for key in ("pool", "dropout") if key in architecture}
    own = {key: value for key, value in architecture.items() if key not in (*common, "kind")}
    try:
        body, width = bodies[name](d_in, d_out, **own)
    except TypeError as error:
        raise UserError(f"adapters.{name}.architecture: {str(error).split(') ')[-1]}") from None
    adapter = Adapter(body, nn.Linear(width, d_out), **common)
    adapter.config = {"name": name, "d_in": d_in, "d_out": d_out, "architecture": architecture}
    return adapter


def load_adapter(folder: Path, weights: str) -> Adapter:
    """The adapter saved in a folder under a name (first, last, adapter), in eval mode.

    Raises UserError when its files are missing or do not fit together.
    """
    path = folder / f"{weights}.safetensors"
    try:
        config = json.loads((folder / "adapter.json").read_text())
        state = load_file(path)
        adapter = build_adapter(config["name"], config["d_in"], config["d_out"], **config["architecture"])
        if "offset" in state:
            adapter.offset = nn.Parameter(torch.empty_like(state["offset"]))
        adapter.load_state_dict(state)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be loaded as an adapter ({reason}); run `dvc repro`") from None
    return adapter.eval()


def _linear(d_in: int, d_out: int) -> tuple[nn.Module, int]:
    """LLaVA's H = W Z (Liu et al. 2023)."""
    return nn.Identity(), d_in


def _mlp(d_in: int, d_out: int, hidden: int | None = None, positions: int | None = None) -> tuple[nn.Module, int]:
    """fc1, GELU, and fc2 as the last layer; hidden = 2 x output (thesis, equation 3.1).

    `positions`, the number of tokens, gives fc1 a further bias for each token, so that it knows them apart.
    """
    hidden = hidden or 2 * d_out
    own = [] if positions is None else [Positions(positions, hidden)]
    return nn.Sequential(nn.Linear(d_in, hidden), *own, nn.GELU()), hidden


class Positions(nn.Module):
    """A learned vector for each place in the row of tokens, zero at first."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(count, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, count, width] to the same; UserError for another number of tokens."""
        if tokens.shape[1] != len(self.bias):
            raise UserError(
                f"adapters.mlp.architecture.positions is {len(self.bias)}, but the adapter has {tokens.shape[1]} "
                "tokens of each picture (pool x pool, or as many as the encoder gives); set it to that"
            )
        return tokens + self.bias


def _self_attention(
    d_in: int, d_out: int, width: int | None = None, blocks: int = 4, heads: int = 4, feed_forward: int | None = None
) -> tuple[nn.Module, int]:
    """Blocks of self-attention and feed-forward over the image tokens (thesis, table 2)."""
    width = width or d_in
    enter = nn.Identity() if width == d_in else nn.Linear(d_in, width)
    stack = [Block(width, heads, feed_forward or 4 * width, cross=False) for _ in range(blocks)]
    return nn.Sequential(enter, *stack, nn.LayerNorm(width)), width


def _query(
    d_in: int,
    d_out: int,
    width: int | None = None,
    queries: int = 128,
    blocks: int = 4,
    heads: int = 4,
    feed_forward: int | None = None,
) -> tuple[nn.Module, int]:
    """Learned queries that look at the image tokens (thesis, table 3)."""
    width = width or d_in
    return QueryBody(d_in, width, queries, blocks, heads, feed_forward or 4 * width), width


class QueryBody(nn.Module):
    """Queries N(0, 0.02) through blocks of self-attention, cross-attention and feed-forward."""

    def __init__(self, d_in: int, width: int, queries: int, blocks: int, heads: int, feed_forward: int):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(queries, width))
        self.enter = nn.Identity() if width == d_in else nn.Linear(d_in, width)
        self.blocks = nn.ModuleList(Block(width, heads, feed_forward, cross=True) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.apply(_bert_init)
        nn.init.normal_(self.queries, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, d_in] to [B, queries, width]."""
        tokens = self.enter(tokens)
        x = self.queries.expand(len(tokens), -1, -1)
        for block in self.blocks:
            x = block(x, tokens)
        return self.norm(x)


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, cross-attention where asked, GELU feed-forward; no positions."""

    def __init__(self, width: int, heads: int, feed_forward: int, cross: bool):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm_cross = nn.LayerNorm(width) if cross else None
        self.cross = Attention(width, heads) if cross else None
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, feed_forward), nn.GELU(), nn.Linear(feed_forward, width))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x [B, M, width], context [B, N, width]."""
        y = self.norm1(x)
        x = x + self.attention(y, y)
        if self.cross is not None and self.norm_cross is not None and context is not None:
            x = x + self.cross(self.norm_cross(x), context)
        return x + self.feed_forward(self.norm2(x))


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) on torch's fused kernel."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise UserError(f"adapters.*.architecture: width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Queries from x [B, M, width], keys and values from context [B, N, width]."""
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, y in ((self.q, x), (self.k, context), (self.v, context))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _bert_init(module: nn.Module) -> None:
    """BERT's start (Devlin et al. 2019): biases zero, weights N(0, 0.02) at its width of 768.

    At other widths the deviation keeps a layer's gain; 0.02 at 192 left the queries blind to the image for epochs.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02 * (768 / module.in_features) ** 0.5)
        nn.init.zeros_(module.bias)
