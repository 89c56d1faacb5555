"""Names without the LLM, and the prompts that hold them: what stage `name` fitted, for Python with torch and POT."""

from __future__ import annotations

import secrets
from typing import Any

from torch import Tensor

from pipeline.errors import UserError
from pipeline.export.trained import Trained
from pipeline.naming.namer import Namer
from pipeline.naming.table import HINTED
from pipeline.naming.weigh import LOWEST


def values_of(namer: Namer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What naming.py.jinja has to know of a namer, and its tensors; of EMD and discriminant only what has a weight."""
    nearest, (emd, discriminant) = namer.nearest, namer.scales.together
    values: dict[str, Any] = {"names": namer.names, "emd": emd, "discriminant": discriminant, "lowest": LOWEST}
    tensors: dict[str, Tensor | None] = {}
    if emd:
        values |= {"cost": nearest.cost, "unmatched": nearest.unmatched, "offsets": nearest.offsets}
        tensors |= {"words": nearest.words, "word_weights": nearest.weights, "bias": nearest.bias}
        tensors |= {"into_space": nearest.into_space, "center": nearest.center if nearest.cost == "cosine" else None}
    if discriminant:
        tensors |= {"weight": namer.discriminant.weight, "discriminant_bias": namer.discriminant.bias}
    return values, {key: value.cpu().contiguous() for key, value in tensors.items() if value is not None}


def hint_of(trained: Trained) -> dict[str, Any]:
    """How names stand in the prompt: at most so many, `until` that probability, `before` and `after` these texts.

    Raises UserError where the tokenizer alone, which is all that the example has, does not give the token ids that the
    LLM has learned with: of each name, and of names side by side.
    """
    texts, task, names = trained.texts, trained.task, trained.namer.names

    def ours(some: list[str]) -> list[int]:
        return texts.prompt(task.prompt, trained.params.llm.system_prompt, task.hint(some))[1]

    mark = secrets.token_hex(8)
    before, _, after = texts.tokenizer.decode(ours([mark]), clean_up_tokenization_spaces=False).partition(mark)
    together = [names[at : at + trained.hints] for at in range(0, len(names), trained.hints)]
    for some in [*([name] for name in names), *together]:
        text = before + ", ".join(some) + after
        if texts.tokenizer(text, add_special_tokens=False)["input_ids"] != ours(some):
            raise UserError(
                f"data.{trained.data}",
                f"in a prompt the LLM's tokenizer alone reads {', '.join(some)[:80]!r} otherwise than TerraAlign",
                "rename classes with words of the chat format in them, or export a recipe with hints: 0",
            )
    return {"most": trained.hints, "until": HINTED, "before": before, "after": after}
