"""The vision-language model: image tokens through the adapter into the LLM's prompt, its loss and its answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipeline.adapters.module import Adapter, load_adapter
from pipeline.config import LLM
from pipeline.config.schema import LoRA
from pipeline.errors import UserError, reason
from pipeline.llms.load import LanguageModel, context_of, load_llm
from pipeline.llms.ranking import Forest, Trie, best, grow, tree_reach
from pipeline.llms.spliced import IGNORED, answered, read_on, read_once, splice
from pipeline.llms.text import Texts
from pipeline.lora import QuickDropout, insert_lora
from pipeline.origin import check_llm
from pipeline.progress import progress_bar

if TYPE_CHECKING:
    from pipeline.store.reader import ImageTokens

T = TypeVar("T")
MOST_LOGITS = 2**26  # held at once in ranking: 256 MB of float32


class VLM(nn.Module):
    """Adapter and LLM; the image tokens come from the cache, so no vision encoder is part of it."""

    def __init__(self, adapter: Adapter, llm: LanguageModel):
        super().__init__()
        self.network, self.tokenizer, self.system_prompt = llm.network, llm.tokenizer, llm.system_prompt
        self.texts, self.context = Texts(llm.tokenizer), context_of(llm.network.config)
        self.max_answer_tokens = llm.max_caption_tokens
        self.device = llm.network.get_input_embeddings().weight.device
        self.adapter = adapter.to(self.device)
        # Whether the words before the image go through the LLM once for all rows: a CPU saves their work by it; a GPU
        # has done one long pass in less time than two short ones.
        self.shares_prompt = self.device.type == "cpu"
        self.tree_reach = tree_reach(llm.network)

    def recompute_activations(self) -> None:
        """From now on a training step keeps each layer's input alone, and computes the rest again going back.

        Gradient checkpointing (Chen et al. 2016): the same gradients from a fraction of the memory, in more time.
        """
        self.shares_prompt = False  # layers that are computed again leave nothing for later words
        self.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def prompt(self, text: str, hint: str = "") -> tuple[list[int], list[int]]:
        """Token ids before and after the image: `[INST] prompt, image tokens, hint [/INST]` in the LLM's chat format.

        What is before the image does not depend on the hint.
        """
        before, after = self.texts.prompt(text, self.system_prompt)
        return before, self.texts.prompt(text, self.system_prompt, hint)[1] if hint.strip() else after

    def room(self, prompt: str, image_tokens: int, hints: Sequence[str] = ()) -> int | None:
        """How many tokens of an answer the LLM's context has room for, whichever hint; None where it names no limit."""
        if self.context is None:
            return None
        longest = max(sum(map(len, self.prompt(prompt, hint))) for hint in {"", *hints})
        return self.context - image_tokens - longest

    def loss(
        self, tokens: Tensor, prompt: str, answers: Sequence[str], hints: Sequence[str] | None = None
    ) -> tuple[Tensor, int]:
        """Next-token cross-entropy of the answers to a prompt: its sum over answer tokens, and their number.

        tokens [B, N, D_img]; an answer per image, and a hint where there are some: text behind the image, before the
        end of the user's turn. The end-of-turn token is part of an answer, unless it is cut at `max_answer_tokens`.
        """
        answer_ids = self.answer_ids(answers)
        logits, labels = self._taught(tokens, prompt, answer_ids, hints)
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return total, sum(map(len, answer_ids))

    def _taught(
        self, tokens: Tensor, prompt: str, answer_ids: list[list[int]], hints: Sequence[str] | None
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V], float32, for the tokens of given answers, and these as labels [B, T]."""
        before, afters = self._around(prompt, len(answer_ids), hints)
        ends = [after + ids for after, ids in zip(afters, answer_ids, strict=True)]
        return answered(self.network, *self._splice(tokens, before, ends), afters, answer_ids)

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, prompt: str, max_new_tokens: int, prefix: str = "", repetition_penalty: float = 1.0,
        hints: Sequence[str] | None = None, beams: int = 1, no_repeat: int = 0,
        may_repeat: Collection[int] | None = None, on_text: Callable[[str], None] | None = None,
    ) -> list[str]:  # fmt: skip
        """Answers to one prompt about some images, greedy or of a beam; tokens [B, N, D_img], hints as in `loss`.

        Each answer begins with `prefix`, which the LLM goes on from; `repetition_penalty` is that of Keskar et al.
        (2019), over the tokens generated. `no_repeat`: so many tokens in a row stand in an answer once; 0: no limit.
        Tokens that are not in `may_repeat`, where it is given, stand there once; the end of turn is none of them.
        `on_text`, of a single greedy answer, is given what there is of it after each token.
        """
        before, afters = self._around(prompt, len(tokens), hints)
        ends = [after + self._ids(prefix) for after in afters]
        inputs, mask, cache = self._splice(tokens, before, ends, decoding=True)
        max_new_tokens = self._within_context(inputs.shape[1], max_new_tokens)
        if beams > 1:  # read all but the last token once, not once for each beam
            cache = read_on(self.network, inputs[:, :-1], mask[:, :-1], cache)
            cache.batch_repeat_interleave(beams)  # as `generate` does with inputs and mask
        ids = self.network.generate(
            inputs_embeds=inputs, attention_mask=mask, cache=cache, max_new_tokens=max_new_tokens, do_sample=False,
            repetition_penalty=repetition_penalty, num_beams=beams, no_repeat_ngram_size=no_repeat,
            logits_processor=None if may_repeat is None else [SaidOnce({*may_repeat, self.tokenizer.eos_token_id})],
            eos_token_id=self.tokenizer.eos_token_id, pad_token_id=self.tokenizer.eos_token_id,
            streamer=None if on_text is None else SoFar(self.tokenizer, on_text),
        )  # fmt: skip
        return [(prefix + text).strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @torch.no_grad()
    def rank(
        self, tokens: Tensor, prompt: str, names: Sequence[str] | Sequence[Sequence[str]],
        hints: Sequence[str] | None = None, prior: Tensor | None = None, top: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Log-likelihood [B, C] of names, each with its end of turn, as answers about images; tokens [B, N, D_img].

        `names`: the same for all images, or a list for each, then -inf stands behind the shorter ones. One pass reads
        prompt, image and all names, as a tree; an LLM that can't (`tree_reach`) reads one name after the other.
        `top`: only as many names are read as it takes to be sure of the `top` best by log-likelihood + prior [B, C]
        (finite); the others get -inf. The best name by any prior is `(rank(...) + prior).argmax(1)`.
        """
        same = not names or isinstance(names[0], str)
        listed: Sequence[Any] = [tuple(names)] * len(tokens) if same else [tuple(some) for some in names]
        known = {some: self.answer_ids(some) for some in {*listed}}
        answers, tries = [known[some] for some in listed], {some: Trie(ids) for some, ids in known.items()}
        before, afters = self._around(prompt, len(tokens), hints)
        most = max(len(trie.tokens) for trie in tries.values())
        used = len(before) + len(self._adapted(tokens[:1])[0]) + max(map(len, afters))
        self._within_context(used + max((len(ids) for row in answers for ids in row), default=1) - 1, 1)
        if used + most > self.tree_reach:
            return self._one_by_one(tokens, prompt, answers, hints)
        if top is not None:
            return best(self.network, *self._splice(tokens, before, afters), answers, prior, top)
        step = max(1, MOST_LOGITS // ((most + 1) * len(self.tokenizer)))
        scores = []
        for start in range(0, len(tokens), step):
            part = slice(start, start + step)
            forest = Forest([tries[some] for some in listed[part]], self.device)
            root, logits, _ = grow(self.network, *self._splice(tokens[part], before, afters[part]), forest)
            found = forest.begun(root) + forest.gone_on(logits)
            scores.append(F.pad(found, (0, max(map(len, listed)) - found.shape[1]), value=-torch.inf))
        return torch.cat(scores)

    def _one_by_one(
        self, tokens: Tensor, prompt: str, answers: list[list[list[int]]], hints: Sequence[str] | None
    ) -> Tensor:
        """The same for any LLM, in a pass for each name."""
        widest = max(map(len, answers))
        scores = torch.full((len(answers), widest), -torch.inf, device=self.device)
        for number in range(widest):
            rows = [row for row, ids in enumerate(answers) if number < len(ids)]
            said = None if hints is None else [hints[row] for row in rows]
            logits, labels = self._taught(tokens[rows], prompt, [answers[row][number] for row in rows], said)
            lost = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
            scores[rows, number] = -lost.sum(1)
        return scores

    def _within_context(self, used: int, wanted: int) -> int:
        """How many of the `wanted` new tokens the LLM's context has room for; UserError when there is none."""
        left = wanted if self.context is None else min(wanted, self.context - used)
        if left < 1:
            raise UserError(
                "",
                f"prompt and image tokens are {used} tokens, the LLM's context is {self.context}",
                "shorten the prompt, give the adapter fewer tokens, or take another llm.model",
            )
        return left

    def answers(
        self, images: ImageTokens, positions: list[int], prompt: str, max_new_tokens: int, batch: int,
        hints: Sequence[str] | None = None, **decoding: Any,
    ) -> list[str]:  # fmt: skip
        """Greedy answers to one prompt about many cached images, batch by batch, with a progress bar.

        `batch` is halved, from there on, when a GPU's memory does not hold it. `hints`: one per position. `decoding` is
        what `generate` takes besides: prefix, repetition_penalty, beams, no_repeat, may_repeat.
        """

        def ask(tokens: Tensor, part: list[int]) -> list[str]:
            return self.generate(tokens, prompt, max_new_tokens, hints=_of(hints, part), **decoding)

        return self._asked("answers", images, positions, batch, ask, self._ends(prompt, hints))

    def ranks(
        self, images: ImageTokens, positions: list[int], prompt: str,
        names: Sequence[str] | Sequence[Sequence[str]], batch: int,
        hints: Sequence[str] | None = None, prior: Tensor | None = None, top: int | None = None,
    ) -> Tensor:  # fmt: skip
        """`rank` of many cached images, batch by batch as in `answers`: [images, C], on the CPU."""
        same = not names or isinstance(names[0], str)
        widest = len(names) if same else max(map(len, names), default=0)

        def ask(tokens: Tensor, part: list[int]) -> list[Tensor]:
            some = names if same else [names[row] for row in part]
            scores = self.rank(tokens, prompt, some, _of(hints, part), None if prior is None else prior[part], top)
            return list(F.pad(scores, (0, widest - scores.shape[1]), value=-torch.inf).cpu())

        found = self._asked("names ranked", images, positions, batch, ask)
        return torch.stack(found) if found else torch.empty(0, widest)

    @torch.no_grad()
    def states(
        self, images: ImageTokens, positions: list[int], prompt: str, batch: int, hints: Sequence[str] | None = None
    ) -> Tensor:
        """The LLM's last state, which its output layer reads the first word of an answer from, of many cached images:
        [images, D], float32, on the CPU; batch by batch as in `answers`."""

        def ask(tokens: Tensor, part: list[int]) -> list[Tensor]:
            return list(self._state(tokens, prompt, _of(hints, part)).cpu())

        found = self._asked("first words", images, positions, batch, ask, self._ends(prompt, hints))
        return torch.stack(found) if found else torch.empty(0, self.network.get_input_embeddings().weight.shape[1])

    def _state(self, tokens: Tensor, prompt: str, hints: Sequence[str] | None) -> Tensor:
        """Of a batch: [B, D], float32."""
        before, ends = self._around(prompt, len(tokens), hints)
        inputs, mask, cache = self._splice(tokens, before, ends, decoding=True)
        done = cache.get_seq_length() if cache is not None else 0
        read: list[Tensor] = []
        hook = self.network.get_output_embeddings().register_forward_pre_hook(lambda _, given: read.append(given[0]))
        try:
            self.network(
                inputs_embeds=inputs[:, done:], attention_mask=mask, position_ids=(mask.cumsum(1) - 1)[:, done:],
                cache=cache, use_cache=cache is not None, logits_to_keep=1,
            )  # fmt: skip
        finally:
            hook.remove()
        return read[0][:, -1].float()

    def _ends(self, prompt: str, hints: Sequence[str] | None) -> list[int] | None:
        """How many tokens stand behind each image, where rows to decode had better be of one length (`_splice`)."""
        if hints is None or not self.shares_prompt:
            return None
        return [len(after) for after in self._around(prompt, len(hints), hints)[1]]

    def _asked(
        self, title: str, images: ImageTokens, positions: list[int], batch: int,
        ask: Callable[[Tensor, list[int]], list[T]], ends: Sequence[int] | None = None,
    ) -> list[T]:  # fmt: skip
        """What `ask` gives for the tokens of many images, in parts of at most `batch`, and given which they are.

        `title` is the bar's. `ends`: parts are of images with the same number there, so none is padded.
        """
        order = sorted(range(len(positions)), key=ends.__getitem__) if ends else list(range(len(positions)))
        found: list[T] = []
        with progress_bar(title, len(positions), "images") as advance:
            while part := order[len(found) : len(found) + batch]:
                if ends:
                    part = [row for row in part if ends[row] == ends[part[0]]]
                try:
                    found += ask(images.tokens([positions[row] for row in part], self.device), part)
                except torch.OutOfMemoryError:
                    if len(part) == 1:
                        raise
                    batch = (len(part) + 1) // 2
                    torch.cuda.empty_cache()
                    continue
                advance(len(part))
        return [answer for _, answer in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]

    def _around(self, prompt: str, count: int, hints: Sequence[str] | None) -> tuple[list[int], list[list[int]]]:
        """Token ids before the image, and those behind it for each of `count` rows, with their hints."""
        said = [""] * count if hints is None else list(hints)
        known = {hint: self.prompt(prompt, hint) for hint in {*said}}
        return known[said[0]][0], [known[hint][1] for hint in said]

    def _splice(
        self, tokens: Tensor, before: list[int], ends: Sequence[list[int]], decoding: bool = False
    ) -> tuple[Tensor, Tensor, Any]:
        """LLM inputs [B, L, D] and their mask [B, L], both whole; and the cache of the words before the image, or None.

        Those words are the same in every row, so they go through the LLM once where that pays; `ends` are the ids
        behind the image. Rows to decode end together: if their lengths differ they are padded at their beginnings, and
        each goes through the LLM whole.
        """
        left, cache = decoding and len({*map(len, ends)}) > 1, None
        if self.shares_prompt and not left and len(ends) > 1:
            cache = read_once(self.network, before, len(ends))
        return *splice(self.network, before, self._adapted(tokens), ends, left), cache

    def _adapted(self, tokens: Tensor) -> Tensor:
        """Soft prompts [B, M, D], float32."""
        soft_prompts: Tensor = self.adapter(tokens.to(self.device).float())
        return soft_prompts

    def answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """Token ids of answers, each with its end of turn; one that is too long is cut and so does not end."""
        whole = [[*ids, self.tokenizer.eos_token_id] for ids in self.texts.ids(answers)]
        return [ids[: self.max_answer_tokens] for ids in whole]

    def is_cut(self, answer: str) -> bool:
        """Whether an answer is longer than `max_answer_tokens`, with its end of turn."""
        return len(self._ids(answer)) >= self.max_answer_tokens

    def _ids(self, text: str) -> list[int]:
        return self.texts.ids([text])[0]


def _of(hints: Sequence[str] | None, rows: list[int]) -> list[str] | None:
    return None if hints is None else [hints[row] for row in rows]


@dataclass(frozen=True)
class SaidOnce:
    """Generated tokens get no probability again, but for those that may be repeated; as transformers calls it."""

    may_repeat: set[int]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """ids [B, T] so far, scores [B, V]."""
        for row, said in enumerate(ids.tolist()):
            scores[row, sorted({*said} - self.may_repeat)] = -torch.inf
        return scores


class SoFar:
    """A streamer, as transformers calls what gets each token as it is generated, that hands on the text so far."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        self._tokenizer, self._on_text, self._ids = tokenizer, on_text, list[int]()

    def put(self, ids: Tensor) -> None:
        """Token ids of any shape, on the CPU."""
        self._ids += ids.flatten().tolist()
        self._on_text(self._tokenizer.decode(self._ids, skip_special_tokens=True).strip())

    def end(self) -> None:
        """Nothing: the answer itself is returned."""


def add_lora(llm: LanguageModel, params: LoRA) -> Any:
    """Insert a fresh LoRA (Hu et al. 2022) into the LLM, in place; returns PEFT's handle on it.

    Raises UserError when a named module does not exist in the LLM.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(
        r=params.r, lora_alpha=params.alpha, lora_dropout=params.dropout, target_modules=params.modules,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        lora = get_peft_model(llm.network, config)
    except ValueError as error:
        raise UserError(f"finetune.lora.modules {params.modules}", reason(error)) from None
    for layer in lora.modules():
        if isinstance(layer, LoraLayer) and params.dropout:
            layer.lora_dropout.update({name: QuickDropout(params.dropout) for name in layer.lora_dropout})
    return lora


@contextmanager
def tuned(llm: LanguageModel, folder: Path, weights: str) -> Iterator[VLM]:
    """A loaded LLM with an adapter from disk, in eval mode, and with the folder's LoRA where it has one.

    Afterwards the LLM is again as it was: one serves for several adapters. Raises UserError naming the file when
    something is missing.
    """
    adapter, hooks = load_adapter(folder, weights), _insert_lora(llm, folder)
    try:
        yield VLM(adapter, llm).eval()
    finally:
        for hook in hooks:
            hook.remove()


def load_vlm(params: LLM, folder: Path, weights: str, device: str = "auto") -> VLM:
    """The same for as long as the process lives, with an LLM of its own; what is missing is said before that loads."""
    adapter = load_adapter(folder, weights)
    llm = load_llm(params, device)
    _insert_lora(llm, folder)
    return VLM(adapter, llm).eval()


def _insert_lora(llm: LanguageModel, folder: Path) -> list[RemovableHandle]:
    """Insert a folder's LoRA, where it has one, into the LLM, in place.

    Raises UserError when the folder's adapter is of another LLM.
    """
    check_llm(folder, llm.network.get_input_embeddings())
    return insert_lora(llm.network, folder / "lora") if (folder / "lora").exists() else []
