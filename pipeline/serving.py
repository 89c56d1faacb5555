"""Our prompts for engines that serve the LLM alone: embeddings of words with a picture's soft prompt among them.

vLLM takes them in place of text (`vllm serve MODEL --enable-prompt-embeds`, its page "Prompt Embedding Inputs"). Here
are an adapter and the LLM's input embeddings; the LLM itself is there.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from torch import Tensor

from pipeline.adapters.module import Adapter, load_adapter
from pipeline.config import LLM
from pipeline.errors import UserError
from pipeline.llms.load import load_embedding, load_tokenizer
from pipeline.llms.spliced import splice
from pipeline.llms.text import Texts
from pipeline.origin import check_llm


class Prompter:
    """Prompts as `VLM` writes them, without the LLM's layers."""

    def __init__(self, adapter: Adapter, embedding: torch.nn.Embedding, tokenizer: Any, system_prompt: str | None):
        self.adapter, self.embedding, self.texts, self.system_prompt = (
            adapter,
            embedding,
            Texts(tokenizer),
            system_prompt,
        )

    @classmethod
    def load(cls, llm: LLM, folder: Path) -> Prompter:
        """Of a fine-tuned adapter's folder. Raises UserError when something is missing or of another LLM."""
        adapter, embedding = load_adapter(folder, "adapter"), load_embedding(llm)
        check_llm(folder, embedding)
        return cls(adapter, embedding, load_tokenizer(llm), llm.system_prompt)

    @torch.no_grad()
    def embeddings(self, tokens: Tensor, prompt: str, hint: str = "") -> list[Tensor]:
        """What the LLM reads of a prompt about each of some pictures, float32 [L, D]; tokens [B, N, D_img]."""
        before, after = self.texts.prompt(prompt, self.system_prompt, hint)
        words = SimpleNamespace(get_input_embeddings=lambda: self.embedding)
        inputs, _ = splice(words, before, self.adapter(tokens.float()), [after] * len(tokens))
        return list(inputs)


def as_text(embeddings: Tensor) -> str:
    """A tensor [L, D] as vLLM's requests hold it: base64 of what torch.save writes."""
    buffer = io.BytesIO()
    torch.save(embeddings.detach().cpu().contiguous().clone(), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def complete(
    url: str, model: str, prompts: Sequence[Tensor], max_tokens: int, key: str | None = None, timeout: float = 600,
    **sampling: Any,
) -> list[str]:  # fmt: skip
    """Answers of a vLLM server, such as http://127.0.0.1:8000, to prompts [L, D], which it reads side by side: greedy.

    `model` is its name there; `sampling` are further keys of the request. Raises UserError when the server is not
    there, refuses, or answers something else.
    """
    asked = {
        "model": model,
        "prompt_embeds": [as_text(one) for one in prompts],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    place = f"{url.rstrip('/')}/v1/completions"
    request = Request(place, json.dumps({**asked, **sampling}).encode(), headers)
    try:
        with urlopen(request, timeout=timeout) as response:
            choices = sorted(json.load(response)["choices"], key=lambda choice: choice["index"])
            answers = [str(choice["text"]).strip() for choice in choices]
    except HTTPError as error:
        reason = " ".join(error.read().decode("utf-8", "replace").split())[:300]
        raise UserError(place, f"{error.code}: {reason}", "start it with --enable-prompt-embeds") from None
    except (URLError, OSError) as error:
        raise UserError(place, f"cannot be reached ({error})", "start `vllm serve` there") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(place, f"no answer of the kind that vLLM gives ({error!r})", "is it a vLLM server?") from None
    if len(answers) != len(prompts):
        raise UserError(place, f"{len(answers)} answers to {len(prompts)} prompts", "ask for one answer each (n: 1)")
    return answers
