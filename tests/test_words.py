"""Captions and labels that are too long, empty or all the same, through extraction, training and evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from transformers import ByT5Tokenizer
from typer.testing import CliRunner

from pipeline.config import Params, load_params
from pipeline.doctor.prompts import check_prompts
from pipeline.errors import UserError
from pipeline.extraction.captions import Captions, extract_captions, text_hash
from pipeline.llms.load import load_embedding, load_tokenizer
from pipeline.llms.text import Texts
from pipeline.metrics.base import read_figures
from pipeline.metrics.probe import linear_probe
from pipeline.naming.table import Named
from pipeline.objectives.pairs import Pairs
from pipeline.runs import Run
from pipeline.store.reader import CaptionTokens, ImageTokens
from pipeline.tasks.base import Task
from pipeline.tasks.naming import find_class
from pipeline.training.finetune import Examples
from stages import cli

runner = CliRunner()
LONG = "a red square and a blue one " * 1500


def run(*arguments: str) -> str:
    result = runner.invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def rows_of(captions: list[list[str]], labels: list[str] | None = None) -> pd.DataFrame:
    """Rows of a prepared manifest, six in ten for training."""
    count = len(captions)
    splits = [("train", "train", "train", "val", "test")[i % 5] for i in range(count)]
    return pd.DataFrame(
        {
            "id": [f"p{i:02d}" for i in range(count)],
            "image": [f"p{i:02d}.jpg" for i in range(count)],
            "sha256": [f"{i:064x}" for i in range(count)],
            "captions": captions,
            "label": labels or [None] * count,
            "split": splits,
            "quarantine": pd.Series([None] * count, dtype=object),
        }
    )


def prepared(params: Params, data: str, rows: pd.DataFrame) -> None:
    path = Run.of(params).manifest(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(path)


def extracted(params: Params, data: str) -> CaptionTokens:
    tokenizer, embedding = load_tokenizer(params.llm), load_embedding(params.llm)
    manifest = extract_captions(params, data, tokenizer, embedding, lambda n: None)
    manifest.write(Run.of(params).features("text", data))
    return CaptionTokens.open(Run.of(params), data)


def images_of(rows: pd.DataFrame) -> ImageTokens:
    tokens = np.random.default_rng(0).standard_normal((len(rows), 2, 3), dtype=np.float32)
    return ImageTokens(rows, (2, 3), "float32", lambda at: {"tokens": tokens[at]})


def test_names_in_the_store_change_only_where_the_ids_do(tiny_params: Params) -> None:
    words = Captions(load_tokenizer(tiny_params.llm), 20)
    for texts in (["a cat"], ["a cat", "a dog on a red background, a picture"], [], ["1 < 2 <b> é 図"]):
        assert words.digest("p", texts) == text_hash(texts)
    for texts in (["a</s> cat"], ["a cat", LONG]):
        assert words.digest("p", texts) != text_hash(texts)
    assert words.digest("p", [LONG]) != Captions(load_tokenizer(tiny_params.llm), 21).digest("p", [LONG])


def test_long_captions_are_cut_and_named(tiny_params: Params, capsys: pytest.CaptureFixture[str]) -> None:
    prepared(tiny_params, "captions", rows_of([["a cat", LONG] if i % 2 else ["a dog"] for i in range(10)]))
    found = extracted(tiny_params, "captions")
    assert [len(ids) for ids in found.captions("p01")] == [len(found.captions("p01")[0]), 512]
    said = capsys.readouterr().err
    assert (
        "captions of 5 pictures are cut to 512 tokens (llm.max_caption_tokens" in said and "p01, p03, p05, ..." in said
    )
    shorter = tiny_params.model_copy(update={"llm": tiny_params.llm.model_copy(update={"max_caption_tokens": 9})})
    assert len(extracted(shorter, "captions").captions("p01")[1]) == 9
    assert len(extracted(tiny_params, "captions").captions("p01")[1]) == 512, "the store mixes up the two"


def test_shards_of_before_with_special_tokens_are_not_taken(tiny_params: Params) -> None:
    prepared(tiny_params, "captions", rows_of([["a</s> cat"]] * 10))
    assert 1 not in extracted(tiny_params, "captions").captions("p00")[0]


def test_a_context_cuts_too(tiny_params: Params) -> None:
    prepared(tiny_params, "captions", rows_of([[LONG]] * 5))
    tokenizer, embedding = load_tokenizer(tiny_params.llm), load_embedding(tiny_params.llm)
    manifest = extract_captions(tiny_params, "captions", tokenizer, embedding, lambda n: None, context=33)
    manifest.write(Run.of(tiny_params).features("text", "captions"))
    assert len(CaptionTokens.open(Run.of(tiny_params), "captions").captions("p00")[0]) == 33


def test_prompts_are_tried_before_any_work(tiny_params: Params) -> None:
    tokenizer = load_tokenizer(tiny_params.llm)
    check_prompts(tiny_params, tokenizer, None)
    with pytest.raises(UserError, match=r"image tokens of mlp are \d+ tokens, the context of llm.model .* is 12"):
        check_prompts(tiny_params, tokenizer, 12)
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(UserError, match="chat template refuses the prompt"):
        check_prompts(tiny_params, tokenizer, None)


def examples_of(params: Params, rows: pd.DataFrame, data: str) -> Examples:
    task = Task.of(params.data[data].task, params.evaluate)
    return Examples(images_of(rows), data, task, params.finetune.recipes[data], 0)


def test_decoys_show_the_tokens_of_another_of_the_hints(tiny_params: Params) -> None:
    rows = rows_of([["x"]] * 12, labels=["a", "b", "c"] * 4)
    hints = pd.DataFrame({"label": list(rows["label"]), "candidates": [["b", "a"]] * 12}, index=list(rows["id"]))
    hints["probabilities"] = [[0.6, 0.3]] * 12
    recipe = tiny_params.finetune.recipes["classes"]

    def shown(decoys: float) -> set[str]:
        settings = recipe.model_copy(update={"hints": 2, "decoys": decoys})
        task, named = Task.of("classify", tiny_params.evaluate), Named(["a", "b", "c"], hints)
        examples = Examples(images_of(rows), "classes", task, settings, 0, named)
        of_c = [i for i in examples.train if rows["label"].iloc[i] == "c"]
        assert set(examples.draw([examples.train.index(of_c[0])])[3] or []) == {"It may be: b, a."}
        return {rows["label"].iloc[at] for _ in range(30) for at in examples._with_decoys(of_c)}

    assert shown(0.0) == {"c"}
    assert shown(0.999) <= {"a", "b"} and len(shown(0.5)) == 3


@pytest.mark.parametrize("empty", [[], [""], ["  \n"]])
def test_pictures_without_words_are_left_out_of_finetuning(
    tiny_params: Params, empty: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of([empty if i in (0, 3) else ["", "a cat"] for i in range(10)])
    examples = examples_of(tiny_params, rows, "captions")
    assert 0 not in examples.train and examples.val == [8]
    assert "captions: 2 pictures have no words and are left out: p00, p03" in capsys.readouterr().err
    assert {answer for _ in range(9) for answer in examples.draw([0, 1, 2])[2]} == {"a cat"}
    rows = rows_of([empty] * 10, labels=[""] * 10)
    for data in ("captions", "classes"):
        with pytest.raises(UserError, match="0 train and 0 val pictures with words"):
            examples_of(tiny_params, rows, data)


def test_slow_tokenizers_read_no_special_token_either() -> None:
    tokenizer = ByT5Tokenizer()
    texts = Texts(tokenizer)
    assert texts.ids(["a</s> cat", "a cat"])[0] == [3 + byte for byte in b"a</s> cat"]
    assert texts.ids(["a cat"]) == tokenizer(["a cat"], add_special_tokens=False)["input_ids"]


def test_a_name_without_words_is_in_no_answer() -> None:
    assert find_class("a cat", ["", " ", "cat"]) == "cat"
    assert find_class("nothing", ["", "cat"]) is None


def test_the_probe_of_one_class_always_says_it() -> None:
    rows = rows_of([[]] * 10, labels=["cat"] * 10)
    assert linear_probe(images_of(rows)) == 1.0
    rows["label"] = ["dog" if split == "test" and i > 5 else "cat" for i, split in enumerate(rows["split"])]
    assert linear_probe(images_of(rows)) == 0.5


def test_one_class_and_captions_without_words_go_all_the_way(tiny_params: Params) -> None:
    values = yaml.safe_load(Path("params.yaml").read_text())
    values["run"] |= {"adapters": ["mlp"], "scratch": ["mlp"]}
    values["pretrain"]["objective"]["contrast"] = 0.5
    Path("params.yaml").write_text(yaml.safe_dump(values))
    params = load_params()
    for data in ("captions", "classes"):
        run("prepare", data)
        path = Run.of(params).manifest(data)
        rows = pd.read_parquet(path)
        if data == "classes":
            rows["label"], rows["captions"] = "cat", [["cat"]] * len(rows)
            nameless = rows.index[rows["split"] == "test"][-1]
            rows.at[nameless, "label"] = " "
        for split in ("train", "val", "test"):
            first = rows.index[rows["split"] == split][0]
            rows.at[first, "captions"] = [""] if data == "captions" else ["cat"]
        rows.to_parquet(path)
        run("extract-images", data)
        run("extract-captions", data)
    pairs = Pairs.open(params, params.pretrain)
    assert all(pairs.captions[i] for i in [*pairs.train, *pairs.val])
    run("pretrain", "mlp")
    run("name", "mlp")
    for data in ("captions", "classes"):
        run("finetune", "mlp", data)
        said = run("evaluate", "mlp", data)
    assert "all pictures are of one class, 'cat': its accuracy says nothing" in said
    assert "classes: 1 test pictures are left out" in said
    of_captions, of_classes = (
        {figure.key: figure.value for figure in read_figures(Run.of(params).evaluated("mlp", data), data)}
        for data in ("captions", "classes")
    )
    assert (of_classes["probe"], of_classes["chance"], of_classes["classes"]) == (1.0, 1.0, 1)
    assert torch.isfinite(torch.tensor([*of_captions.values(), *of_classes.values()])).all()
