"""BLIP-2's first stage: image tokens and captions learn to be told apart, matched and written, without an LLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.config.base import Positive
from pipeline.config.schema import ObjectiveSettings
from pipeline.objectives.base import Captions, Means, Objective

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.objectives.pairs import Pairs
    from pipeline.objectives.text_tower import TextTower
    from pipeline.started import Started

CHANCE = 1e-4  # that the easiest negative keeps, as in BLIP-2's code


class QFormerSettings(ObjectiveSettings):
    width: Positive = Field(256, multiple_of=64, description="of the text tower, whose heads are 64 wide")
    blocks: Positive = 2


class QFormer(Objective):
    """The sum of three losses (Li et al. 2023, BLIP-2, sec. 3.1): ITC, ITM and ITG, one random caption for each image.

    The queries' outputs are the adapter's tokens; `query` is the adapter nearest to BLIP-2's. What differs:

    - In BLIP-2 text goes through the query transformer itself, whose self-attention sees both. An adapter has no way in
      for text, so a text tower of its own stands behind it, with BLIP-2's three masks over image tokens and words. It
      learns from scratch (not from BERT), on the LLM's input embeddings, and is thrown away.
    - ITG writes words of the pre-training captions, not of a whole vocabulary.
    - This is stage 1 alone. In BLIP-2's stage 2 a linear layer learns, through the LLM, to take the queries into the
      LLM's space. Here tokens have the LLM's width already, and no loss draws them near its embeddings: fine-tuning has
      to, and naming by EMD is as good as chance has it.

    Distances are minus the similarity of ITC.
    """

    Settings = QFormerSettings
    settings: QFormerSettings
    module: TextTower

    def __init__(self, settings: QFormerSettings, pairs: Pairs, means: Means | None = None):
        import torch

        from pipeline.objectives.text_tower import TextTower

        super().__init__(settings, pairs, means)
        longest = max(len(caption) for captions in pairs.captions for caption in captions)
        with torch.random.fork_rng([]):
            torch.manual_seed(self.means.seed)
            self.module = TextTower(pairs.table, settings.width, settings.blocks, longest).to(pairs.device)

    def distances(self, tokens: Tensor, captions: Captions, image: Sequence[int]) -> Tensor:
        """Minus the largest cosine of a caption's embedding and a token's, [P]."""
        _, texts = self._read(captions)
        images = self.module.image_embeddings(tokens)[list(image)]
        return -(images @ texts[:, :, None]).amax((1, 2))

    def all_distances(self, tokens: Tensor, captions: Captions) -> Tensor:
        _, texts = self._read(captions)
        return -self.similarities(tokens, texts)

    def similarities(self, tokens: Tensor, texts: Tensor) -> Tensor:
        """Of B images' tokens [B, N, D] and the embeddings [C, E] of C captions, [B, C]."""
        return (self.module.image_embeddings(tokens) @ texts.T).amax(1)

    def start(self, tokens: Tensor, positions: list[int]) -> Started:
        import torch

        from pipeline.started import Started

        of, captions = self.pairs.captions, self.pairs.one_caption_each(positions)
        # A caption that another image has too (a class name) is no wrong answer there.
        own = torch.tensor([[caption in of[p] for caption in captions] for p in positions], device=tokens.device)
        words, texts = self._read(captions)
        similar = self.similarities(tokens, texts)
        loss = self.contrast(similar, own) + self.matching(tokens, words, similar.detach(), own)
        loss = loss + self.writing(tokens, words)
        return Started(lambda: loss)

    def contrast(self, similar: Tensor, own: Tensor) -> Tensor:
        """ITC: InfoNCE both ways (van den Oord et al. 2018) over similarities [B, B]; `own` [B, B]: right answers."""
        import torch
        import torch.nn.functional as F

        right = torch.arange(len(own), device=own.device)
        others = own.clone().fill_diagonal_(False)
        logits = (similar * self.module.scale()).masked_fill(others, -torch.inf)
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2

    def matching(self, tokens: Tensor, words: Tensor, similar: Tensor, own: Tensor) -> Tensor:
        """ITM: whether image and caption belong together: each pair, and each side with a hard negative for the other.

        Negatives are drawn by the softmax of the similarities; where a batch has none, none.
        """
        import torch
        import torch.nn.functional as F

        logits = similar * self.module.scale().detach()
        pairs = [(i, i) for i in range(len(own))]
        pairs += [(i, j) for i, j in enumerate(self.negatives(logits, own)) if j is not None]
        pairs += [(i, j) for j, i in enumerate(self.negatives(logits.T, own.T)) if i is not None]
        of_image, of_text = map(list, zip(*pairs, strict=True))
        labels = (torch.arange(len(pairs), device=tokens.device) < len(own)).long()
        return F.cross_entropy(self.module.matches(tokens[of_image], words[of_text]), labels)

    @staticmethod
    def negatives(logits: Tensor, own: Tensor) -> list[int | None]:
        """For each row of logits [B, B] a random column, likelier by its softmax, that is none of its own; or None."""
        import torch

        weights = (logits.softmax(1) + CHANCE).masked_fill(own, 0.0)
        some = (~own).any(1)
        found: list[int | None] = [None] * len(own)
        drawn = torch.multinomial(weights[some], 1)[:, 0].tolist() if some.any() else []
        for row, column in zip(some.nonzero()[:, 0].tolist(), drawn, strict=True):
            found[row] = column
        return found

    def writing(self, tokens: Tensor, words: Tensor) -> Tensor:
        """ITG: cross-entropy of each next word of a caption, and of its end, given the image and the words before."""
        import torch.nn.functional as F

        from pipeline.objectives.text_tower import PADDING

        logits = self.module.next_words(tokens, words)
        labels = F.pad(words, (0, 1), value=PADDING)
        labels[range(len(words)), (words != PADDING).sum(1)] = len(self.pairs.table)  # its end
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PADDING)

    def _read(self, captions: Captions) -> tuple[Tensor, Tensor]:
        """Captions as rows of the table [P, L], padded, and their embeddings [P, E]."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        from pipeline.devices import to_device
        from pipeline.objectives.text_tower import PADDING

        rows = pad_sequence([torch.tensor(caption) for caption in captions], True, PADDING)
        words = to_device(rows, self.pairs.device)
        return words, self.module.text_embeddings(words)
