"""A study: which trainings it is of, the parameters that make them stages, and the page of what they came to."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from PIL import Image
from scipy.stats import ttest_1samp

from pipeline.config import parse_params, read_yaml
from pipeline.config.study import Cell, fitted, parameters_of, parse_study
from pipeline.errors import UserError
from pipeline.first.layout import recognise
from pipeline.first.profile import written
from pipeline.report.paired import compared, interval
from pipeline.report.study import winners, write_study
from pipeline.runs import Run
from stages import study as command

TEXT = """
adapters: [linear, query]
seeds: [1, 2]
recipes:
  captions: {}
  frozen: {of: captions, adapter_lr: 0}
steps: 7
seconds: 5
parameters: {run: {data: [captions]}, pretrain: {data: [captions]}, pca: {images: 9}}
methods:
  emd: {}
  start: {pretrain: {max_steps: 1, objective: {contrast: 0.0}}}
  late: {finetune: {captions: {adapter_lr: 0.5}}, adapters: [query]}
"""


def values(project):
    return read_yaml((project / "profiles/demo.yaml").read_text(), "demo.yaml")


@pytest.fixture
def project(request):
    return request.config.rootpath


def test_every_combination_once_and_the_first_seed_first():
    cells = parse_study(TEXT, "study.yaml").cells()
    assert len({cell.name for cell in cells}) == len(cells) == 2 * 2 * (2 + 2 + 1)
    assert {cell.seed for cell in cells[: len(cells) // 2]} == {1}
    assert {cell.adapter for cell in cells if cell.method == "late"} == {"query"}


def test_what_takes_no_time_has_no_run_of_equal_time():
    text = TEXT.replace("max_steps: 1", "max_steps: 0")
    budgets = {cell.seconds for cell in parse_study(text, "study.yaml").cells() if cell.method == "start"}
    assert budgets == {None}


def test_a_training_is_its_adapter_with_the_changes_of_its_method(project):
    study = parse_study(TEXT, "study.yaml")
    params = parse_params(json.dumps(parameters_of(study, values(project))), "study")
    demo = parse_params((project / "profiles/demo.yaml").read_text(), "demo")
    assert params.profile == "demo-study" and params.seed == demo.seed
    assert params.kind_of("query_emd_1") == "query"
    assert params.adapter("query_emd_1").architecture["width"] == demo.adapter("query").architecture["width"]
    assert params.run.data == ["captions"] and params.pca.images == 9
    trained = params.pretrain_for("query_emd_2")
    assert (trained.seed, trained.max_steps, trained.max_seconds) == (2, 7, None)
    assert (trained.lr, trained.objective) == (demo.pretrain_for("query").lr, demo.pretrain.objective)
    started = params.pretrain_for("linear_start_1")
    assert started.objective.contrast == 0 and started.objective.unmatched == demo.pretrain.objective.unmatched
    timed = params.pretrain_for("linear_emd_1_5s")
    assert (timed.max_steps, timed.max_seconds) == (None, 5)
    assert params.finetune_for("query_late_1", "captions").adapter_lr == 0.5
    assert params.finetune_for("query_late_1", "frozen").adapter_lr == 0
    assert params.finetune_for("query_emd_2", "captions").seed == 2


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (("[linear, query]", "[linear, none_such]"), "none_such"),
        (("of: captions", "of: nothing"), "recipes: nothing"),
        (("seconds: 5", "seconds: 0"), "seconds"),
        (("steps: 7\nseconds: 5", ""), "steps or seconds"),
        (("  emd: {}", "  emd: {pretrian: {}}"), "methods.emd.pretrian"),
    ],
)
def test_a_fault_is_named(project, change, fault):
    text = TEXT.replace(*change)
    assert text != TEXT
    with pytest.raises(UserError, match=fault):
        parameters_of(parse_study(text, "study.yaml"), values(project))


def test_two_trainings_of_one_name_are_refused():
    text = "adapters: [mlp, mlp_a]\nrecipes: {captions: {}}\nmethods: {b: {}, a_b: {}}\nseeds: [1]\nsteps: 1"
    with pytest.raises(UserError, match="mlp_a_b_1"):
        parse_study(text, "study.yaml")


def test_params_come_back_also_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command.PARAMS.write_text("profile: demo\n")
    with pytest.raises(KeyboardInterrupt), command._active("profile: demo-study\n"):
        assert "study" in command.PARAMS.read_text()
        raise KeyboardInterrupt
    assert command.PARAMS.read_text() == "profile: demo\n"
    kept = tmp_path / "data/demo-study" / command.KEPT  # as a kill leaves it
    kept.write_text("profile: demo\n")
    command.PARAMS.write_text("profile: demo-study\n")
    assert command._own_parameters() == ("profile: demo\n", False)
    assert command.PARAMS.read_text() == "profile: demo\n"
    assert not list(tmp_path.rglob(command.KEPT))


def test_each_training_has_a_core_of_its_own(tmp_path, project, monkeypatch):
    """So that equal seconds are the same however many run side by side."""
    monkeypatch.chdir(tmp_path)
    command.PARAMS.write_text((project / "profiles/demo.yaml").read_text())
    (tmp_path / "study.yaml").write_text(TEXT)
    asked = []
    monkeypatch.setattr(command, "stages_of_graph", lambda: defaultdict(list))
    monkeypatch.setattr(command, "run_stages", lambda *_, **options: asked.append(options) or [])
    monkeypatch.setattr("pipeline.report.study.write_study", lambda *_: "study.html")
    command.study(tmp_path / "study.yaml", only=["emd", "1"], jobs=1, dry_run=False, page=False)
    assert asked == [{"go_on": True, "threads": 1}]


def test_a_study_at_work_is_left_alone(tmp_path, project, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = (project / "profiles/demo.yaml").read_text()
    command.PARAMS.write_text(own)
    (tmp_path / "study.yaml").write_text(TEXT)
    with command._active("profile: demo-study\n"):
        command.study(tmp_path / "study.yaml", only=["late", "1", "steps"], jobs=1, dry_run=True, page=False)
        said = capsys.readouterr()
        assert said.out.split() == ["query_late_1"] and said.err == "1 training, 0 of them run here before\n"
        with pytest.raises(UserError, match="a study is at work"):
            command.study(tmp_path / "study.yaml", only=None, jobs=1, dry_run=False, page=False)
        assert command.PARAMS.read_text() == "profile: demo-study\n"
    assert command.PARAMS.read_text() == own


def test_a_part_of_a_study_is_asked_for_by_its_words():
    study = parse_study(TEXT, "study.yaml")
    assert [c.name for c in command._chosen(study, ["query", "late", "2", "steps"])] == ["query_late_2"]
    with pytest.raises(UserError, match="no such training; there are"):
        command._chosen(study, ["mlp"])


def made(folder, name, values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(values if isinstance(values, str) else json.dumps(values))


@pytest.fixture
def page(project, tmp_path, monkeypatch):
    """The page of a study of which six trainings were run."""
    text = (project / "profiles/demo.yaml").read_text()
    study = parse_study(TEXT, "study.yaml")
    params = parse_params(json.dumps(parameters_of(study, read_yaml(text, "demo.yaml"))), "study")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no training"):
        write_study(params, study)
    run = Run.of(params)
    for cell in study.cells():
        if cell.seconds or cell.adapter == "linear":
            continue  # not run yet
        gain, loss = (0.1, 2.0) if cell.method == "emd" else (0.05, 2.5)
        made(run.pretrained(cell.name), "metrics.json", {"plain_gain_relative": gain * cell.seed})
        made(run.pretrained(cell.name), "history.csv", "step,val\n0,1\n10,0.5\n")
        made(run.seconds("x").parent, f"pretrain@{cell.name}.json", {"training": 32.0, "peak_bytes": 2.0**31})
        made(run.finetuned(cell.name, "captions"), "metrics.json", {"val_loss": loss + cell.seed / 10})
        made(run.finetuned(cell.name, "captions"), "history.csv", f"step,val_loss\n0,3\n4,{loss}\n")
        figure = {"key": "f1", "value": 0.5, "label": "things, F1"}
        score = {"key": "cider", "value": 1.0, "label": "CIDEr-D", "kind": "number"}
        over = {"key": "cider_over_nearest", "value": 0.1, "label": "CIDEr-D over the nearest's", "kind": "number"}
        chance = {"key": "chance", "value": 0.2, "label": "chance", "baseline": True}
        new = {"key": "recall_unseen", "value": 0.25, "label": "never captioned, named"}
        counted = {"key": "captioned_unseen", "value": 19, "label": "pictures with such things", "kind": "count"}
        figures = [figure, score, over, chance, new, counted]
        made(run.evaluated(cell.name, "captions") / "captions", "figures.json", figures)
        scored = "a,3,0.1\nb,1,0.1\n" if cell.method == "emd" else "b,2,0.1\na,1,0.1\n"
        made(
            run.evaluated(cell.name, "captions") / "captions", "pictures.csv", "id,cider,cider_over_nearest\n" + scored
        )
    return write_study(params, study)


def test_the_page_is_no_wider_than_a_screen(page, fits_screens):
    fits_screens(page)


def test_the_page_has_means_over_the_seeds_and_who_wins(page):
    text = page.read_text()
    assert "6 of 20 trainings" in text
    # The mean of 2 and -1, with a standard error of 1.5: t is 12.7.
    assert (
        "By how much emd is ahead of each, after 7 steps" in text
        and "<td>+0.500<small>-18.559 to +19.559, 2 seeds</small></td>" in text
    )
    assert '<td class="yes">+0.100<small>+0.100 to +0.100, 2 seeds</small></td>' in text
    assert "15.0 ± 7.1" in text  # the mean of 10 and 20 %, and their standard deviation
    assert "100.0" in text  # ms a picture: 32 s for 10 steps of 32
    assert "query has the lowest loss on captions by emd, 2.150" in text and "worse with 2 of 2 seeds" in text
    own, unseen = text.split('<section id="unseen">')
    assert "never captioned, named, %" in unseen and "(19 of captions)" in unseen and "never captioned" not in own
    assert "captions: chance 20.0 %" in text and text.count("<img") == 4
    rows = page.with_name("study.csv").read_text().splitlines()
    assert len(rows) == 7 and "captions/captions/f1" in rows[0]


def test_what_no_adapter_decides_has_no_winner():
    runs = {"adapter": ["mlp"] * 4, "method": ["emd", "plain"] * 2, "seed": [1, 1, 2, 2]}
    table = pd.DataFrame(runs | {"acc": [0.5, 0.4, 0.6, 0.3], "alike": [0.7, 0.7, 0.8, 0.8]})
    [line] = winners(table, "acc", ("accuracy", 100.0, 1), "at last")
    assert line == "at last: mlp has the highest accuracy by emd, 55.0; next is plain, 35.0, worse with 2 of 2 seeds"
    assert not list(winners(table, "alike", ("probe", 100.0, 1), "at last"))


def test_one_picture_in_common_has_no_interval():
    first, second = Cell("mlp", "emd", 1), Cell("mlp", "other", 1)
    scores = {
        cell: pd.DataFrame({"cider": [1.0, 2.0]}, index=list(ids)) for cell, ids in ((first, "ab"), (second, "bc"))
    }
    columns = {"cider": ("CIDEr-D", 1.0, 3)}
    assert compared(scores, [first, second], "emd", columns).rows == []
    scores[second] = scores[first] - 0.5
    [(name, [cell])] = compared(scores, [first, second], "emd", columns).rows
    assert (name, cell.text, cell.mood) == ("mlp: other", "+0.500", "")  # one seed decides nothing


def test_an_interval_of_one_seed_is_that_of_its_pictures():
    values = np.random.default_rng(3).normal(1, 1, 50)
    expected = ttest_1samp(values, 0).confidence_interval()
    assert interval(values[None]) == pytest.approx((expected.low, expected.high))
    assert interval(np.full((3, 4), 0.5)) == (0.5, 0.5)


@pytest.mark.parametrize(("pictures", "of_seeds", "of_pictures"), [(100, 1.0, 0.1), (100, 0.0, 1.0), (30, 0.3, 1.0)])
def test_an_interval_holds_the_truth_in_19_of_20_studies(pictures, of_seeds, of_pictures):
    """Also of three seeds, which differ, on pictures that differ."""
    draw, held = np.random.default_rng(4), 0
    for _ in range(400):
        seeds, each = draw.normal(0, of_seeds, (3, 1)), draw.normal(0, of_pictures, pictures)
        low, high = interval(seeds + each + draw.normal(0, 0.5, (3, pictures)))
        held += low < 0 < high
    assert 0.93 <= held / 400 <= 1


def test_the_command_names_trainings_without_running_any(project, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command.PARAMS.write_text((project / "profiles/demo.yaml").read_text())
    (tmp_path / "mine.yaml").write_text(TEXT)
    command.study(tmp_path / "mine.yaml", only=["emd", "1"], jobs=1, dry_run=True, page=False)
    names, said = ["linear_emd_1", "query_emd_1", "linear_emd_1_5s", "query_emd_1_5s"], capsys.readouterr()
    assert said.out.split() == names and said.err == "4 trainings, 0 of them run here before\n"
    study = parse_study(TEXT, "mine.yaml")
    for stage in study.cells()[0].stages(study.recipes):
        path = Run("demo-study").seconds(stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"seconds": 20.0}')
    command.study(tmp_path / "mine.yaml", only=["emd", "1"], jobs=1, dry_run=True, page=False)
    said = capsys.readouterr()
    assert (
        "4 trainings, 1 of them run here before; the other 3 take 6\u00a0min 0\u00a0s, one after the other" in said.err
    )
    with pytest.raises((UserError, typer.Exit)):
        command.study(tmp_path / "none.yaml", only=None, jobs=1, dry_run=True, page=False)


@pytest.mark.parametrize(("kind", "recipe"), [("classes", "classes"), ("captions", "captions"), ("demo", "captions")])
def test_the_study_that_is_there_fits_what_try_writes_and_the_demo(
    project, tmp_path, monkeypatch, capsys, kind, recipe
):
    monkeypatch.chdir(tmp_path)
    names = ("ant.png", "bee.png") if kind == "captions" else ("ant/1.png", "bee/1.png")
    for name in names:
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "own" / name)
    if kind == "captions":
        Path("own/captions.csv").write_text("file,text\nant.png,an ant\nbee.png,a bee\n")
    own = Path("own").resolve()
    text = (project / "profiles/demo.yaml").read_text() if kind == "demo" else ""
    command.PARAMS.write_text(text or written(recognise(own), {}, "own", own, "try"))
    study = project / "study.yaml"
    command.study(study, only=["emd", "17", "steps"], jobs=1, dry_run=True, page=False)
    said = capsys.readouterr()
    there = ["mlp", "query"] if kind == "demo" else ["mlp"]
    assert said.out.split() == [f"{adapter}_emd_17" for adapter in there]
    assert ("adapters.query" in said.err) == (kind != "demo") and ("recipe captions" in said.err) == (kind == "classes")
    assert said.err.count("left out of") == (kind != "demo")
    compared, _ = fitted(parse_study(study.read_text(), "study"), read_yaml(command.PARAMS.read_text(), "params"))
    params = parse_params(json.dumps(parameters_of(compared, read_yaml(command.PARAMS.read_text(), "params"))), "study")
    assert params.run.recipes == [recipe] and len(params.run.adapters) == (84 if kind == "demo" else 54)
    with pytest.raises(UserError, match="--only none_such: no such training"):
        command.study(study, only=["none_such", "mlp"], jobs=1, dry_run=True, page=False)
    assert capsys.readouterr().err == ""  # nothing is said before it
    if kind != "demo":
        with pytest.raises(UserError, match="--only query: no such training; there are 17, emd, mlp"):
            command.study(study, only=["query"], jobs=1, dry_run=True, page=False)


def test_an_adapter_that_nobody_knows_is_no_part_that_may_be_missing(project):
    text = TEXT.replace("[linear, query]", "[linear, qeury]")
    with pytest.raises(UserError, match="adapters: qeury"):
        parameters_of(fitted(parse_study(text, "study"), values(project))[0], values(project))
