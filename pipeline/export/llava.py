"""A run as a folder that transformers' own LlavaForConditionalGeneration loads, with processor and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.config import LLM
from pipeline.errors import UserError, UserErrors
from pipeline.export.card import card_of
from pipeline.export.folder import new_folder, rendered
from pipeline.export.processor import image_token, inputs_of, processor_of
from pipeline.export.projector import Projector, projector_of
from pipeline.export.towers import Tower, tower_of
from pipeline.export.trained import Trained
from pipeline.llms.load import LanguageModel, load_llm
from pipeline.llms.spliced import splice
from pipeline.media.preprocess import Preprocess, normalise
from pipeline.origin import check_llm
from pipeline.vlm import VLM

LARGEST_ERROR = 1e-3  # of float32 logits, as a share of the largest


def export(trained: Trained, to: Path) -> list[str]:
    """Write the folder; returns the names of its files.

    Raises UserError where LLaVA has no room for what was trained, and for a folder with files already. What is written
    has given the logits that ours gives.
    """
    tower, projector, steps = _fitting(trained)
    with new_folder(to) as folder:
        llm = _llm(trained.params.llm)
        check_llm(trained.folder, llm.network.get_input_embeddings())
        picture = _noise(steps)
        lora, expected = _ours(trained, llm, picture)
        network = lora.merge_and_unload()
        place = image_token(llm.tokenizer)
        if place >= network.get_input_embeddings().weight.shape[0]:
            network.resize_token_embeddings(place + 1, mean_resizing=False)
        model = _assembled(network, tower, projector, place, trained.shape[0])
        processor = processor_of(llm, steps, tower, trained)
        _check(model, processor, trained, picture, expected)
        model.generation_config = _generation(network, trained, place)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        use = rendered("llava.md.jinja", {"prompt": trained.asked.text.strip(), "tokens": trained.task.max_tokens})
        (folder / "README.md").write_text(card_of(trained, use, "transformers"), encoding="utf-8")
    return sorted(str(path.relative_to(to)) for path in to.rglob("*") if path.is_file())


def _fitting(trained: Trained) -> tuple[Tower, Projector, Preprocess]:
    """The parts as LLaVA has them. Raises UserErrors with all that it has no room for, the encoder's first: who mends
    one after the other would train as often."""
    faults: list[UserError] = []
    vision, tower, projector, steps = trained.params.vision, None, None, trained.preprocess
    try:
        tower = tower_of(trained.parts, f"vision.encoder {vision.encoder} {vision.model or ''}".rstrip())
        if steps is None or steps.square:
            why = "its transform of pictures is none that a processor of transformers has"
            faults.append(UserError(f"vision.encoder {vision.encoder}", why, "take a CLIP or SigLIP of open_clip"))
    except UserError as fault:
        faults.append(fault)
    try:
        projector = projector_of(trained.adapter, trained.adapter_name, trained.shape[0])
    except UserErrors as several:
        faults += several.faults
    if trained.hints:
        key = f"finetune.recipes.{trained.recipe_name}.hints is {trained.hints}"
        why = "names that are found for each picture stand in its prompt, which LLaVA has no room for"
        remedy = "leave out --format llava, export another recipe (--recipe), or train this one with hints: 0"
        faults.append(UserError(key, why, remedy))
    if faults or tower is None or projector is None or steps is None:
        raise UserErrors(faults)
    return tower, projector, steps


def _llm(params: LLM) -> LanguageModel:
    """The LLM on the CPU, in the values that its 4 bits stand for where it has 4."""
    llm = load_llm(params, "cpu")
    network = llm.network
    if getattr(network, "is_quantized", False) and any(p.dtype == torch.uint8 for p in network.parameters()):
        network = network.dequantize(network.get_input_embeddings().weight.dtype)
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config
    return LanguageModel(network, llm.tokenizer, llm.system_prompt, llm.max_caption_tokens)


def _noise(steps: Preprocess) -> Tensor:
    """A picture of noise as the encoder takes it, float32 [1, 3, H, W]."""
    height, width = steps.shape
    image = Image.effect_noise((width, height), 80).convert("RGB")
    return normalise(steps(image)[None], steps.constants(torch.device("cpu")))


@torch.inference_mode()
def _ours(trained: Trained, llm: LanguageModel, pixels: Tensor) -> tuple[Any, Tensor]:
    """PEFT's handle on the LLM with the LoRA, and the logits [L, V] of the prompt with a picture in it."""
    from peft import PeftModel

    with torch.inference_mode(False):
        lora = PeftModel.from_pretrained(llm.network, trained.folder / "lora")
    model = VLM(trained.adapter, llm).eval()
    soft_prompt = model.adapter(trained.parts.tokens(pixels))
    inputs, _ = splice(llm.network, trained.asked.before, soft_prompt, [trained.asked.after])
    return lora, llm.network(inputs_embeds=inputs).logits[0].float()


def _assembled(network: Any, tower: Tower, projector: Projector, place: int, count: int) -> Any:
    """LLaVA of these parts."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    head, text = network.get_output_embeddings(), network.config
    config = LlavaConfig(
        vision_config=tower.model.config, text_config=text, image_token_index=place, image_seq_length=count,
        projector_hidden_act=projector.act, vision_feature_select_strategy="default" if tower.prefix else "full",
        vision_feature_layer=[-2, -1] if tower.normed else -1, tie_word_embeddings=bool(text.tie_word_embeddings),
    )  # fmt: skip
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    fits = type(model.model.language_model) is type(network.base_model) and type(head) is nn.Linear
    if not fits or head.bias is not None:
        why = f"its network ({type(network).__name__}) has more than layers and one matrix behind them"
        raise UserError("llm.model", why, "for LLaVA take one such as Llama, Mistral or Qwen2")
    model.model.vision_tower, model.model.language_model, model.lm_head = tower.model, network.base_model, head
    weight, bias = projector.first
    weight = torch.cat([-weight, weight], 1) if tower.normed else weight  # the difference of the last two states
    first, second = nn.Linear(weight.shape[1], len(weight)), nn.Linear(len(weight), len(weight))
    for layer, values in ((first, (weight, bias)), (second, projector.second)):
        layer.weight, layer.bias = (nn.Parameter(value.clone(), requires_grad=False) for value in values)
    model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2 = first, second
    return model.eval().to(network.get_input_embeddings().weight.dtype)


@torch.inference_mode()
def _check(model: Any, processor: Any, trained: Trained, pixels: Tensor, expected: Tensor) -> None:
    """UserError where LLaVA gives other logits: an LLM that does more than its parts here."""
    steps = trained.preprocess
    assert steps is not None
    ids = inputs_of(processor, trained.asked.text, Image.new("RGB", steps.shape[::-1]))["input_ids"]
    found = model(input_ids=ids, pixel_values=pixels.to(model.dtype)).logits[0].float()[:, : expected.shape[1]]
    error = float((found - expected[:, : found.shape[1]]).abs().max() / expected.abs().max())
    limit = LARGEST_ERROR if model.dtype == torch.float32 else 0.1  # bfloat16 has 8 bits
    if not error <= limit:
        why = f"LLaVA with it gives other logits (by {error:.2g} of the largest)"
        raise UserError(f"llm.model {trained.params.llm.model}", why, "use the export without --format llava")


def _generation(network: Any, trained: Trained, place: int) -> Any:
    """How answers are decoded; the word for pictures is never said."""
    from transformers import GenerationConfig

    own = {key: value for key, value in trained.asked.generation.items() if key != "max_new_tokens"}
    return GenerationConfig(**own, max_new_tokens=trained.task.max_tokens, suppress_tokens=[place])
