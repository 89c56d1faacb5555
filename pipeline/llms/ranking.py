"""All answers that are allowed in one pass of an LLM: what begins alike is read once, as a tree behind the prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FIRST_READ = 3  # names an image that the search for the best reads at first, besides those asked for


def tree_reach(network: Any) -> float:
    """How many tokens, prompt and tree, an LLM can read as a tree; 0 for none.

    It has to place tokens by the positions it is told, and look where a mask says: rotary embeddings, no distances
    counted along the cache (ALiBi), attention that takes any mask. Layers that look back a fixed number of tokens see
    no more than these.
    """
    from transformers import DynamicCache

    config = network.config.get_text_config()
    if not getattr(config, "rope_parameters", None) or getattr(config, "alibi", False):
        return 0
    if config._attn_implementation not in ("sdpa", "eager"):
        return 0
    layers = DynamicCache(config=config).layers
    return min((layer.sliding_window - 1 if layer.is_sliding else math.inf for layer in layers), default=math.inf)


class Trie:
    """Answers as token ids, as a tree: a node is a beginning that goes on, `steps` are each answer's later tokens."""

    def __init__(self, answers: Sequence[Sequence[int]]):
        nodes: dict[tuple[int, ...], int] = {}
        for ids in answers:
            for end in range(1, len(ids)):
                nodes.setdefault(tuple(ids[:end]), len(nodes))
        self.tokens = [beginning[-1] for beginning in nodes]
        self.depths = [len(beginning) for beginning in nodes]
        # (node, one that it sees): those on the way to it, and itself.
        self.seen = [(node, nodes[seen[:end]]) for seen, node in nodes.items() for end in range(1, len(seen) + 1)]
        self.firsts = [ids[0] for ids in answers]
        # (answer, node, token that follows it)
        self.steps = [
            (number, nodes[tuple(ids[:end])], ids[end])
            for number, ids in enumerate(answers)
            for end in range(1, len(ids))
        ]


class Forest:
    """The tries of a batch's rows as tensors: tokens and depths [B, K], sees [B, K, K], padded to the largest."""

    def __init__(self, tries: Sequence[Trie], device: torch.device):
        self.rows, most = len(tries), max(len(trie.tokens) for trie in tries)

        def padded(values: Sequence[list[int]], fill: int) -> Tensor:
            return torch.tensor([[*row, *[fill] * (most - len(row))] for row in values], device=device).long()

        self.tokens = padded([trie.tokens for trie in tries], 0)
        self.depths = padded([trie.depths for trie in tries], 1)
        self.sees = torch.eye(most, dtype=torch.bool, device=device).repeat(self.rows, 1, 1)
        seen = [(row, *pair) for row, trie in enumerate(tries) for pair in trie.seen]
        self.sees[_columns(seen, 3, device)] = True
        self.steps = _columns([(row, *step) for row, trie in enumerate(tries) for step in trie.steps], 4, device)
        firsts = [(row, number, token) for row, trie in enumerate(tries) for number, token in enumerate(trie.firsts)]
        self.firsts = _columns(firsts, 3, device)
        self.widest = max(len(trie.firsts) for trie in tries)

    def begun(self, root: Tensor) -> Tensor:
        """Log-probability [B, C] of each answer's first token, from those of all [B, V]; -inf where a row has fewer."""
        row, answer, token = self.firsts
        scores = root.new_full((self.rows, self.widest), -torch.inf)
        scores[row, answer] = root[row, token]
        return scores

    def gone_on(self, logits: Tensor) -> Tensor:
        """Log-likelihood [B, C] of each answer's later tokens; logits [B, K, V] of the nodes."""
        row, answer, node, token = self.steps
        total = torch.stack([nodes.float().logsumexp(-1) for nodes in logits.unbind(0)])  # [B, K], a row's at a time
        found = logits[row, node, token].float() - total[row, node]
        scores = torch.zeros(self.rows, self.widest, device=logits.device)
        return scores.index_put_((row, answer), found, accumulate=True)


def _columns(rows: Sequence[tuple[int, ...]], width: int, device: torch.device) -> tuple[Tensor, ...]:
    return torch.tensor(rows, dtype=torch.long, device=device).reshape(-1, width).unbind(1)


def grow(network: Any, inputs: Tensor, mask: Tensor, cache: Any, forest: Forest | None) -> tuple[Tensor, Tensor, Any]:
    """One pass over what a cache does not hold yet of some prompts, and over the tries behind them.

    inputs [B, L, D] and mask [B, L], padded at their ends. Gives the last prompt tokens' log-probabilities [B, V]
    (empty when the cache holds the prompts), the nodes' logits [B, K, V], and the cache.
    """
    (count, length), done = mask.shape, cache.get_seq_length() if cache is not None else 0
    embed, nodes = network.get_input_embeddings(), forest.tokens.shape[1] if forest else 0
    keys, places = mask.bool()[:, None], torch.arange(length, device=mask.device)
    sees = F.pad(keys & (places[None] <= places[done:, None]), (0, nodes))  # [B, L - done, L + K]
    parts, positions, ends = [inputs[:, done:]], [(mask.cumsum(1) - 1)[:, done:]], mask.sum(1)
    if forest:
        parts.append(embed(forest.tokens).to(inputs.dtype))
        positions.append(ends[:, None] + forest.depths - 1)
        sees = torch.cat([sees, torch.cat([keys.expand(-1, nodes, -1), forest.sees], 2)], 1)
    bias = torch.zeros(sees.shape, dtype=inputs.dtype, device=mask.device)
    bias.masked_fill_(~sees, torch.finfo(inputs.dtype).min)
    first = int(ends.min()) - 1 - done if done < length else 0  # the first place whose logits are needed
    output = network(
        inputs_embeds=torch.cat(parts, 1), attention_mask=bias[:, None], position_ids=torch.cat(positions, 1),
        cache=cache, use_cache=True, logits_to_keep=torch.arange(first, sees.shape[1], device=mask.device),
    )  # fmt: skip
    kept = output.logits.shape[1] - nodes  # of the prompts
    root = output.logits[:, :0].sum(1)
    if done < length:
        rows = torch.arange(count, device=mask.device)
        root = output.logits[rows, ends - 1 - done - first].float().log_softmax(-1)
    return root, output.logits[:, kept:], output.cache


def best(
    network: Any, inputs: Tensor, mask: Tensor, cache: Any, answers: Sequence[Sequence[Sequence[int]]],
    prior: Tensor | None, top: int,
) -> Tensor:  # fmt: skip
    """Log-likelihood [B, C] of answers, for each row's `top` best by log-likelihood + prior [B, C] at least; else -inf.

    An answer's first token bounds its log-likelihood, so answers are read in the bounds' order, until no unread one's
    bound is above the `top`-th best of those read: at first a few a row, then twice as many each time.
    """
    root, _, cache = grow(network, inputs, mask, cache, None)
    begun = Forest([Trie(row) for row in answers], mask.device).begun(root)
    prior = torch.zeros_like(begun) if prior is None else prior.to(begun)
    scores = torch.full_like(begun, -torch.inf)
    left, rows, step = begun + prior, torch.arange(len(begun), device=mask.device), top + FIRST_READ

    def worst() -> Tensor:
        return (scores + prior)[rows].topk(min(top, scores.shape[1]), 1).values[:, -1:]

    while len(rows):
        bounds, order = left[rows].topk(min(step, left.shape[1]), 1)
        chosen = [some[able].tolist() for some, able in zip(order, bounds > worst(), strict=True)]
        tries = [Trie([answers[row][i] for i in some]) for row, some in zip(rows.tolist(), chosen, strict=True)]
        forest = Forest(tries, mask.device)
        logits = root.new_zeros(len(rows), 0, 1)
        if nodes := forest.tokens.shape[1]:
            _, logits, cache = grow(network, inputs[rows], mask[rows], cache, forest)
            cache.crop(-nodes)
        later = forest.gone_on(logits)
        for number, (row, some) in enumerate(zip(rows.tolist(), chosen, strict=True)):
            scores[row, some] = begun[row, some] + later[number, : len(some)]
            left[row, some] = -torch.inf
        going = (left[rows].amax(1) > worst()[:, 0]).nonzero()[:, 0]
        cache.batch_select_indices(going)
        rows, step = rows[going], 2 * step
    return scores
