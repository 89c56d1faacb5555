"""LLaVA's processor: a chat and a picture to the token ids and the pixels that ours are trained with."""

from __future__ import annotations

import json
from typing import Any

from PIL import Image

from pipeline.errors import UserError
from pipeline.export.towers import Tower
from pipeline.export.trained import Trained
from pipeline.llms.load import LanguageModel
from pipeline.media.preprocess import RESAMPLING, Preprocess

IMAGE = "<image>"
# Before the LLM's own template: the parts of a message as lines, a picture as its word.
FLAT = """{%- set ns = namespace(said=[], text='') -%}
{%- for message in messages -%}
{%- set ns.text = message['content'] if message['content'] is string else '' -%}
{%- for part in (message['content'] if message['content'] is not string else []) -%}
{%- set ns.text = ns.text + ('' if loop.first else '\\n') + ('<image>' if part['type'] == 'image' else part['text']) -%}
{%- endfor -%}
{%- set ns.said = ns.said + [{'role': message['role'], 'content': ns.text}] -%}
{%- endfor -%}
"""
SYSTEM = """{%- if ns.said[0]['role'] != 'system' -%}
{%- set ns.said = [{'role': 'system', 'content': SYSTEM_PROMPT}] + ns.said -%}
{%- endif -%}
"""
MOVED = """{%- set ns.text = SYSTEM_PROMPT + '\\n' + ns.said[0]['content'] -%}
{%- set ns.said = [{'role': 'user', 'content': ns.text}] + ns.said[1:] -%}
"""


def image_token(tokenizer: Any) -> int:
    """The id of the word that stands for a picture's token, which the tokenizer gets if it has none."""
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE]})
    return int(tokenizer.convert_tokens_to_ids(IMAGE))


def processor_of(llm: LanguageModel, steps: Preprocess, tower: Tower, trained: Trained) -> Any:
    """UserError where the tokenizer gives other ids for the prompt than those that were trained with."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(
        size={"shortest_edge": steps.size} if isinstance(steps.size, int) else _sides(steps.size),
        crop_size=_sides(steps.shape), do_center_crop=steps.crop is not None, rescale_factor=1 / steps.scale,
        resample=int(RESAMPLING[steps.resampling]), image_mean=list(steps.mean), image_std=list(steps.std),
    )  # fmt: skip
    asked, place = trained.asked, image_token(llm.tokenizer)
    wanted = [*asked.before, *[place] * trained.shape[0], *asked.after]
    for moved in (False, True):
        processor = LlavaProcessor(
            images, llm.tokenizer, patch_size=tower.model.config.patch_size,
            vision_feature_select_strategy="default" if tower.prefix else "full",
            num_additional_image_tokens=tower.prefix,
            chat_template=chat_template(llm.tokenizer.chat_template, llm.system_prompt, moved),
        )  # fmt: skip
        try:
            ids = inputs_of(processor, asked.text, Image.new("RGB", steps.shape[::-1]))["input_ids"][0].tolist()
        except Exception:  # a template is a program of its own; what it refuses it may take the other way
            continue
        if ids == wanted:
            return processor
    why = "its tokenizer gives other token ids when the words before and behind a picture come as one text"
    raise UserError(f"llm.model {trained.params.llm.model}", why, "export it without --format llava")


def inputs_of(processor: Any, prompt: str, image: Image.Image) -> Any:
    """What a model gets of a question about a picture."""
    content = [{"type": "text", "text": prompt}, {"type": "image", "image": image}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip


def chat_template(own: str, system: str | None, moved: bool) -> str:
    """The LLM's own, for messages with pictures in them; it says the system prompt by itself.

    `moved`: before the user's words, where the LLM has no role for it.
    """
    said = ""
    if system is not None and (system or not moved):
        said = (MOVED if moved else SYSTEM).replace("SYSTEM_PROMPT", json.dumps(system, ensure_ascii=False))
    return f"{FLAT}{said}{{%- set messages = ns.said -%}}{own}"


def _sides(size: tuple[int, int]) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}
