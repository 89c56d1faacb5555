"""What the bodies of our adapters are made of."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import UserError


class Positions(nn.Module):
    """A learned vector for each place in the row of tokens, zero at first."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(count, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, count, width] to the same; UserError for another number of tokens."""
        if tokens.shape[1] != len(self.bias):
            raise UserError(
                "",
                (
                    f"adapters.mlp.architecture.positions is {len(self.bias)}, but the adapter has "
                    f"{tokens.shape[1]} tokens of each picture (pool x pool, or as many as the encoder gives)"
                ),
                "set it to that",
            )
        return tokens + self.bias


class Mixture(nn.Module):
    """Tokens as convex mixtures of words (AlignVLM, Masry et al. 2025): softmax(x W^T / temperature) W.

    `words` W [T, d_out] stay as they are; the temperature is learned. It begins where a token that is a word is that
    word and hardly another.
    """

    words: Tensor

    def __init__(self, words: Tensor):
        super().__init__()
        self.register_buffer("words", words)
        spread = (words - words.mean(0)).square().sum(1).mean().clamp_min(torch.finfo(words.dtype).tiny)
        self.log_temperature = nn.Parameter((spread / (2 * math.log(len(words) + 1))).log())

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, M, d_out] to the same."""
        return in_float32(lambda tokens: self.weights(tokens) @ self.words, tokens)  # the softmax is sharp

    def weights(self, tokens: Tensor) -> Tensor:
        """How much of each word is in each token, [B, M, T]."""
        return (tokens @ self.words.T / self.log_temperature.exp()).softmax(-1)


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

    # Not nn.MultiheadAttention: it packs q, k and v into one weight, with other names in the state and another start.

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise UserError("adapters.*.architecture", f"width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Queries from x [B, M, width], keys and values from context [B, N, width]."""
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, y in ((self.q, x), (self.k, context), (self.v, context))
        )
        attended = in_float32(F.scaled_dot_product_attention, q, k, v)  # whose kernel is 10 times as slow in bfloat16
        return self.out(attended.transpose(1, 2).flatten(2))


def in_float32(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A function of tensors where a CPU computes the rest in bfloat16."""
    if not torch.is_autocast_enabled("cpu"):
        return function(*tensors)
    with torch.autocast("cpu", enabled=False):
        return function(*(tensor.float() for tensor in tensors))


def _bert_init(module: nn.Module) -> None:
    """BERT's start (Devlin et al. 2019): biases zero, weights N(0, 0.02) at its width of 768.

    At other widths the deviation keeps a layer's gain; 0.02 at 192 left the queries blind to the image for epochs.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02 * (768 / module.in_features) ** 0.5)
        nn.init.zeros_(module.bias)
