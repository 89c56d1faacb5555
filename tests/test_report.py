"""The report on made-up results: every key, a page that needs nothing else, escaping, missing inputs."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from pipeline.config import Params, load_params
from pipeline.errors import UserError
from pipeline.metrics.base import Figure, share_of
from pipeline.metrics.rules import LABELS
from pipeline.metrics.speeds import keep_speeds
from pipeline.naming.rules import LLM_RULES, RULES
from pipeline.report import convergence, figures, page, sections, tables, verdict, ways
from pipeline.report.cautions import caution
from pipeline.report.results import read_results
from pipeline.runs import Run, stages

DEMO = Path(__file__).parent.parent / "profiles" / "demo.yaml"
BASE = Path("data/demo")
EVIL = "<script>alert('x')</script> & \"friends\""
ACCURACY = {"mlp": 80, "self_attention": 70, "query": 90}
DISTANCES = ("val", "shuffled", "const_token", "const_set", "image_gain", "image_gain_low", "image_gain_high")


def write(path: str, content: Any) -> None:
    file = BASE / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def losses(last: float) -> str:
    """A history of 30 steps, validated at 0, 10, 20 and 30, that ends on `last`."""
    rows = [f"{step},2.0,{last + (30 - step) / 10}\n{step + 1},2.0,\n" for step in range(0, 31, 10)]
    return "step,train_loss,val_loss\n" + "".join(rows)


def hits(key: str, count: int, label: str) -> Figure:
    return share_of(key, [number < count for number in range(100)], label)


def write_figures(path: str, found: list[Figure]) -> None:
    write(f"evaluate/{path}/figures.json", [figure.as_json() for figure in found])


def pretrained(name: str) -> None:
    metrics = dict.fromkeys([*DISTANCES, "r1_raw", "r1_debiased"], 0.25) | {"held_out": 100, "parameters": 10}
    write(f"pretrain/{name}/metrics.json", metrics)
    epochs = "".join(f"{epoch},{epoch},1,{3 - epoch / 10},3.4,4,3\n" for epoch in range(3))
    write(f"pretrain/{name}/history.csv", f"epoch,step,train_loss,val,shuffled,const_token,const_set\n{epochs}")


def captioned(path: str) -> None:
    write(f"evaluate/{path}/captions.json", [caption(number) for number in range(30)])
    found = [
        hits("f1", 40, "things named, F1"),
        hits("f1_pretrained", 10, "F1 before fine-tuning"),
        hits("f1_shuffled", 20, "F1 against another picture's things"),
        hits("repeats", 3, "captions that repeat themselves"),
        Figure("repeats_references", 0.0, "references that repeat themselves", baseline=True),
        Figure("captioned", 30, "captioned test pictures", kind="count"),
        *scored(),
    ]
    write_figures(path, found)


def scored() -> list[Figure]:
    """As the metric caption_scores has them."""
    found = {"bleu_1": 0.6, "bleu_4": 0.2, "cider": 0.7, "cider_pretrained": 0.1, "cider_over_constant": 0.4}
    figures = [Figure(key, value, key.upper(), (value - 0.1, value + 0.1), "number") for key, value in found.items()]
    near = Figure("cider_over_nearest", 0.05, "CIDER_OVER_NEAREST", (-0.1, 0.2), "number")
    constant = Figure("cider_constant", 0.3, "the best constant", (0.2, 0.4), "number", baseline=True)
    return [*figures, near, constant]


def caption(number: int) -> dict[str, Any]:
    picture = "gone.png" if number == 3 else "picture.png"
    said = "" if number % 2 else "a friend"
    return {"id": f"c{number:02}", "image": picture, "references": [EVIL], "pretrained": EVIL, "finetuned": said}


def named(path: str, correct: int) -> None:
    rows = [f"f{n},picture.png,dish {n % 4},dish {n % 3},dish {n % 3},{n % 4 == n % 3},True\n" for n in range(24)]
    rows += [f"g{n},gone.png,NA,dish 1,dish 1,False,False\n" for n in range(9)]
    write(f"evaluate/{path}/predictions.csv", "id,image,label,output,predicted,correct,strict\n" + "".join(rows))
    found = [
        hits("acc", correct, "accuracy"),
        hits("acc_strict", 50, "accuracy, word for word"),
        Figure("chance", 0.25, "chance", baseline=True),
        Figure("test_images", 100, "test pictures", kind="count", baseline=True),
        Figure("classes", 4, "classes", kind="count", baseline=True),
        Figure("probe", 0.9, "linear probe", (0.8, 0.95), baseline=True),
    ]
    write_figures(path, found)


def by_rule(rule: str, correct: int) -> list[Figure]:
    return [
        hits(f"acc/{rule}", correct, LABELS[rule]),
        hits(f"top5/{rule}", 95, f"{LABELS[rule]}: among the first five"),
        Figure(f"macro/{rule}", 0.5, f"{LABELS[rule]}: mean over the classes"),
        Figure(f"ece/{rule}", 0.0625, f"{LABELS[rule]}: calibration error"),
    ]


def named_without_llm(name: str) -> None:
    found = [*by_rule("emd", 55), *by_rule("discriminant", 73), *by_rule("namer", 75 + len(name))]
    write(f"name/{name}/classes/figures.json", [figure.as_json() for figure in found])
    write(f"name/{name}/classes/namer.json", {"val_loss": 0.5 if name == "mlp" else 0.75})


@pytest.fixture
def params(project: Path) -> Params:
    """The demo's parameters, in a folder with results of every stage but one timing."""
    found = load_params(DEMO)
    Image.new("RGBA", (600, 400), (200, 30, 30, 128)).save("picture.png")
    for name in found.run.adapters:
        pretrained(name)
        named_without_llm(name)
        captioned(f"{name}-captions/captions")
        named(f"{name}-classes/classes", ACCURACY[name])
        for recipe, loss in (("captions", 1.5), ("classes", 2 - ACCURACY[name] / 100)):
            write(f"finetune/{name}-{recipe}/metrics.json", {"val_loss": loss, "steps": 30})
            write(f"finetune/{name}-{recipe}/history.csv", losses(loss))
        write(f"pca/{name}/metrics.json", {state: {"k80": 5, "gap": 1.0} for state in page.STATES})
        for picture in page.PCA_PICTURES:
            Image.new("RGB", (9, 7)).save(BASE / "pca" / name / f"{picture}.png")
    for name in found.run.scratch:
        write(f"finetune/{name}-captions-scratch/metrics.json", {"val_loss": 2.5, "steps": 30})
        write(f"finetune/{name}-captions-scratch/history.csv", losses(2.5))
    for stage in stages(found)[1:]:
        write(f"seconds/{stage}.json", {"seconds": 61.5})
    (BASE / "prepare").mkdir()
    texts = [[EVIL]] * 2 + [["a dog"]] * 30  # so that what a script and its friends are is no common word
    manifest("captions", captions=texts)
    return found


def manifest(data: str, **columns: Any) -> None:
    """32 pictures, every fourth of them for the test."""
    parts = ["test" if n % 4 == 0 else "train" for n in range(32)]
    rows = {"id": [str(n) for n in range(32)], "sha256": [str(n) for n in range(32)], "split": parts}
    pd.DataFrame({**rows, "quarantine": [None] * 32, **columns}).to_parquet(BASE / f"prepare/{data}.parquet")


def report(params: Params) -> str:
    return page.write_report(read_results(params)).read_text()


class Page(HTMLParser):
    """Collects what a browser would load, the tags, and the ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for key, value in attrs if key in ("src", "srcset", "data", "poster")]
        self.loaded += [value or "" for key, value in attrs if key == "href" and tag != "a"]
        self.ids += [value or "" for key, value in attrs if key == "id"]


def test_metrics_are_complete(params: Params) -> None:
    metrics = figures.flat_metrics(read_results(params))
    expected = {"captions/self_attention/captions/scratch_val_loss"}
    expected |= {f"classes/{key}" for key in ("probe", "chance", "test_images", "classes", "discriminant")}
    expected |= {f"classes/{measure}/discriminant" for measure in ("top5", "macro", "ece")}
    expected |= {"captions/repeats_references", "captions/cider_constant"}
    for name in params.run.adapters:
        expected |= {f"emd/{name}/{key}" for key in (*DISTANCES, "held_out", "parameters")}
        expected |= {f"retrieval/{name}/r1_raw", f"retrieval/{name}/r1_debiased"}
        keys = ("f1", "f1_pretrained", "f1_shuffled", "repeats", "captioned", "val_loss")
        keys += tuple(figure.key for figure in scored() if not figure.baseline)
        expected |= {f"captions/{name}/captions/{key}" for key in keys}
        expected |= {f"classes/{name}/classes/{key}" for key in ("acc", "acc_strict", "val_loss")}
        rules = [f"{key}/{rule}" for key in ("acc", "top5", "macro", "ece") for rule in ("emd", "namer")]
        expected |= {f"classes/{name}/{key}" for key in (*rules, "val_loss/namer")}
        expected |= {f"pca/{name}/{state}/k80" for state in page.STATES}
    expected |= {f"seconds/{stage}" for stage in stages(params)[1:]}
    assert set(metrics) == expected
    assert metrics["classes/query/classes/acc"] == 0.9
    assert metrics["captions/self_attention/captions/scratch_val_loss"] == 2.5


def test_a_loss_that_is_not_finite_is_null_and_never_the_best(params: Params) -> None:
    write("finetune/query-classes/metrics.json", '{"val_loss": NaN, "steps": 30}')
    results = read_results(params)
    assert figures.flat_metrics(results)["classes/query/classes/val_loss"] is None
    assert results.best("classes").adapter == "mlp"


def test_page_needs_nothing_else(params: Params) -> None:
    path = page.write_report(read_results(params))
    text = path.read_text()
    shown = Page(text)
    assert path == BASE / "report" / "index.html"
    assert "script" not in shown.tags and "@import" not in text and "url(" not in text
    assert report(params) == text
    assert len(shown.loaded) > 40 and all(uri.startswith("data:image/") for uri in shown.loaded)
    for uri in (uri for uri in set(shown.loaded) if ";base64," in uri):  # all but the icon
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
            assert max(picture.size) <= sections.THUMBNAIL or picture.format == "PNG"
    assert text.count('<figure class="card shot">') == sections.GALLERY
    assert len(shown.ids) == len(set(shown.ids)) and {"data-captions", "data-classes"} <= set(shown.ids)
    assert json.loads((BASE / "metrics.json").read_text()) == figures.flat_metrics(read_results(params))
    assert len(pd.read_csv(BASE / "report" / "convergence.csv")) == len(convergence.collect(params))


def test_page_is_no_wider_than_a_screen(params: Params, fits_screens: Callable[[Path], None]) -> None:
    fits_screens(page.write_report(read_results(params)))


def test_page_escapes_and_names_what_is_missing(params: Params) -> None:
    text = report(params)
    assert EVIL not in text and "&lt;script&gt;alert" in text
    assert text.count("picture not on this disk") == 4  # a caption, the dish NA: wrong, confused, its class
    assert text.count("restored from DVC's cache, no timing") == 1
    assert "CC BY-SA 4.0" in text and "own terms" not in text


def test_head_of_the_page(params: Params) -> None:
    results = read_results(params)
    tiles = page.tiles(results, convergence.collect(params))
    assert [tile.value.replace("\u00a0", " ") for tile in tiles] == ["78 %", "25 %", "20 of 30", "40 %"]
    assert tiles[0].label == "of unseen pictures named, out of 4 names"
    note = "classes: mlp, no language model; 69 % to 85 % with 95 % confidence, the language model (query) 90.0 %"
    note += ", chance 25.0 %, linear probe 90.0 %, discriminant analysis 73.0 %"
    assert tiles[0].note.replace("\u00a0", " ") == note
    assert "; 18\u00a0% to 34\u00a0% with 95" in tiles[1].note
    assert tiles[1].label == "of pictures find their own caption or class name among 100, with no language model"
    text = report(params)
    assert "<h1>demo</h1>" in text and "Data: captions from openmoji_scenes and classes from openmoji_food<" in text


def test_figures_that_promise_too_much_say_so(params: Params) -> None:
    manifest("classes")
    write("images/classes/near.json", {"val": [1, 20], "test": [1, 22]})
    results = read_results(params)
    assert [caution(results.params, data) for data in ("captions", "classes")] == ["", ""]
    write("images/classes/near.json", {"val": [1, 20], "test": [6, 22]})
    manifest("classes", sha256=[str(n if n != 7 else 8) for n in range(32)])
    text = report(params)
    said = (
        '<p class="caution">These figures promise too much: 6 of 22 in test are almost the same as a picture for '
        "training, as shots of a series are, and 1 of 8 test pictures is in training, too, byte for byte. Remedy: set "
        "data.classes.split to blocks; if that does not help, <code>terraalign series classes</code> finds series, and "
        "says how to keep each on one side; and remove one of each pair that data/demo/quarantine/classes-copies.csv "
        "lists.</p>"
    )
    assert text.count(said) == 2, "beside the headline, and with the accuracies"
    assert "of unseen pictures" not in text and "of test pictures named, out of 4 names" in text
    manifest("captions", sha256=["0"] * 32, captions=[["a dog"]] * 32)
    assert "8 of 8 test pictures are in training, too, byte for byte" in caution(results.params, "captions")
    write("images/classes/near.json", "[")
    with pytest.raises(UserError, match=r"near.json: not what `extract-images` writes; run `dvc repro --force extract"):
        caution(results.params, "classes")


def test_a_run_of_classes_alone_is_not_told_of_captions(params: Params) -> None:
    """Names stand for captions in its pre-training: to find one's own among those of all says nothing."""
    values = params.model_dump()
    values["run"] |= {"data": ["classes"], "recipes": ["classes"], "scratch": [], "scratch_recipes": []}
    values["data"]["classes"] |= {"source": "imagefolder", "root": "/somewhere/birds"}
    values["pretrain"]["data"] = ["classes"]
    values["pca"] |= {"data": "classes", "recipe": "classes"}
    alone = Params.model_validate(values)
    text, results = report(alone), read_results(alone)
    assert "Data: classes from the folder birds<" in text and "/somewhere/birds" not in text.partition("<main>")[0]
    assert (
        "among the words of the class names" in text
        and "between the class name of a picture held out and image" in text
    )
    assert [tile.label for tile in page.tiles(results, convergence.collect(alone))] == [
        "of unseen pictures named, out of 4 names"
    ]
    assert not {"finds its caption\nraw / debiased", "chance"} & {*tables.pretraining_table(results).head}
    assert figures.terminal_table(results).caption.endswith("\nimage gain: " + figures.gain_of(alone))
    assert figures.gain_of(alone).startswith("by how much a class name is nearer to its own picture than to another")


def test_names_stand_in_for_captions_in_whichever_order_the_data_sets_are(params: Params) -> None:
    for data in (["captions", "classes"], ["classes", "captions"]):
        of_both = params.model_copy(update={"pretrain": params.pretrain.model_copy(update={"data": data})})
        assert "a caption held out (of a picture that has none, the name of its\nclass)" in report(of_both)


def test_every_way_of_naming_is_beside_what_it_is_compared_with(params: Params) -> None:
    write_figures("query-classes/classes", [hits("acc", 90, "accuracy"), *by_rule("ranked", 40)])
    keep_speeds(Run.of(params), "evaluate@query-classes", {"classes": {"": 7.1, "ranked": 0.83}})
    keep_speeds(Run.of(params), "name@query", {"classes": {"discriminant": 12345.6, "namer": 987.0}})
    results = read_results(params)
    chart = {head: [way.name for way in rows] for head, rows in sections.chart(results, "classes").items()}
    aided = {"mlp": ["said by the LLM"], "query": ["said by the LLM", "ranked by the LLM"]}
    for name in ("mlp", "query"):
        assert chart[name] == ["EMD alone", "the namer", *aided[name]]
    assert list(chart) == [*params.run.adapters, "for comparison"]
    assert chart["for comparison"] == ["linear probe", "discriminant analysis", "chance"]
    table = tables.ways_table(results, "classes")
    rows = {name: [cell.text.replace("\u00a0", " ") for cell in cells] for name, cells in table.rows}
    assert table.head[-1] == "images/s"
    assert rows["query: the namer"] == ["80.0 %", "95.0 %", "50.0 %", "6.2 %", "987"]
    assert rows["query: ranked by the LLM"][::4] == ["40.0 %", "0.83"]
    assert rows["discriminant analysis"][:2] == ["73.0 %", "95.0 %"] and rows["discriminant analysis"][4] == "12,346"
    assert rows["query: said by the LLM"] == ["90.0 %", "–", "–", "–", "7.1"]
    Run.of(params).speeds("evaluate@query-classes").write_text("[1]")
    assert read_results(params).outcomes, "a timing is worth no failure"
    text = report(params)
    assert LABELS["ranked"] not in text, "the table of answers does not say it all again"
    assert "without\nthe language model mlp, with it (<code>--llm</code>) query" in text


def test_scores_of_captions_are_in_a_table_of_their_own(params: Params) -> None:
    results = read_results(params)
    table = tables.scores_table(results, "captions")
    assert table.head[:4] == ["captions", "BLEU-1", "BLEU-4", "CIDEr-D"] and len(table.head) == 6
    rows = {name: [cell.text for cell in cells] for name, cells in table.rows}
    assert rows["mlp"] == ["0.600", "0.200", "0.700", "0.400", "0.050"]
    assert rows["mlp, before fine-tuning"] == ["–", "–", "0.100", "–", "–"]
    assert rows["the best constant caption"][2] == "0.300" and len(rows) == 2 * len(params.run.adapters) + 1
    [cells] = [cells for name, cells in table.rows if name == "mlp"]
    assert [cell.mood for cell in cells] == ["", "", "", "yes", "no"] and cells[4].small == "-0.100 to 0.200"
    assert not any("CIDER" in heading for heading in tables.figures_table(results, "captions").head)
    shown = {label for label, *_ in figures.main_figures(results)}
    assert {"BLEU_4", "CIDER", "CIDER_OVER_NEAREST", "the best constant"} <= shown
    assert not {"BLEU_1", "CIDER_PRETRAINED"} & shown, "the terminal has the main ones"
    assert "above the\nbest constant" in report(params)
    for name in params.run.adapters:
        write_figures(f"{name}-captions/captions", [hits("f1", 40, "things named, F1")])
    assert tables.scores_table(read_results(params), "captions").head == ["captions"]


def test_every_rule_has_a_name_on_the_page() -> None:
    assert {*ways.WITHOUT_LLM, "discriminant"} == {*RULES} and {*ways.WITH_LLM} == {"", *LLM_RULES}


def test_ways_of_several_recipes_are_told_apart(params: Params) -> None:
    chart = sections.chart(read_results(both(params)), "classes")
    assert [way.name for way in chart["mlp"]][2:] == ["said by the LLM, classes", "said by the LLM, both"]


def test_without_stage_name_there_is_less_to_show(params: Params) -> None:
    shutil.rmtree(BASE / "name")
    results = read_results(params)
    assert not [key for key in figures.flat_metrics(results) if "emd" in key.split("/")[1:] or "discriminant" in key]
    assert [way.name for way in sections.chart(results, "classes")["mlp"]] == ["said by the LLM"]
    assert "EMD alone" not in report(params) and "terraalign classify" not in report(params)


@pytest.mark.parametrize("file", ["figures.json", "namer.json"])
@pytest.mark.parametrize("content", ["{", "[3]", '{"val_loss": "low"}'])
def test_broken_names_name_file_and_stage(params: Params, file: str, content: str) -> None:
    write(f"name/mlp/classes/{file}", content)
    with pytest.raises(UserError, match=rf"name/mlp/classes/{re.escape(file)}.*dvc repro --force name@mlp"):
        read_results(params)


def test_captions_are_held_against_the_things_of_their_picture(params: Params) -> None:
    shots = sections.sections(read_results(params))[0].body["shots"]
    assert [shot.judged["mlp-captions"][:3] for shot in shots[:3]] == [(1, 0, 3), (0, 0, 4), (1, 0, 3)]
    assert "✗ 1 of 4 things" in report(params)
    write_figures("mlp-captions/captions", [])
    (BASE / "prepare/captions.parquet").unlink()  # where the metric was not measured, nothing is needed for it
    shots = sections.sections(read_results(params))[0].body["shots"]
    assert shots[0].judged == {} and set(shots[0].captions) == {f"{name}-captions" for name in params.run.adapters}


def test_attribution_only_where_it_is_due(params: Params) -> None:
    folder = {"source": "coco", "root": "photos", "count": None}
    values = params.model_dump()
    values["data"]["captions"] |= folder
    values["data"]["classes"] |= folder | {"source": "food101"}
    text = report(Params.model_validate(values))
    assert "OpenMoji" not in text and "coco and food101 are under their data set's own terms" in text
    assert "data coco (captions) and food101 (classes)" in text


MISSING = [
    ("pretrain/mlp/metrics.json", "pretrain@mlp"),
    ("pretrain/mlp/history.csv", "pretrain@mlp"),
    ("finetune/query-captions/history.csv", "finetune@query-captions"),
    ("finetune/mlp-classes/metrics.json", "finetune@mlp-classes"),
    ("finetune/self_attention-captions-scratch/metrics.json", "finetune_scratch@self_attention-captions"),
    ("name/mlp/classes/namer.json", "name@mlp"),
    ("evaluate/mlp-captions/captions/figures.json", "evaluate@mlp-captions"),
    ("evaluate/query-captions/captions/captions.json", "evaluate@query-captions"),
    ("evaluate/query-classes/classes/predictions.csv", "evaluate@query-classes"),
    ("pca/mlp/metrics.json", "pca@mlp"),
    ("pca/mlp/zoom.png", "pca@mlp"),
]


@pytest.mark.parametrize(("path", "stage"), MISSING)
def test_a_missing_input_names_file_and_stage(params: Params, path: str, stage: str) -> None:
    (BASE / path).unlink()
    with pytest.raises(UserError, match=f"{re.escape(path)}: no such file; run `dvc repro {stage}`"):
        report(params)
    assert not (BASE / "metrics.json").exists()


@pytest.mark.parametrize("content", ["{", "{}", '[{"key": "acc"}]', '[{"key": "acc", "value": "high", "label": ""}]'])
def test_broken_figures_name_file_and_stage(params: Params, content: str) -> None:
    write("evaluate/mlp-classes/classes/figures.json", content)
    with pytest.raises(UserError, match=r"classes/figures\.json.*dvc repro --force evaluate@mlp-classes"):
        report(params)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_metrics_name_file_and_stage(params: Params, content: str) -> None:
    write("pretrain/mlp/metrics.json", content)
    with pytest.raises(UserError, match=r"pretrain/mlp/metrics\.json.*dvc repro --force pretrain@mlp"):
        report(params)


def test_an_unknown_figure_appears_everywhere(params: Params) -> None:
    write_figures("mlp-classes/classes", [Figure("odd", 3.25, "what <b>I</b> measured", (3, 3.5), kind="number")])
    results = read_results(params)
    assert figures.flat_metrics(results)["classes/mlp/classes/odd"] == 3.25
    row = ("what <b>I</b> measured", "classes", "mlp", "3.250 (3.000 to 3.500)")
    assert row in list(figures.main_figures(results))
    assert "what &lt;b&gt;I&lt;/b&gt; measured</th>" in report(params)


def test_no_figure_is_demanded(params: Params) -> None:
    shutil.rmtree(BASE / "name")
    for name in params.run.adapters:
        write(f"pretrain/{name}/metrics.json", {"val": 0.5})
        write(f"pretrain/{name}/history.csv", "epoch,step,val\n1,1,0.5\n")
        write(f"pca/{name}/metrics.json", {})
        for recipe in params.run.recipes:
            write_figures(f"{name}-{recipe}/{recipe}", [])
            write(f"finetune/{name}-{recipe}/metrics.json", {})
    text = report(params)
    assert 'class="card tile"' in text and "best constant" not in text
    assert [tile.label for tile in page.tiles(read_results(params), convergence.collect(params))] == [
        "fine-tuning steps suffice after pre-training"
    ]
    kept = [key for key in json.loads((BASE / "metrics.json").read_text()) if key.startswith(("classes/", "pca/"))]
    assert not kept


def difference(key: str, value: float, low: float, high: float) -> Figure:
    return Figure(key, value, key, (low, high), "number", key == "cider_nearest")


NEAREST = difference("cider_nearest", 0.3, 0.2, 0.4)
CIDER = [Figure("cider", 0.2, "CIDEr-D", (0.1, 0.3), "number"), Figure("cider_shuffled", 0.1, "", (0, 0.2), "number")]


@pytest.mark.parametrize(
    ("found", "said", "mood"),
    [
        (
            [hits("f1", 40, ""), hits("f1_shuffled", 20, "")],
            "fit their own pictures better than others .things named, F1 40.0 % against 20.0 %",
            "yes",
        ),
        (
            [hits("f1", 7, ""), hits("f1_shuffled", 6, ""), NEAREST, difference("cider_over_nearest", -0.1, -0.2, 0.1)],
            "not shown to be any better .*F1 7.0 % against 6.0 %.*scores higher .*0.300.*Add photos .2 for training.",
            "no",
        ),
        ([*CIDER, difference("cider_over_shuffled", 0.1, -0.1, 0.3)], "not shown .*0.200 against 0.100", "no"),
        ([*CIDER, difference("cider_over_shuffled", 0.1, 0.01, 0.3)], "better .*0.200 against 0.100..$", "yes"),
        (
            [
                *CIDER,
                difference("cider_over_shuffled", 0.1, 0.01, 0.3),
                NEAREST,
                difference("cider_over_nearest", -0.1, -0.2, -0.05),
            ],
            "better .*, but worse than the caption of the most similar training picture does .0.300..$",
            "no",
        ),
        ([*CIDER, hits("f1", 40, "")], None, ""),  # nothing beside it
    ],
)
def test_captions_get_a_verdict_by_their_intervals(
    params: Params, found: list[Figure], said: str | None, mood: str
) -> None:
    for name in params.run.adapters:
        write_figures(f"{name}-captions/captions", found)
    write("prepare/captions.parquet", "")
    rows = pd.DataFrame({"split": ["train", "train", "train", "val"], "quarantine": [None, None, "broken", None]})
    rows.to_parquet(BASE / "prepare/captions.parquet")
    sets = {"captions": params.data["captions"].model_copy(update={"count": None})}
    alone = params.model_copy(update={"data": sets, "run": params.run.model_copy(update={"data": ["captions"]})})
    verdicts = verdict.verdicts(read_results(alone))
    assert [one.mood for one in verdicts] == ([mood] if said else [])
    assert not said or re.search(said, verdicts[0].text.replace("\u00a0", " "))


def test_names_get_a_verdict_against_guessing_and_the_probe(
    params: Params, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = read_results(params)
    captions, names = verdict.verdicts(results)
    text = names.text.replace("\u00a0", " ")
    assert text.startswith(
        "classes: 78.0 % of 100 test pictures are named rightly without the language model (guessing: 25.0 %)"
    )
    assert (
        "which is not shown to be better or worse than a linear probe of the same tokens (90.0 %) or the "
        "language model's names (90.0 %)." in text
    )
    monkeypatch.setattr(verdict, "caution", lambda results, data: "Too much." if data == "classes" else "")
    verdict.tell(results)
    told = " ".join(capsys.readouterr().out.split())
    order = [told.index(part) for part in (captions.text[:30], "classes: 78.0", "classes: Too much.", "profile demo")]
    assert order[0] == 0 and order == sorted(order)
    text = report(params)
    assert text.index('class="card verdict') < text.index('class="grid tiles"')
    for name in params.run.adapters:
        shutil.rmtree(BASE / "name" / name)
        named(f"{name}-classes/classes", 30)
    [*_, names] = verdict.verdicts(read_results(params))
    assert "30.0\u00a0% of 100" in names.text and "not shown to be better than guessing" in names.text
    assert names.mood == "no"
    for name in params.run.adapters:
        named(f"{name}-classes/classes", 60)
    [*_, names] = verdict.verdicts(read_results(params))
    assert "worse than a linear probe" in names.text and names.mood == "no"


def test_few_pictures_make_no_headline_of_captions_found(params: Params) -> None:
    for name in params.run.adapters:
        path = BASE / f"pretrain/{name}/metrics.json"
        path.write_text(path.read_text().replace('"held_out": 100', '"held_out": 29'))
    results = read_results(params)
    assert not [tile for tile in page.tiles(results, convergence.collect(params)) if "find their own" in tile.label]


def test_two_points_are_no_curve(params: Params) -> None:
    two = pd.DataFrame({"adapter": "mlp", "recipe": "captions", "start": "emd", "step": [0, 9], "val_loss": [3.0, 1.0]})
    assert convergence.draw_finetuning(two, BASE) == []
    three = pd.concat([two, two.tail(1).assign(step=4)])
    assert [path.name for path in convergence.draw_finetuning(three, BASE)] == ["convergence-others-captions.png"]


def test_main_figures(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {row[:3]: row[3].replace("\u00a0", " ") for row in figures.main_figures(read_results(params))}
    assert found["accuracy", "classes", "query"] == "90.0 % (82.6 % to 94.5 %)"
    assert found[LABELS["namer"], "classes", "mlp"] == "78.0 % (68.9 % to 85.0 %)"
    assert found["discriminant analysis", "classes", ""].startswith("73.0 %")
    assert found["linear probe", "classes", ""] == "90.0 % (80.0 % to 95.0 %)"
    assert found["image gain of pre-training", "captions", "mlp"] == "0.250 EMD (0.250 to 0.250)"
    assert found["validation loss from scratch", "captions", "self_attention"] == "2.500"
    assert found["classes", "classes", ""] == "4"
    assert "without 1 stage restored" in found["time of all stages, added up", "", ""]
    table = figures.terminal_table(read_results(params))
    assert [column.header for column in table.columns] == ["", "", *dict.fromkeys(name for *_, name in found if name)]
    shown = {(row[0], name): cell for row in zip(*(column.cells for column in table.columns), strict=True)
             for name, cell in zip([column.header for column in table.columns][1:], row[1:], strict=True)}  # fmt: skip
    assert shown["accuracy", "query"].replace("\u00a0", " ") == "90.0 %\n(82.6 % to 94.5 %)"
    assert shown["linear probe", ""].startswith("90.0") and not shown["linear probe", "mlp"]
    monkeypatch.setattr(figures, "COLUMNS", 2)  # too many of them: a row for each figure of each
    table = figures.terminal_table(read_results(params))
    assert len(table.columns) == 2 and "accuracy, query" in table.columns[0].cells


def test_figures_of_several_objectives_are_told_apart(params: Params) -> None:
    values = params.model_dump()
    values["adapters"]["mlp"]["pretrain"] = {"objective": {"name": "caption_ce"}}
    write("pretrain/mlp/metrics.json", {"val": 3.0, "image_gain": 0.5, "plain_gain": 0.75, "r1_debiased": 0.5})
    results = read_results(Params.model_validate(values))
    metrics = figures.flat_metrics(results)
    assert metrics["caption_ce/mlp/val"] == 3 and metrics["emd/mlp/plain_gain"] == 0.75 and metrics["emd/query/val"]
    assert "emd/mlp/val" not in metrics and metrics["retrieval/mlp/r1_debiased"] == 0.5
    gains = {row[2]: row[3] for row in figures.main_figures(results) if row[0].startswith("image gain")}
    assert gains["mlp"] == "0.500 caption_ce" and "EMD" in gains["query"]
    table = tables.pretraining_table(results)
    measured, plain = (table.head.index(head) - 1 for head in ("measured by", "image gain in\nplain EMD"))
    assert {name: (row[measured].text, row[plain].text) for name, row in table.rows} == {
        "mlp": ("caption_ce", "0.750"), "self_attention": ("EMD", "–"), "query": ("EMD", "–"),
    }  # fmt: skip
    text = page.write_report(results).read_text()
    assert "Distance (caption_ce and EMD)" in text and "with the language model</span>" in text
    assert "measured by" not in tables.pretraining_table(read_results(params)).head


def both(params: Params) -> Params:
    """A recipe of both data sets beside those of one."""
    values = params.model_dump()
    recipes = values["finetune"]["recipes"]
    prompts = recipes["captions"]["prompts"] | recipes["classes"]["prompts"]
    recipes["both"] = recipes["captions"] | {"data": ["captions", "classes"], "prompts": prompts}
    values["run"] |= {"recipes": ["captions", "classes", "both"], "scratch_recipes": ["captions", "both"]}
    for name in params.run.adapters:
        captioned(f"{name}-both/captions")
        named(f"{name}-both/classes", ACCURACY[name])
        metrics = {"val_loss": 9.0, "val_loss/captions": 1.25, "val_loss/classes": 1.75}
        for folder in (f"finetune/{name}-both", f"finetune/{name}-both-scratch"):
            write(f"{folder}/metrics.json", metrics)
            write(f"{folder}/history.csv", losses(9.0))
    return Params.model_validate(values)


def test_a_recipe_on_several_data_sets(params: Params) -> None:
    results = read_results(both(params))
    metrics = figures.flat_metrics(results)
    assert metrics["captions/mlp/both/val_loss"] == 1.25 and metrics["classes/mlp/both/val_loss"] == 1.75
    assert metrics["classes/self_attention/both/scratch_val_loss"] == 1.75 and 9.0 not in metrics.values()
    assert [results.name(results.best(data)) for data in results.measured] == ["mlp on both", "query on classes"]
    text = report(results.params)
    assert len(Page(text).ids) == len(set(Page(text).ids))
    assert "self_attention on both" in text and "fine-tuning on captions and both" in text
    assert (BASE / "report/convergence-self_attention-both.png").exists()
    assert len(convergence.collect(results.params)) == 2 * 4 * 4


OWN_TASK = """
import pandas as pd
from pipeline.config.base import Section
from pipeline.tasks.base import Task

class Counting(Task):
    Settings = Section
    prompt, max_tokens = "How many?", 2
    def answers(self, rows): ...
    def predict(self, models, images, batch, seed): ...
    def write(self, predictions, folder): ...
    @classmethod
    def read(cls, folder):
        return pd.DataFrame({"id": ["a", "b"], "image": ["picture.png", "gone.png"], "said": ["two <3", ["3", "4"]]})
"""


def test_a_task_of_an_own_package_has_its_section(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("own_tasks.py").write_text(OWN_TASK)
    monkeypatch.syspath_prepend(".")
    counted = params.data["classes"].model_copy(update={"task": "own_tasks:Counting"})
    text = report(params.model_copy(update={"data": params.data | {"classes": counted}}))
    sys.modules.pop("own_tasks")
    assert "classes: How many?" in text and "The first 2 answers of query" in text
    assert "<td>two &lt;3</td>" in text and "<td>3 / 4</td>" in text and "90.0\u00a0%<small>82.6" in text


def test_gain_over_blind_answers_and_number_of_candidates(params: Params) -> None:
    assert tables.below_blind({"val": 3.0, "const_token": 5.0, "const_set": 4.0}) == pytest.approx(0.25)
    assert tables.below_blind({"val": 5.0, "const_token": 4.0, "const_set": 4.5}) == pytest.approx(-0.25)
    assert tables.below_blind({"val": 5.0}) is None
    results = read_results(params)
    assert tables.candidates_of(results, "mlp") == 100
    results.pretrain["mlp"]["held_out"] = 40
    assert tables.candidates_of(results, "mlp") == 40


def test_convergence_table_and_steps_to_match(params: Params) -> None:
    table = convergence.collect(params)
    assert list(table.columns) == convergence.COLUMNS
    assert len(table) == 4 * 4 and set(table["start"]) == {"emd", "scratch"} and not table["val_loss"].isna().any()
    assert convergence.steps_to_match(table, "self_attention", "captions") == (20, 30)
    assert convergence.steps_to_match(table, "mlp", "captions") is None
    never = table.assign(val_loss=table["val_loss"].where(table["start"] == "scratch", 9.0))
    assert convergence.steps_to_match(never, "self_attention", "captions") == (None, 30)


def test_nothing_need_be_run_from_scratch(params: Params) -> None:
    run = params.run.model_copy(update={"scratch": [], "scratch_recipes": []})
    for folder in (BASE / "finetune").glob("*-scratch"):
        shutil.rmtree(folder)
    alone = params.model_copy(update={"run": run})
    text = report(alone)
    assert "nothing was run from scratch to compare with" in text and "Does pre-training pay?" not in text
    assert "fine-tuning on captions and classes" in text and "not run" not in text
    assert (BASE / "report/convergence-others-classes.png").exists()
    curves = pd.read_csv(BASE / "report/curves.csv")
    assert curves["with_pretraining"].notna().all() and curves["without_pretraining"].isna().all()
    tiles = page.tiles(read_results(alone), convergence.collect(alone))
    assert not [tile for tile in tiles if "fine-tuning steps" in tile.label]


def test_a_pre_training_without_a_step_has_a_picture(params: Params) -> None:
    write("pretrain/mlp/history.csv", "step,train_loss,epoch,val,shuffled\n0,,0.0,2.0,3.0\n")
    assert "<h1" in report(params)
    assert Run.of(params).report.joinpath("pretraining-mlp.png").stat().st_size > 1000


def test_a_pre_training_that_does_not_pay_is_called_so(params: Params) -> None:
    write("finetune/self_attention-captions/history.csv", losses(4.0))
    tiles = page.tiles(read_results(params), convergence.collect(params))
    assert tiles[2].value == "no gain" and "validation loss 4.00 with it, 2.50 without" in tiles[2].note


@pytest.mark.parametrize(
    ("count", "of", "low", "high"), [(50, 100, 0.404, 0.596), (20, 20, 0.839, 1.0), (0, 20, 0.0, 0.161)]
)
def test_shares_have_wilsons_interval(count: int, of: int, low: float, high: float) -> None:
    figure = share_of("share", [number < count for number in range(of)], "a share")
    assert figure.value == count / of and figure.interval == pytest.approx((low, high), abs=6e-4)
    assert Figure.from_json(json.loads(json.dumps(figure.as_json()))) == figure


def test_durations_shares_and_lists() -> None:
    assert [figures.duration(s).replace("\u00a0", " ") for s in (3.21, 59.7, 75, 7384)] == [
        "3.2 s",
        "1 min 0 s",
        "1 min 15 s",
        "2 h 3 min",
    ]
    assert figures.percent(0.8351).replace("\u00a0", " ") == "83.5 %"
    assert [page.listed(list(names)) for names in ("", "a", "ab", "abc")] == ["", "a", "a and b", "a, b and c"]
    assert figures.written(Figure("k", float("nan"), "l")) == "not finite"
