"""The report on made-up results: every key, a page that needs nothing else, escaping, missing inputs."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from pipeline.config import Params, load_params
from pipeline.errors import UserError
from pipeline.report.report import convergence, report

DEMO = Path(__file__).parent.parent / "profiles" / "demo.yaml"
BASE = Path("data/demo")
EVIL = "<script>alert('x')</script> & \"friends\""
ACCURACY = {"mlp": 0.8, "self_attention": 0.7, "query": 0.9}


def write(path: str, content: Any) -> None:
    file = BASE / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def losses(last: float) -> str:
    """A history of 30 steps, validated at 0, 10, 20 and 30, that ends on `last`."""
    rows = [f"{step},2.0,{last + (30 - step) / 10}\n{step + 1},2.0,\n" for step in range(0, 31, 10)]
    return "step,train_loss,val_loss\n" + "".join(rows)


def pretrained(name: str) -> None:
    metrics = dict.fromkeys(report.PRETRAIN_KEYS, 0.25) | {"held_out": 100, "parameters": 10}
    write(f"pretrain/{name}/metrics.json", metrics)
    epochs = "".join(f"{epoch},{epoch},1,{3 - epoch / 10},3.4,4,3\n" for epoch in range(3))
    write(f"pretrain/{name}/history.csv", f"epoch,step,train_loss,val,shuffled,const_token,const_set\n{epochs}")


def evaluated(name: str) -> None:
    metrics = dict.fromkeys(report.EVALUATE_KEYS, 0.5) | {
        "acc": ACCURACY[name],
        "test_images": 100,
        "classes": 4,
        "captioned": 30,
    }
    write(f"evaluate/{name}/metrics.json", metrics)
    write(f"evaluate/{name}/captions.json", [caption(number) for number in range(30)])
    rows = [f"f{n},picture.png,dish {n % 4},dish {n % 3},dish {n % 3},{n % 4 == n % 3},True\n" for n in range(24)]
    write(f"evaluate/{name}/predictions.csv", "id,image,label,output,predicted,correct,strict\n" + "".join(rows))
    write(f"evaluate/{name}/confusions.csv", "label,predicted,count\ndish 1,NA,3\ndish 2,,1\n")


def caption(number: int) -> dict[str, Any]:
    picture = "gone.png" if number == 3 else "picture.png"
    return {
        "id": f"c{number:02}",
        "image": picture,
        "references": [EVIL],
        "pretrained": EVIL,
        "finetuned": "",
        "right": number % 2 == 0,
    }


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """The demo's parameters, in a folder with results of every stage but one timing."""
    monkeypatch.chdir(tmp_path)
    found = load_params(DEMO)
    Image.new("RGBA", (600, 400), (200, 30, 30, 128)).save("picture.png")
    for name in found.run.adapters:
        pretrained(name)
        evaluated(name)
        write(f"finetune/{name}-captions/metrics.json", {"val_loss": 1.5, "steps": 30})
        write(f"finetune/{name}-captions/history.csv", losses(1.5))
        write(f"finetune/{name}-classes/metrics.json", {"val_loss": 2 - ACCURACY[name], "steps": 30})
        state = {"k80": 5, "gap": 1.0, "explained": [0.5, 0.5]}
        write(f"pca/{name}/metrics.json", dict.fromkeys(report.STATES, state))
        for picture in report.PCA_PICTURES:
            Image.new("RGB", (9, 7)).save(BASE / "pca" / name / f"{picture}.png")
    for name in found.run.scratch:
        write(f"finetune_scratch/{name}/metrics.json", {"val_loss": 2.5, "steps": 30})
        write(f"finetune_scratch/{name}/history.csv", losses(2.5))
    for stage in report.stage_names(found)[1:]:
        write(f"seconds/{stage}.json", {"seconds": 61.5})
    return found


class Page(HTMLParser):
    """Collects what a browser would load, and the tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for key, value in attrs if key in ("src", "srcset", "data", "poster")]
        self.loaded += [value or "" for key, value in attrs if key == "href" and tag != "a"]


def test_metrics_are_complete(params: Params) -> None:
    metrics = report.flat_metrics(report.read_results(params))
    expected = {"acc/probe", "acc/chance", "ft/self_attention/scratch/val_loss"}
    for name in params.run.adapters:
        expected |= {f"emd/{name}/{key}" for key in ("val", "shuffled", "const_token", "const_set")}
        expected |= {f"emd/{name}/image_gain{end}" for end in ("", "_low", "_high")}
        expected |= {f"retrieval/{name}/r1_raw", f"retrieval/{name}/r1_debiased", f"acc/{name}", f"acc_strict/{name}"}
        expected |= {f"captions_right/{name}", f"captions_right_shuffled/{name}", f"ft/{name}/emd/val_loss"}
        expected |= {f"pca/{name}/{state}/k80" for state in report.STATES}
    expected |= {f"seconds/{stage}" for stage in report.stage_names(params)[1:]}
    assert set(metrics) == expected
    assert metrics["acc/query"] == 0.9 and metrics["ft/self_attention/scratch/val_loss"] == 2.5


def test_a_loss_that_is_not_finite_is_null(params: Params) -> None:
    write("finetune/mlp-captions/metrics.json", '{"val_loss": NaN, "steps": 30}')
    assert report.flat_metrics(report.read_results(params))["ft/mlp/emd/val_loss"] is None


def test_stage_names_are_those_of_dvc(params: Params) -> None:
    names = report.stage_names(params)
    assert {"prepare@captions", "pretrain@query", "finetune@mlp-classes", "finetune_scratch@self_attention"} <= set(
        names
    )
    assert len(names) == len(set(names)) == 6 + 3 + 6 + 1 + 3 + 3


def test_page_needs_nothing_else(params: Params) -> None:
    path = report.write_report(params)
    text = path.read_text()
    page = Page(text)
    assert path == BASE / "report" / "index.html"
    assert "script" not in page.tags and "@import" not in text and "url(" not in text
    assert report.write_report(params).read_text() == text
    assert len(page.loaded) > 40 and all(uri.startswith("data:image/") for uri in page.loaded)
    for uri in set(page.loaded):
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
            assert max(picture.size) <= report.THUMBNAIL or picture.format == "PNG"
    assert text.count('<figure class="card shot">') == report.GALLERY
    metrics = json.loads((BASE / "metrics.json").read_text())
    assert metrics == report.flat_metrics(report.read_results(params))
    assert len(pd.read_csv(BASE / "report" / "convergence.csv")) == len(convergence.collect(params))


def test_page_escapes_and_names_what_is_missing(params: Params) -> None:
    text = report.write_report(params).read_text()
    assert EVIL not in text and "&lt;script&gt;alert" in text
    assert text.count("picture not on this disk") == 2  # a caption's and the dish NA's
    assert text.count("restored from DVC's cache, no timing") == 1
    assert "CC BY-SA 4.0" in text and "own terms" not in text


def test_attribution_only_where_it_is_due(params: Params) -> None:
    folder = {"source": "coco", "root": "photos", "count": None}
    values = params.model_dump()
    values["data"]["captions"] |= folder
    values["data"]["classes"] |= folder | {"source": "food101"}
    text = report.write_report(Params.model_validate(values)).read_text()
    assert "OpenMoji" not in text and "coco and food101 are under their data set's own terms" in text


MISSING = [
    ("pretrain/mlp/metrics.json", "pretrain@mlp"),
    ("pretrain/mlp/history.csv", "pretrain@mlp"),
    ("finetune/query-captions/history.csv", "finetune@query-captions"),
    ("finetune_scratch/self_attention/metrics.json", "finetune_scratch@self_attention"),
    ("evaluate/query/captions.json", "evaluate@query"),
    ("evaluate/query/predictions.csv", "evaluate@query"),
    ("evaluate/query/confusions.csv", "evaluate@query"),
    ("pca/mlp/zoom.png", "pca@mlp"),
]


@pytest.mark.parametrize(("path", "stage"), MISSING)
def test_a_missing_input_names_file_and_stage(params: Params, path: str, stage: str) -> None:
    (BASE / path).unlink()
    with pytest.raises(UserError, match=f"{re.escape(path)}: no such file; run `dvc repro {stage}`"):
        report.write_report(params)
    assert not (BASE / "metrics.json").exists()


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_broken_input_names_file_and_stage(params: Params, content: str) -> None:
    write("evaluate/mlp/metrics.json", content)
    with pytest.raises(UserError, match=r"evaluate/mlp/metrics\.json.*dvc repro --force evaluate@mlp"):
        report.write_report(params)


def test_main_figures(params: Params) -> None:
    figures = dict(report.main_figures(params))
    assert figures["food accuracy, query"].startswith("90.0")
    assert figures["image gain of pre-training, mlp"] == "0.250 EMD (0.250 to 0.250)"
    assert figures["caption loss, self_attention, from scratch"] == "2.500"
    assert "without 1 stage restored" in figures["time of all stages, added up"]


def test_gain_over_blind_answers_and_number_of_candidates(params: Params) -> None:
    assert report.below_blind({"val": 3.0, "const_token": 5.0, "const_set": 4.0}) == pytest.approx(0.25)
    assert report.below_blind({"val": 5.0, "const_token": 4.0, "const_set": 4.5}) == pytest.approx(-0.25)
    results = report.read_results(params)
    assert report.candidates_of(results, "mlp") == 100
    results.pretrain["mlp"]["held_out"] = 40
    assert report.candidates_of(results, "mlp") == 40


def test_convergence_table_and_steps_to_match(params: Params) -> None:
    table = convergence.collect(params)
    assert list(table.columns) == convergence.COLUMNS
    assert len(table) == 4 * 4 and set(table["start"]) == {"emd", "scratch"} and not table["val_loss"].isna().any()
    assert convergence.steps_to_match(table, "self_attention") == (20, 30)
    assert convergence.steps_to_match(table, "mlp") is None
    never = table.assign(val_loss=table["val_loss"].where(table["start"] == "scratch", 9.0))
    assert convergence.steps_to_match(never, "self_attention") == (None, 30)


def test_a_pre_training_that_does_not_pay_is_called_so(params: Params) -> None:
    write("finetune/self_attention-captions/history.csv", losses(4.0))
    tiles = report.tiles(report.read_results(params), convergence.collect(params))
    assert tiles[2].value == "no gain" and "validation loss 1.50 with it, 2.50 without" in tiles[2].note


@pytest.mark.parametrize(
    ("share", "count", "low", "high"), [(0.5, 100, 0.404, 0.596), (1.0, 20, 0.839, 1.0), (0.0, 20, 0.0, 0.161)]
)
def test_wilson_interval(share: float, count: int, low: float, high: float) -> None:
    assert report.wilson(share, count) == pytest.approx((low, high), abs=6e-4)


def test_durations_and_shares() -> None:
    assert [report.duration(s).replace("\u00a0", " ") for s in (3.21, 59.7, 75, 7384)] == [
        "3.2 s",
        "1 min 0 s",
        "1 min 15 s",
        "2 h 3 min",
    ]
    assert report.percent(0.8351).replace("\u00a0", " ") == "83.5 %"
