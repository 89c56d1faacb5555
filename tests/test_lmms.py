"""A run as a model of lmms-eval, by lmms-eval's own classes; skipped where that is not installed."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline.adapters.module import build_adapter
from pipeline.config import LLM
from pipeline.llms.load import load_llm
from pipeline.vlm import VLM

pytest.importorskip("lmms_eval.api.model", reason="lmms-eval is not installed")

from lmms_eval.api.instance import Instance
from lmms_eval.models.registry_v2 import ModelRegistryV2

from pipeline.lmms import manifest
from pipeline.lmms.model import TerraAlign

COLOURS = [(200, 20, 20), (20, 200, 20), (20, 20, 200)]


@pytest.fixture
def model(tiny_mistral: Path, monkeypatch: pytest.MonkeyPatch) -> TerraAlign:
    """Pictures are four tokens of their mean colour."""
    settings = LLM(loader="huggingface", model=str(tiny_mistral), dtype="float32")
    vlm = VLM(build_adapter("linear", 3, 32), load_llm(settings, "cpu")).eval()

    def encode(images: list[Image.Image]) -> torch.Tensor:
        means = [torch.tensor(image.resize((1, 1)).getpixel((0, 0))) / 255 for image in images]
        return torch.stack(means)[:, None].expand(-1, 4, -1)

    def hints(tokens: torch.Tensor) -> list[str]:
        return [f"It may be: {'a red one' if one[0, 0] > 0.5 else 'an apple'}." for one in tokens]

    monkeypatch.setattr("pipeline.lmms.model.load_params", lambda: None)
    monkeypatch.setattr("pipeline.lmms.model.loaded", lambda *_: (encode, vlm, hints))
    found = TerraAlign(adapter="mlp", recipe="captions", batch_size=2)
    found.task_dict = {"photos": {"test": [{"image": Image.new("RGB", (9, 9), colour)} for colour in COLOURS]}}
    return found


def asked(kind: Any, doc: int, context: str, second: Any) -> Instance:
    arguments = (context, second, lambda one: [one["image"]], doc, "photos", "test")
    return Instance(kind, arguments, 0, {"task": "photos", "doc_id": doc, "repeats": 1})


def test_the_registry_finds_the_model() -> None:
    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("terraalign") is TerraAlign
    named = {point.name: point.value for point in entry_points(group="lmms_eval.models")}
    assert named.get("terraalign", "pipeline.lmms:manifest") == "pipeline.lmms:manifest"


def test_texts_are_those_of_the_model_itself(model: TerraAlign) -> None:
    options = {"max_new_tokens": 5, "temperature": 0, "do_sample": False, "num_beams": 1}
    requests = [asked("generate_until", i, "<image>\nWhat is it?", options) for i in (0, 1, 2)]
    requests.insert(
        1, asked("generate_until", 2, "Describe this image", {**options, "max_new_tokens": 3, "until": ["a"]})
    )
    found = model.generate_until(requests)
    for request, text in zip(requests, found, strict=True):
        context, own, _, doc, _, _ = request.args
        tokens = model.encode([model.task_dict["photos"]["test"][doc]["image"]])
        [alone] = model.vlm.generate(
            tokens, context.replace("<image>", "").strip(), own["max_new_tokens"], hints=model.hints(tokens)
        )
        assert text == (alone.split("a")[0] if "until" in own else alone)
    with pytest.raises(ValueError, match="temperature: 0"):
        model.generate_until([asked("generate_until", 0, "x", {"temperature": 1.0})])


def test_costs_of_choices_are_minus_their_log_likelihoods(model: TerraAlign) -> None:
    """Against one pass of the network for each choice; lmms-eval's accuracy takes the lowest."""
    names = ["a cat", "an apple", "a dog on red"]
    requests = [asked("loglikelihood", doc, "What is it?", f" {name}") for doc in (0, 2) for name in names]
    found = model.loglikelihood(requests)
    for request, (cost, greedy) in zip(requests, found, strict=True):
        _, continuation, _, doc, _, _ = request.args
        tokens = model.encode([model.task_dict["photos"]["test"][doc]["image"]])
        [hint] = hints = model.hints(tokens)
        before, after = model.vlm.prompt("What is it?", hint)
        answer = [*model.vlm.tokenizer(continuation.strip(), add_special_tokens=False).input_ids, 1]
        embed = model.vlm.network.get_input_embeddings()
        parts = [embed(torch.tensor(before)), model.vlm.adapter(tokens)[0], embed(torch.tensor(after + answer))]
        logits = model.vlm.network(inputs_embeds=torch.cat(parts)[None]).logits[0, -len(answer) - 1 : -1]
        assert cost == pytest.approx(F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item(), rel=1e-4)
        [said] = model.vlm.generate(tokens, "What is it?", len(answer), hints=hints)
        assert greedy == (said == continuation.strip())
