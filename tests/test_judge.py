"""The LLM as a judge of captions: its probabilities against transformers, and whether it is told what it is worth."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from scipy.stats import mannwhitneyu, spearmanr
from sklearn.metrics import roc_auc_score
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pipeline.config import LLM, Params, load_params
from pipeline.errors import UserError
from pipeline.llms.load import LanguageModel, load_llm
from pipeline.metrics import base
from pipeline.metrics.choice import Chooser
from pipeline.metrics.evaluate import chooser_of, metrics_of
from pipeline.metrics.judge import ANSWERS, BEFORE, QUESTION, Judge, JudgeSettings, agreement, auc, question, verdict

DEMO = Path(__file__).parents[1] / "profiles/demo.yaml"
TEXTS = ["a cat", "a dog on a red background, " * 6, "", "an apple\nand a dog"]


@pytest.fixture
def llm(tiny_mistral: Path) -> LanguageModel:
    return load_llm(LLM(loader="huggingface", model=str(tiny_mistral), dtype="float32"), "cpu")


def alone(model: str, text: str) -> float:
    """By transformers alone: one text without padding, the whole chat made and tokenised at once."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    said = [{"role": "user", "content": f"{BEFORE}\n{text}\n{QUESTION}"}]
    chat = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(chat, add_special_tokens=False, return_tensors="pt")["input_ids"]
    answers = [tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in ANSWERS]
    with torch.no_grad():
        return float(network(ids).logits[0, -1, answers].softmax(-1)[0])


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_probabilities_are_transformers_own(llm: LanguageModel, tiny_mistral: Path, batch: int) -> None:
    found = Chooser(llm, batch).shares(BEFORE, TEXTS, QUESTION, ANSWERS)
    assert found == pytest.approx([alone(str(tiny_mistral), text) for text in TEXTS], abs=1e-6)
    assert len({round(share, 4) for share in found}) == len(TEXTS)  # else this test shows nothing


@pytest.mark.parametrize("kind", ["mpt", "gpt2"])
def test_padding_changes_no_probability(kind: str, tiny_mistral: Path, tmp_path: Path) -> None:
    """Also where distance (ALiBi) or place counts from the beginning of the row."""
    sizes = {"d_model": 32, "n_heads": 4} if kind == "mpt" else {"n_embd": 32, "n_head": 4}
    config = AutoConfig.for_model(kind, vocab_size=400, bos_token_id=0, eos_token_id=1, n_layers=2, n_layer=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_mistral).save_pretrained(tmp_path)
    found = Chooser(load_llm(LLM(loader="huggingface", model=str(tmp_path), dtype="float32"), "cpu"), 16)
    expected = [alone(str(tmp_path), text) for text in TEXTS]
    assert found.shares(BEFORE, TEXTS, QUESTION, ANSWERS) == pytest.approx(expected, abs=1e-6)


def test_answers_that_begin_alike_differ_later(llm: LanguageModel) -> None:
    chooser = Chooser(llm, 4)
    [own], [other] = (chooser.shares("a", ["a cat"], "b", pair) for pair in (("a cat", "a dog"), ("a dog", "a cat")))
    assert own + other == pytest.approx(1)
    shared, cat = llm.tokenizer("a", add_special_tokens=False)["input_ids"], llm.tokenizer(" cat")["input_ids"][1]
    dog = llm.tokenizer(" dog")["input_ids"][1]
    ids = llm.tokenizer("<s> [INST] a\na cat\nb [/INST]", add_special_tokens=False)["input_ids"] + shared
    assert own == pytest.approx(llm.network(torch.tensor([ids])).logits[0, -1, [cat, dog]].softmax(-1)[0].item())
    with pytest.raises(UserError, match="to this LLM's tokenizer 'a' begins like 'a cat'; take another"):
        chooser.shares("a", ["b"], "c", ("a", "a cat"))


def test_what_does_not_fit_is_said(llm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.network.config, "max_position_embeddings", 64)
    with pytest.raises(UserError, match=r"are \d+ tokens, the LLM's context is 64; take an LLM with a longer one"):
        Chooser(llm, 4).shares("a", ["b", "a cat " * 99], "c", ANSWERS)


def test_a_batch_that_memory_does_not_hold_is_halved(llm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, forward, sizes = Chooser(llm, 9).shares(BEFORE, TEXTS, QUESTION, ANSWERS), llm.network.forward, []

    def small_memory(input_ids: torch.Tensor, **options: object) -> object:
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(llm.network, "forward", small_memory)
    assert Chooser(llm, 9).shares(BEFORE, TEXTS, QUESTION, ANSWERS) == pytest.approx(whole, abs=1e-6)
    assert sizes == [4, 2, 2]


def test_the_area_is_sklearns_and_its_interval_that_of_pictures() -> None:
    random = np.random.default_rng(1)
    matched, unmatched = random.normal(0.6, 1, 60).round(1), random.normal(0, 1, 60).round(1)  # with ties
    found = auc(matched, unmatched)
    labels = np.repeat([1, 0], 60)
    assert found.value == pytest.approx(roc_auc_score(labels, np.concatenate([matched, unmatched])))
    draws = random.integers(60, size=(2000, 60))
    areas = mannwhitneyu(matched[draws], unmatched[draws], axis=1, method="asymptotic").statistic / 60**2
    assert found.interval == pytest.approx(np.quantile(areas, (0.025, 0.975)), abs=0.01)


def test_a_judge_that_tells_nothing_apart_is_called_useless(capsys: pytest.CaptureFixture[str]) -> None:
    scores = np.random.default_rng(0).random((3, 80))
    assert verdict("photos", auc(scores[0] + 0.5, scores[1])) == "judge: caption fits the references"
    assert capsys.readouterr().err == ""
    for matched in (scores[0], scores[0] - 0.5, np.zeros(80)):  # by chance, the wrong way round, always the same
        label = verdict("photos", auc(matched, scores[1] if matched.any() else matched))
        assert label == "judge (useless here: does not tell captions from shuffled ones)"
        assert capsys.readouterr().err == f"photos: {label}\n"


def test_agreement_is_spearmans() -> None:
    random = np.random.default_rng(0)
    scores = random.random(40)
    f1 = (scores + random.normal(0, 0.3, 40)).round(1)
    found = agreement("with_f1", "F1", scores, f1)
    assert found.key == "with_f1" and "judge and F1" in found.label
    assert found.interval is not None
    assert found.value == pytest.approx(spearmanr(scores, f1).statistic)
    assert found.interval[0] < found.value < found.interval[1] < 1


def judged(llm: LanguageModel, references: list[list[str]], captions: list[str]) -> dict[str, base.Figure]:
    """Figures by their keys."""
    rows = pd.DataFrame({"references": references, "finetuned": captions})
    rest = [[f"a {letter * 3}"] for letter in "bcdefghijklmnopqrstu"]  # so that few pictures share a thing
    images = SimpleNamespace(rows=pd.DataFrame({"captions": [*references, *rest]}))
    tested = base.Tested(load_params(DEMO), "photos", images, rows, lambda wanted: Chooser(llm, 4))
    return {figure.key: figure for figure in Judge(JudgeSettings(metric="judge")).figures(tested)}


def test_captions_are_held_against_their_own_and_the_next_picture(
    llm: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    references = [["a cat", "the cat", "one cat"], ["a dog"], ["an apple", "a red apple"], ["a tree", "two trees"]]
    captions = ["a cat", "a cat", "a red apple", "a picture"]
    found, chooser = judged(llm, references, captions), Chooser(llm, 4)
    assert "photos: 1 of 4 test pictures have no second caption" in capsys.readouterr().err

    def ask(*pairs: tuple[str, list[str]]) -> list[float]:
        return chooser.shares(BEFORE, [question(*pair) for pair in pairs], QUESTION, ANSWERS)

    own = ask(*zip(captions, references, strict=True))
    others = ask(*zip(captions, [*references[1:], references[0]], strict=True))
    cat, apple, tree = ["the cat", "one cat"], ["a red apple"], ["two trees"]
    people = ask(("a cat", cat), ("an apple", apple), ("a tree", tree))
    strange = ask(("a cat", apple), ("an apple", tree), ("a tree", cat))
    assert found["judge"].value == pytest.approx(np.mean(own), abs=1e-6)
    assert found["judge_shuffled"].value == pytest.approx(np.mean(others), abs=1e-6)
    assert found["judge_references"].value == pytest.approx(np.mean(people), abs=1e-6)
    assert found["judge_auc"].value == pytest.approx(roc_auc_score([1] * 3 + [0] * 3, people + strange))
    assert found["judge_agreement"].value == pytest.approx(spearmanr(own, [1, 0, 1, 0]).statistic)
    held = dict(enumerate(references)), {i: [text] for i, text in enumerate(captions)}
    for key, scorer in (("cider", Cider()), ("rouge_l", Rouge())):
        expected = spearmanr(own, scorer.compute_score(*held)[1]).statistic
        assert found[f"judge_agreement_{key}"].value == pytest.approx(expected)


def test_without_second_captions_the_judge_is_not_checked(
    llm: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    found = judged(llm, [["a cat"], ["a dog"]], ["a cat", "a dog"])
    assert {"judge", "judge_shuffled"} <= found.keys() and not {"judge_auc", "judge_agreement"} & found.keys()
    assert found["judge"].label == "judge (not checked here: no two pictures have two captions)"
    said = capsys.readouterr().err
    assert "photos: judge (not checked here" in said and "F1 of things is the same for all captions" in said


def test_the_runs_own_llm_is_not_loaded_twice(llm: LanguageModel, tiny_params: Params) -> None:
    values = yaml.safe_load(Path("params.yaml").read_text())
    other = {"loader": "huggingface", "model": values["llm"]["model"], "system_prompt": "Be just."}
    values["evaluate"]["metrics"] = ["judge", *({"metric": "judge", "llm": one} for one in (values["llm"], other))]
    Path("params.yaml").write_text(yaml.safe_dump(values))
    params = load_params()
    asked = [chooser_of(params, llm)(metric.settings.llm) for metric in metrics_of(params, "caption")]
    assert [one.llm is llm for one in asked] == [True, True, False]
    assert asked[2].llm.system_prompt == "Be just."
