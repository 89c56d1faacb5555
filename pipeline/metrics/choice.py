"""What a language model takes for likelier of two answers to a question about a text; no picture is in it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch

from pipeline.errors import UserError
from pipeline.llms.load import LanguageModel, context_of
from pipeline.llms.text import Texts
from pipeline.progress import progress_bar


class Chooser:
    """A loaded LLM that is asked so many texts at once; as many as memory holds on a GPU."""

    def __init__(self, llm: LanguageModel, batch: int):
        self.llm, self.batch, self.texts = llm, batch, Texts(llm.tokenizer)

    def shares(self, before: str, texts: Sequence[str], question: str, answers: tuple[str, str]) -> list[float]:
        """The probability of the first of two answers among the two, for each text, read between `before` and question.

        It is that of the first token in which the answers differ, by the LLM's softmax over these two. Raises UserError
        when its tokenizer can't tell the answers apart, or when its context has no room for a text.
        """
        one, other = self.texts.ids(answers)
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
        same = [token for token, _ in alike]
        if len(same) in (len(one), len(other)):
            fault = f"to this LLM's tokenizer {answers[0]!r} begins like {answers[1]!r}"
            raise UserError("", fault, "take another LLM")
        head, tail = self.texts.prompt(before, self.llm.system_prompt, question)
        rows = [head + ids + tail + same for ids in self.texts.ids(texts)]
        self._check(max(map(len, rows), default=0))
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))  # alike in length: little padding
        found: list[float] = []
        with progress_bar("texts judged", len(rows), "texts") as advance:
            while part := order[len(found) : len(found) + self.batch]:
                try:
                    logits = self._next([rows[row] for row in part])
                except torch.OutOfMemoryError:
                    if self.batch == 1:
                        raise
                    self.batch = (len(part) + 1) // 2
                    torch.cuda.empty_cache()
                    continue
                found += (logits[:, one[len(same)]] - logits[:, other[len(same)]]).sigmoid().tolist()
                advance(len(part))
        return [share for _, share in sorted(zip(order, found, strict=True))]

    def _check(self, longest: int) -> None:
        context = context_of(self.llm.network.config)
        if context is not None and longest > context:
            raise UserError(
                "", f"a text and what is asked of it are {longest} tokens, the LLM's context is {context}",
                "take an LLM with a longer one, or shorten the longest captions",
            )  # fmt: skip

    @torch.no_grad()
    def _next(self, rows: Sequence[list[int]]) -> torch.Tensor:
        """Logits [B, V], float32, of the token after each row of ids; rows are padded at their beginnings."""
        device, longest = self.llm.network.get_input_embeddings().weight.device, max(map(len, rows))
        pad = self.llm.tokenizer.eos_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        places = (mask.cumsum(1) - 1).clamp_min(0)
        output = self.llm.network(
            input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False, logits_to_keep=1
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits
