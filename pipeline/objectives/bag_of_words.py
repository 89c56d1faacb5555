"""Which words: the cross-entropy of a caption's words, in any order, under what the image's tokens say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.objectives.bags import BagObjective
from pipeline.objectives.base import Captions

if TYPE_CHECKING:
    from torch import Tensor


class BagOfWords(BagObjective):
    """Cross-entropy of the words' weights under the mean over the tokens of a softmax over all words of all captions.

    Logits are inner products of a token and the words' input embeddings. Where an LLM has tied embeddings they are
    those of its last layer, and a token is read as if it were the LLM's last state; where it has not they are no
    logits of the LLM, and only say which input embeddings a token is like.
    """

    def distances(self, tokens: Tensor, captions: Captions, image: Sequence[int]) -> Tensor:
        import torch

        bags, at = self.bags(captions), torch.as_tensor(image, device=tokens.device)
        return -(self.log_probabilities(tokens)[at[:, None], bags.rows] * bags.weights).sum(1)

    def all_distances(self, tokens: Tensor, captions: Captions) -> Tensor:
        bags = self.bags(captions)
        return -(self.log_probabilities(tokens)[:, bags.rows] * bags.weights).sum(2)

    def log_probabilities(self, tokens: Tensor) -> Tensor:
        """Of all words of all captions, [B, T]."""
        import math

        said = (tokens @ self.pairs.table.T).log_softmax(2)
        return said.logsumexp(1) - math.log(tokens.shape[1])
