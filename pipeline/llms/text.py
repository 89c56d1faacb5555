"""Texts as token ids: what people write is never read as special tokens, those of the chat template always are."""

from __future__ import annotations

import json
import re
import secrets
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from pipeline.errors import UserError

BRACKETED = re.compile(r"[<\[{＜].*[>\]}＞]")


class Texts:
    """A tokenizer for texts that people wrote: captions, class names, prompts, the system prompt.

    Control tokens are the tokenizer's special tokens and those added in brackets, such as <image>; words and spaces
    that were added to a vocabulary are none.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._control = {c: n for c, n in added.items() if c in special or BRACKETED.fullmatch(c)}
        self._control_ids = set(self._control.values())
        longest_first = sorted(self._control, key=len, reverse=True)
        self._contents = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._like = re.compile("|".join(re.escape(_folded(content)) for content in longest_first) or r"(?!)")
        # Words that no text has: whoever could guess them might put them there.
        self._secret = secrets.token_hex(8)
        self.image = f"terraalign{self._secret}image"
        self._said = False

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of some texts, without BOS; the tokenizer's own wherever these hold no control token."""
        found: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return [
            ids if self._control_ids.isdisjoint(ids) else self._plain(text)
            for text, ids in zip(texts, found, strict=True)
        ]

    def may_hold_control(self, text: str) -> bool:
        """Whether a tokenizer might read a control token in a text; sometimes true of a text where it does not."""
        return bool(self._like.search(_folded(text)))

    def prompt(self, text: str, system: str | None, hint: str = "") -> tuple[list[int], list[int]]:
        """Token ids before and after the image of the chat that asks `text` about it, up to the answer.

        `system`: the system prompt, None for what the template says by itself. A template without a system role gets
        it before the prompt, which is said on stderr, once. `hint`: what the user says behind the image, on a line of
        its own. Raises UserError when the template can't do either.
        """
        guarded = any(self.may_hold_control(said) for said in (text, system or "", hint))
        hide = self._hidden if guarded else str
        chat = self._chat(hide(text), None if system is None else hide(system), hide(hint))
        before, after = chat.split(self.image)
        if guarded:
            return self._guarded_ids(before), self._guarded_ids(after)
        plain = [self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after)]
        return plain[0], plain[1]

    def _plain(self, text: str) -> list[int]:
        """The ids of a text that holds control tokens, all of it read as words."""
        if self.tokenizer.is_fast:
            ids: list[int] = self._closed.encode(text, add_special_tokens=False).ids
            return ids
        pieces = self.tokenizer.tokenize(text, split_special_tokens=True)
        ids = self.tokenizer.convert_tokens_to_ids(pieces)
        unknown = self.tokenizer.unk_token_id
        if not self._control_ids.isdisjoint(set(ids) - {unknown}):
            raise UserError(f"{text[:60]!r}", "the LLM's tokenizer reads a special token in it", "reword this text")
        return ids

    @cached_property
    def _names(self) -> dict[str, str]:
        """For each control token the name that it has in the closed tokenizer, and so in no text."""
        return {c: f"\U0010ffff{self._secret}{number}\U0010ffff" for number, c in enumerate(self._control)}

    @cached_property
    def _closed(self) -> Any:
        """The tokenizer with its control tokens renamed, ids and all else alike: it can't find them in texts.

        Leaving them out instead would shift the ids of other added tokens; and a vocabulary that holds them as words
        would still find them, which transformers' split_special_tokens does not prevent either.
        """
        from tokenizers import Tokenizer

        spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
        names = self._names
        for token in spec["added_tokens"]:
            if token["content"] in names:
                token |= {"content": names[token["content"]], "normalized": False}
        model = spec["model"]
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {names.get(word, word): number for word, number in model["vocab"].items()}
        elif isinstance(model.get("vocab"), list):
            model["vocab"] = [[names.get(word, word), score] for word, score in model["vocab"]]
        if model.get("merges"):
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            model["merges"] = [(a, b) for a, b in pairs if not {a, b, a + b} & names.keys()]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        return Tokenizer.from_str(json.dumps({**spec, "truncation": None, "padding": None}))

    def _hidden(self, text: str) -> str:
        """A text with stand-ins for the control tokens in it, which go through a template as words do."""
        numbers = {content: number for number, content in enumerate(self._control)}
        return self._contents.sub(lambda found: f"terraalign{self._secret}x{numbers[found[0]]}x", text)

    def _guarded_ids(self, chat: str) -> list[int]:
        """Ids of a piece of a chat: control tokens are the template's, stand-ins the words they stand for."""
        if not self.tokenizer.is_fast:
            raise UserError(
                "", "a prompt, hint or llm.system_prompt holds a special token of this tokenizer", "reword it"
            )
        contents = list(self._control)
        chat = self._contents.sub(lambda found: self._names[found[0]], chat)
        chat = re.sub(rf"terraalign{self._secret}x(\d+)x", lambda found: contents[int(found[1])], chat)
        ids: list[int] = self._closed.encode(chat, add_special_tokens=False).ids
        return ids

    def _chat(self, text: str, system: str | None, hint: str) -> str:
        """The chat as the template writes it, the image's place in it exactly once, after the whole prompt."""
        reasons = []
        for messages, moved in self._ways(text, system, hint):
            chat, reason = self._render(messages, [text, *([] if moved or system is None else [system])], hint)
            if reason is None:
                if moved and system and not self._said:
                    print(
                        "the chat template has no system role: llm.system_prompt goes before the prompt",
                        file=sys.stderr,
                    )
                    self._said = True
                return chat
            reasons.append(reason)
        raise UserError("", f"the LLM's chat template {reasons[0]}", "correct it, or take another llm.model")

    def _ways(self, text: str, system: str | None, hint: str) -> Iterator[tuple[list[dict[str, Any]], bool]]:
        """Messages as templates want them: texts or lists of parts, the last two without a system role."""
        whole = f"{text}\n{self.image}\n{hint}" if hint.strip() else f"{text}\n{self.image}"
        for moved in (False,) if system is None else (False, True):
            user = f"{system}\n{whole}" if moved and system else whole
            said = [("user", user)] if moved or system is None else [("system", system), ("user", user)]
            yield [{"role": role, "content": content} for role, content in said], moved
            yield [{"role": role, "content": [{"type": "text", "text": content}]} for role, content in said], moved

    def _render(self, messages: list[dict[str, Any]], wanted: list[str], hint: str) -> tuple[str, str | None]:
        """The chat, and what is wrong with it: `wanted` has to be before the image, the hint behind it."""
        try:
            chat: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of its own
            return "", f"refuses the prompt ({' '.join(str(error).split())[:120] or type(error).__name__})"
        count = chat.count(self.image)
        if count != 1:
            return chat, "leaves the prompt out" if count == 0 else f"repeats the prompt {count} times"
        before, after = chat.split(self.image)
        lost = next((text for text in wanted if text.strip() not in before), None)
        lost = hint if lost is None and hint.strip() not in after else lost
        return chat, None if lost is None else f"changes or drops {lost[:60]!r}"


def _folded(text: str) -> str:
    """A text as the most forgetful normaliser of a tokenizer might see it."""
    return unicodedata.normalize("NFKC", text).casefold()
