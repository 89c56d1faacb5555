"""What an LLM reads: words with the tokens of an image among them, and the answers that it is held to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a label that no loss counts


def read_once(network: Any, before: list[int], rows: int) -> Any:
    """The cache, for so many rows, of words that stand at the beginning of each: they go through the LLM once."""
    embed = network.get_input_embeddings()
    head = embed(torch.tensor([before], device=embed.weight.device))
    cache = network(inputs_embeds=head, use_cache=True, logits_to_keep=1).cache
    cache.batch_repeat_interleave(rows)
    return cache


def read_on(network: Any, inputs: Tensor, mask: Tensor, cache: Any) -> Any:
    """The cache of all of inputs [B, L, D], of whose beginning `cache` holds what is read already, or None."""
    done = cache.get_seq_length() if cache is not None else 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, done:]
    return network(
        inputs_embeds=inputs[:, done:], attention_mask=mask, position_ids=positions, cache=cache, use_cache=True,
        logits_to_keep=1,
    ).cache  # fmt: skip


def splice(
    network: Any, before: list[int], soft_prompts: Tensor, ends: Sequence[list[int]], left: bool = False
) -> tuple[Tensor, Tensor]:
    """LLM inputs [B, L, D] and their mask [B, L]: words, an image's soft prompt of [B, M, D], and the row's own end.

    Rows are padded at their ends, where no causal model looks from: padding inside would count as distance in some
    (MPT). `left`: at their beginnings.
    """
    embed, longest = network.get_input_embeddings(), max(map(len, ends))
    head = embed(torch.tensor(before, device=soft_prompts.device))
    rows, masks = [], []
    for soft_prompt, ids in zip(soft_prompts.to(head.dtype).unbind(0), ends, strict=True):
        row = torch.cat([head, soft_prompt, embed(torch.tensor(ids, device=soft_prompts.device))])
        missing = longest - len(ids)
        padding = (missing, 0) if left else (0, missing)
        rows.append(F.pad(row, (0, 0, *padding)))
        masks.append(F.pad(torch.ones(len(row), dtype=torch.long, device=soft_prompts.device), padding))
    return torch.stack(rows), torch.stack(masks)


def answered(
    network: Any, inputs: Tensor, mask: Tensor, cache: Any, afters: Sequence[list[int]], answer_ids: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V], float32, for the tokens of given answers, and these as labels [B, T].

    Rows of `inputs` [B, L, D] end with what stands behind the image (`afters`) and the answer; `cache` holds their
    beginnings, or is None.
    """
    done = cache.get_seq_length() if cache is not None else 0
    # Logits are computed from where the first answer begins: [B, kept + 1, V]. Positions are named one by one,
    # since with a slice each row would be multiplied by the vocabulary alone.
    first = min(map(len, afters))
    kept = max(len(after) + len(ids) for after, ids in zip(afters, answer_ids, strict=True)) - first
    last = torch.arange(-kept - 1, 0, device=inputs.device)
    labels = torch.full((len(answer_ids), kept), IGNORED, device=inputs.device)
    for row, (after, ids) in enumerate(zip(afters, answer_ids, strict=True)):
        start = len(after) - first
        labels[row, start : start + len(ids)] = torch.tensor(ids, device=inputs.device)
    output = network(
        inputs_embeds=inputs[:, done:], attention_mask=mask, position_ids=(mask.cumsum(1) - 1)[:, done:],
        cache=cache, use_cache=cache is not None, logits_to_keep=last,
    )  # fmt: skip
    return output.logits[:, :-1].float(), labels
