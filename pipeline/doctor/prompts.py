"""Whether the LLM can be asked at all what the parameters ask: looked at before any long work."""

from __future__ import annotations

from typing import Any

from pipeline.config import Params, components
from pipeline.errors import UserError
from pipeline.llms.text import Texts
from pipeline.objectives.caption_ce import CaptionCESettings
from pipeline.tasks.base import Task


def check_prompts(params: Params, tokenizer: Any, context: int | None) -> None:
    """Write every prompt of the parameters into the LLM's chat template.

    Raises UserError when the template can't take one, or when the LLM's context has no room for it and the image
    tokens as far as the adapters' parameters tell their number.
    """
    texts = Texts(tokenizer)
    tasks = [Task.of(params.data[name].task, params.evaluate) for name in params.run.data]
    asked = [prompt for task in tasks for prompt in task.prompts]
    for name in params.run.adapters:
        recipes = [params.finetune_for(name, recipe) for recipe in params.run.recipes]
        prompts = [*asked, *(prompt for recipe in recipes for some in recipe.prompts.values() for prompt in some)]
        objective = params.pretrain_for(name).objective
        prompts += [objective.prompt] if isinstance(objective, CaptionCESettings) else []
        section = params.adapter(name)
        adapter = components.find("adapter", params.kind_of(name))
        image_tokens = adapter(adapter.Settings.model_validate(section.architecture)).tokens(1)
        for prompt in dict.fromkeys(prompts):
            count = sum(map(len, texts.prompt(prompt, params.llm.system_prompt))) + image_tokens
            if context is not None and count + 1 >= context:
                raise UserError(
                    "",
                    (
                        f"the prompt {prompt[:60]!r} and {image_tokens} image tokens of {name} are {count} "
                        f"tokens, the context of llm.model {params.llm.model} is {context}"
                    ),
                    f"shorten the prompt or adapters.{name}.architecture, or take another llm.model",
                )
