"""LLaVA's pre-training: how surprised the frozen LLM is by the captions, given image tokens in its prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from pipeline.config.base import Prompt
from pipeline.config.schema import ObjectiveSettings
from pipeline.errors import UserError
from pipeline.objectives.base import Captions, Objective

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.adapters.module import Adapter
    from pipeline.started import Started

MOST_TOKENS = 1024  # through the LLM at a time, padding and all: what bounds the memory, whatever the batch


class CaptionCESettings(ObjectiveSettings):
    prompt: Prompt = "Provide a brief description of the given image."  # of LLaVA's eleven, which it draws from


class CaptionCE(Objective):
    """Next-token cross-entropy of a caption through the frozen LLM (Liu et al. 2023, sec. 4.2, stage 1), nats a token.

    The answer to a prompt in the LLM's chat format, image tokens behind the prompt, end of turn included; only the
    adapter learns, from a random start. Differs from LLaVA in that there is one prompt, and that images weigh alike,
    where LLaVA weighs tokens alike.

    A step takes one random caption of each image, a pass forward and back; held-out figures are of all captions.
    Retrieval takes, at every validation, all `pretrain.candidates` captions for as many images, a pass for each image
    where the LLM can read captions as a tree: its cost grows with candidates squared.
    """

    Settings = CaptionCESettings
    settings: CaptionCESettings
    needs_llm = True

    def start(self, tokens: Tensor, positions: list[int]) -> Started:
        from pipeline.started import Started

        captions = self.pairs.one_caption_each(positions)
        loss = self.distances(tokens, captions, range(len(captions))).mean()
        return Started(lambda: loss)

    def distances(self, tokens: Tensor, captions: Captions, image: Sequence[int]) -> Tensor:
        """Mean cross-entropy of P captions given their images, [P].

        Some pairs go through the LLM at a time. No pair's value depends on another's tokens, so where a gradient is
        wanted it is taken at once, and what is returned is linear in the tokens, with that value and gradient.
        """
        import torch

        answers = self._answers(captions)
        given = tokens[list(image)].float()  # [P, N, D]
        learns = torch.is_grad_enabled() and given.requires_grad
        values, slopes = given.new_empty(len(answers)), torch.zeros_like(given) if learns else None
        for rows in self._parts(answers, given.shape[1]):
            leaf = given[rows].detach().requires_grad_(learns)
            found = self._losses(leaf, [answers[row] for row in rows])
            values[rows] = found.detach()
            if slopes is not None:
                (slopes[rows],) = torch.autograd.grad(found.sum(), leaf)
        return values if slopes is None else values + ((given - given.detach()) * slopes).sum((1, 2))

    def all_distances(self, tokens: Tensor, captions: Captions) -> Tensor:
        """The same of each caption given each image, [B, C], without a gradient: what captions share is read once."""
        import torch

        from pipeline.llms.ranking import Forest, Trie, grow, tree_reach
        from pipeline.llms.spliced import splice

        answers, (before, after) = self._answers(captions), self._prompt
        around, network = len(before) + tokens.shape[1] + len(after), self.llm.network
        forests = [Forest([Trie(part)], tokens.device) for part in _grouped(answers, MOST_TOKENS)]
        if around + max(forest.tokens.shape[1] for forest in forests) > tree_reach(network):
            return super().all_distances(tokens, captions)
        rows = []
        with torch.no_grad():
            for own in tokens.split(1):
                inputs, mask = splice(network, before, own, [after])
                read = [(forest, grow(network, inputs, mask, None, forest)) for forest in forests]
                rows.append(torch.cat([forest.begun(r) + forest.gone_on(n) for forest, (r, n, _) in read], 1))
        return -torch.cat(rows) / torch.tensor([len(ids) for ids in answers], device=tokens.device)

    def initialise(self, adapter: Adapter, tokens: Tensor) -> None:
        """Leaves the adapter as it is. Raises UserError when a caption does not fit into the LLM's context."""
        from pipeline.llms.load import context_of

        context = context_of(self.llm.network.config)
        longest = max(len(caption) for captions in self.pairs.captions for caption in captions) + 1
        answer = min(longest, self.llm.max_caption_tokens)
        wanted = sum(map(len, self._prompt)) + adapter(tokens[:1]).shape[1] + answer
        if context is not None and wanted > context:
            raise UserError(
                "pretrain.objective",
                f"prompt, image tokens and the longest caption are {wanted} tokens, the LLM's context is {context}",
                "lower llm.max_caption_tokens, or give the adapter fewer tokens",
            )

    @cached_property
    def _prompt(self) -> tuple[list[int], list[int]]:
        """Token ids before and after the image."""
        from pipeline.llms.text import Texts

        return Texts(self.llm.tokenizer).prompt(self.settings.prompt, self.llm.system_prompt)

    def _answers(self, captions: Captions) -> list[list[int]]:
        """Token ids of captions, each with its end of turn; one that is too long is cut and so does not end."""
        numbers, end = self.pairs.token_ids, self.llm.tokenizer.eos_token_id
        return [[*(numbers[row] for row in caption), end][: self.llm.max_caption_tokens] for caption in captions]

    def _parts(self, answers: list[list[int]], image_tokens: int) -> Iterator[list[int]]:
        """Answers, by their numbers, of which as many go through the LLM at a time as its memory may hold."""
        around = sum(map(len, self._prompt)) + image_tokens
        part: list[int] = []
        for row in sorted(range(len(answers)), key=lambda row: len(answers[row])):
            if part and (len(part) + 1) * (around + len(answers[row])) > MOST_TOKENS:
                yield part
                part = []
            part.append(row)
        yield part

    def _losses(self, soft_prompts: Tensor, answers: list[list[int]]) -> Tensor:
        """Mean cross-entropies of some answers, [B], each given a soft prompt of [B, N, D]."""
        import torch
        import torch.nn.functional as F

        from pipeline.llms.spliced import IGNORED, answered, read_once, splice

        network, (before, after) = self.llm.network, self._prompt
        shares = soft_prompts.device.type == "cpu" and len(answers) > 1  # as in pipeline/vlm.py
        cache = read_once(network, before, len(answers)) if shares else None
        inputs, mask = splice(network, before, soft_prompts, [after + ids for ids in answers])
        logits, labels = answered(network, inputs, mask, cache, [after] * len(answers), answers)
        lost = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        return lost.sum(1) / torch.tensor([len(ids) for ids in answers], device=lost.device)


def _grouped(answers: list[list[int]], most: int) -> Iterator[list[list[int]]]:
    """Answers in their order, in groups of at most so many tokens."""
    group: list[list[int]] = []
    for ids in answers:
        if group and sum(map(len, group)) + len(ids) > most:
            yield group
            group = []
        group.append(ids)
    yield group
