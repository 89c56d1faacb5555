"""A small transformer over words and image tokens, with the masks and heads of BLIP-2's first stage."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PADDING = -1  # behind the words of a caption


class TextTower(nn.Module):
    """Captions [P, L], rows of a table [T, D] padded by PADDING, alone or with image tokens [P, N, D] before them.

    Pre-norm blocks; heads are 64 wide. Words and image tokens enter by the same layer.
    """

    table: Tensor

    def __init__(self, table: Tensor, width: int, blocks: int, longest: int):
        super().__init__()
        (words, d_in), heads = table.shape, width // 64
        self.register_buffer("table", table, persistent=False)
        self.enter = nn.Sequential(nn.LayerNorm(d_in), nn.Linear(d_in, width))
        self.starts = nn.Parameter(0.02 * torch.randn(2, width))  # of a caption to be read, and of one to be written
        self.places = nn.Parameter(0.02 * torch.randn(longest + 1, width))
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, blocks, nn.LayerNorm(width), enable_nested_tensor=False)
        self.image_out, self.text_out = nn.Linear(d_in, width), nn.Linear(width, width)
        self.match, self.next = nn.Linear(width, 2), nn.Linear(width, words + 1)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def scale(self) -> Tensor:
        """Of similarities as logits, learned: the inverse temperature, at most 100 as in CLIP (Radford et al. 2021)."""
        return self.log_scale.clamp(max=math.log(100)).exp()

    def image_embeddings(self, tokens: Tensor) -> Tensor:
        """Of length 1, one for each image token: [B, N, width]."""
        return F.normalize(self.image_out(tokens), dim=-1)

    def text_embeddings(self, captions: Tensor) -> Tensor:
        """Of length 1, [P, width]; words see one another, and no image."""
        return F.normalize(self.text_out(self._states(captions, 0)[:, 0]), dim=-1)

    def matches(self, tokens: Tensor, captions: Tensor) -> Tensor:
        """Logits [P, 2] of no match and match, the mean over image tokens; all see one another."""
        states = self._states(captions, 0, tokens)
        return self.match(states[:, : tokens.shape[1]]).mean(1)

    def next_words(self, tokens: Tensor, captions: Tensor) -> Tensor:
        """Logits [P, L + 1, T + 1] of the first word to what follows the last, the end being number T.

        Words see the image and the words before them, image tokens one another.
        """
        states = self._states(captions, 1, tokens, causal=True)
        return self.next(states[:, tokens.shape[1] :])

    def _states(self, captions: Tensor, start: int, tokens: Tensor | None = None, causal: bool = False) -> Tensor:
        """[P, N + 1 + L, width]: of image tokens, a start and the words."""
        words = self.enter(self.table[captions.clamp_min(0)])
        x = torch.cat([self.starts[start].expand(len(words), 1, -1), words], 1) + self.places[: words.shape[1] + 1]
        count = 0 if tokens is None else tokens.shape[1]
        unseen, mask = F.pad(captions == PADDING, (count + 1, 0)), None
        if tokens is not None:
            x = torch.cat([self.enter(tokens), x], 1)
        if causal:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            mask[:count, :count] = False
        states: Tensor = self.blocks(x, mask, unseen)
        return states
