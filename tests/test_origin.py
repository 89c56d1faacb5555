"""Adapters and what they were made from: with another encoder, LLM or start they are refused with the remedy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.answers.best import best_adapter, finetuned
from pipeline.config import Params, load_params
from pipeline.errors import UserError
from pipeline.origin import (
    FILE,
    Origin,
    Words,
    check_encoder,
    check_llm,
    check_of_one_kind,
    check_results,
    check_tokens,
)
from pipeline.runs import Run
from pipeline.store.shards import Manifest

IDENTITY = {"encoder": "timm", "model": "resnet10t", "weights": "a" * 64, "preprocess": "crop", "dtype": "float32"}
RUN = Run("demo")
BASE = RUN.base
BOTH = {"captions": ["captions"], "classes": ["classes"]}


@pytest.fixture
def embedding() -> nn.Embedding:
    return nn.Embedding(500, 32)


@pytest.fixture
def trained(project: Path, embedding: nn.Embedding) -> Params:
    """Image tokens of both data sets, and an adapter pre-trained and fine-tuned on both."""
    params = load_params(Path(__file__).parents[1] / "profiles/demo.yaml")
    for data in ("captions", "classes"):
        manifest = Manifest("images", "print", [], encoder=IDENTITY)
        manifest.write(RUN.features("images", data))
    words, start = Words.of_module(embedding), BASE / "pretrain/mlp/last.safetensors"
    start.parent.mkdir(parents=True)
    start.write_bytes(b"weights")
    Origin.of(RUN, "captions", words).write(start.parent)
    for name, loss in (("mlp-captions", 2.0), ("mlp-classes", 1.0), ("query-captions", 1.0)):
        folder = BASE / "finetune" / name
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"val_loss": loss}))
        Origin.of(RUN, "captions", words, params.llm, start).write(folder)
    return params


def changed(folder: Path, **values: object) -> None:
    replace(Origin.read(folder), **values).write(folder)  # type: ignore[arg-type]


def test_what_fits_is_taken_and_read_back_equal(trained: Params, embedding: nn.Embedding) -> None:
    folders = check_results(RUN, "mlp", trained.llm, BOTH)
    assert [folder.name for folder in folders] == ["mlp", "mlp-captions", "mlp-classes"]
    for folder in folders:
        check_llm(folder, embedding)
        assert check_encoder(folder, IDENTITY | {"dtype": "bfloat16"}) == Origin.read(folder)


def test_tokens_of_another_extraction(trained: Params) -> None:
    Manifest("images", "other", [], encoder=IDENTITY).write(RUN.features("images", "classes"))
    check_results(RUN, "mlp", trained.llm, {"captions": ["captions"]})
    with pytest.raises(UserError, match=r"mlp-classes: .*other image tokens.*run `dvc repro finetune@mlp-classes`"):
        check_results(RUN, "mlp", trained.llm, BOTH)
    with pytest.raises(UserError, match="run `dvc repro pretrain@mlp`"):
        check_tokens(BASE / "pretrain/mlp", RUN, "classes")


@pytest.mark.parametrize(
    ("key", "value"),
    [("model", "vit_tiny_patch16_224"), ("weights", "b" * 64), ("preprocess", "squash"), ("encoder", "open_clip")],
)
def test_another_encoder(trained: Params, key: str, value: str) -> None:
    folder = BASE / "finetune/mlp-captions"
    with pytest.raises(UserError, match=f"another vision encoder .{key} .*{value[:12]}.*finetune@mlp-captions"):
        check_encoder(folder, IDENTITY | {key: value})


def test_another_llm_by_name_and_by_its_words(trained: Params, embedding: nn.Embedding) -> None:
    folder = BASE / "finetune/mlp-captions"
    other = trained.llm.model_copy(update={"system_prompt": "Be brief."})
    with pytest.raises(UserError, match=r"llm\.system_prompt '', params\.yaml has 'Be brief\.'; run `dvc repro"):
        check_results(RUN, "mlp", other, BOTH)
    rounded = nn.Embedding(500, 32, dtype=torch.bfloat16)
    rounded.weight.data = embedding.weight.data.bfloat16()
    check_llm(folder, rounded)
    for stranger in (nn.Embedding(500, 32), nn.Embedding(500, 64), nn.Embedding(20, 32)):
        with pytest.raises(UserError, match="trained for another LLM"):
            check_llm(folder, stranger)


def test_another_start(trained: Params) -> None:
    (BASE / "pretrain/mlp/last.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match="fine-tuned from other weights"):
        check_results(RUN, "mlp", trained.llm, BOTH)


def test_adapters_of_earlier_versions_and_none(trained: Params) -> None:
    (BASE / "finetune/mlp-captions" / FILE).unlink()
    with pytest.raises(UserError, match="of an earlier version; run `dvc repro finetune@mlp-captions`"):
        check_results(RUN, "mlp", trained.llm, BOTH)
    with pytest.raises(UserError, match="is not there; run `dvc repro pretrain@linear`"):
        check_results(RUN, "linear", trained.llm, BOTH)
    (BASE / "finetune/query-captions" / FILE).write_text("{")
    with pytest.raises(UserError, match=r"origin\.json: cannot be read"):
        Origin.read(BASE / "finetune/query-captions")


def test_answers_come_from_the_best_adapter_that_fits(trained: Params, capsys: pytest.CaptureFixture[str]) -> None:
    losses = finetuned(trained, "caption")
    assert best_adapter(trained, losses, IDENTITY).name == "query-captions"
    changed(BASE / "finetune/query-captions", encoder=IDENTITY | {"model": "resnet18"})
    assert best_adapter(trained, losses, IDENTITY).name == "mlp-captions"
    assert "left out: data/demo/finetune/query-captions: " in capsys.readouterr().err
    with pytest.raises(UserError, match="another vision encoder"):
        best_adapter(trained, losses, IDENTITY | {"weights": "c" * 64})


def test_losses_of_different_recipes_are_compared_on_one_data_set(trained: Params) -> None:
    both = trained.finetune.recipes["captions"].model_copy(update={"data": ["captions", "classes"]})
    recipes = trained.finetune.model_copy(update={"recipes": {**trained.finetune.recipes, "both": both}})
    run = trained.run.model_copy(update={"recipes": ["captions", "classes", "both"]})
    params = trained.model_copy(update={"finetune": recipes, "run": run})
    for name, values in (
        ("mlp-both", {"val_loss/captions": 0.5, "val_loss/classes": 9}),
        ("query-both", {"val_loss": 0.1}),
    ):
        (BASE / "finetune" / name).mkdir()
        (BASE / "finetune" / name / "metrics.json").write_text(json.dumps(values))
    losses = {folder.name: loss for folder, loss in finetuned(params, "caption").items()}
    assert losses == {"mlp-captions": 2.0, "query-captions": 1.0, "mlp-both": 0.5}  # query-both: of another recipe
    assert set(finetuned(params, "classify").values()) == {1.0, 9.0}


def test_features_of_two_models_are_not_mixed(trained: Params) -> None:
    check_of_one_kind(RUN, "images", ["captions", "classes"])
    Manifest("images", "other", [], encoder=IDENTITY).write(RUN.features("images", "classes"))
    with pytest.raises(
        UserError, match="captions and classes are of different encoders; run `dvc repro extract_images`"
    ):
        check_of_one_kind(RUN, "images", ["captions", "classes"])
    check_of_one_kind(RUN, "images", ["captions"])
