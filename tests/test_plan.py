"""The plan: what is stale, what it takes by what was measured, when it ends side by side, and how far off it was."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.config import Params
from pipeline.plan.calibrate import Language, Pretraining, Vision, _language, _vision
from pipeline.plan.estimate import Estimate, Machine
from pipeline.plan.rows import Rows, rows_of
from pipeline.plan.schedule import SPREAD, times
from pipeline.runs import Run, stages
from pipeline.sources import manifest
from pipeline.sources.prepare import prepare
from stages import cli
from stages.run import lengths

LANGUAGE = Language(8.0, 2.0, 0.01, 0.003, {1: 0.05, 32: 0.2}, 1e9)
VISION = Vision(5.0, 1.0, 0.02, 0.01, 0.5, {"mlp": Pretraining(0.5, 0.01, 1e-4)}, 8e8, {})
ROWS = {"captions": Rows(70, 15, 15, 2, 12.0, 0, True), "classes": Rows(140, 30, 30, 1, 3.0, 8, True)}
GRAPH = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}


def estimates(**seconds: tuple[float, float]) -> dict[str, Estimate]:
    return {stage: Estimate(0, 0, start, work, 0) for stage, (start, work) in seconds.items()}


def test_stages_end_as_if_run_side_by_side() -> None:
    found = estimates(a=(1, 3), b=(1, 9), c=(1, 4), d=(1, 1))
    urgency = lengths(GRAPH).__getitem__
    alone = 2 * SPREAD  # how much faster a stage computes that has both cores
    each, wall = times(GRAPH, found, 0.5, 2, 2, urgency)
    assert each == {"a": 1 + 3 / alone, "b": 10.0, "c": 5.0, "d": 1 + 1 / alone}
    assert wall == pytest.approx(each["a"] + 10 + each["d"] + 3 * 0.5)  # c ends within b
    each, wall = times(GRAPH, found, 0.5, 1, 2, urgency)
    assert each == {"a": 4.0, "b": 10.0, "c": 5.0, "d": 2.0} and wall == 21 + 4 * 0.5
    each, wall = times(GRAPH, {"d": found["d"]}, 0.0, 2, 2, urgency)
    assert list(each) == ["d"] and wall == each["d"]


@pytest.fixture
def machine(tiny_params: Params) -> Machine:
    return Machine(of_mlp(tiny_params), ROWS, LANGUAGE, VISION)


def of_mlp(params: Params, **changes: Any) -> Params:
    values = params.model_dump() | changes
    values["run"] |= {"adapters": ["mlp"], "scratch": ["mlp"]}
    return Params.model_validate(values)


def test_every_stage_has_an_estimate(machine: Machine) -> None:
    for stage in [*stages(machine.params), "report"]:
        found = machine.estimate(stage)
        assert found.start + found.work > 0 and found.peak > 0, stage


def test_estimates_follow_what_there_is_to_do(machine: Machine) -> None:
    recipes = machine.params.finetune.recipes
    more = recipes | {"classes": recipes["classes"].model_copy(update={"max_steps": 6, "validation_images": 1})}
    once = recipes | {"classes": recipes["classes"].model_copy(update={"max_steps": 3, "validation_images": 1})}
    work = []
    for some in (once, more):
        tuned = machine.params.finetune.model_copy(update={"recipes": some})
        found = replace(machine, params=machine.params.model_copy(update={"finetune": tuned}))
        work.append(found.estimate("finetune@mlp-classes").work)
    length = 9 + 12 + 4 + (1.5 + 1) * 4.0  # image tokens, what is behind them, hints (most have one or two) and answer
    assert work[1] - work[0] == pytest.approx(3 * 4 * length * LANGUAGE.trained)
    assert machine.estimate("extract_images@classes").work == pytest.approx(200 * 0.03)
    stored = replace(machine, vision=replace(VISION, stored={"classes": 150}))
    assert stored.estimate("extract_images@classes").rows == 50
    more = replace(machine, vision=replace(VISION, stored={"classes": 203}))  # of which three were removed
    assert more.estimate("extract_images@classes").rows == 0


def test_rows_are_counted_where_they_are_prepared(tiny_params: Params) -> None:
    assumed = rows_of(tiny_params, "classes")
    assert (assumed.pictures, assumed.classes, assumed.counted) == (48, 12, False)
    manifest.write(prepare(tiny_params, "classes"), Run.of(tiny_params).manifest("classes"))
    counted = rows_of(tiny_params, "classes")
    assert (counted.pictures, counted.classes, counted.texts, counted.counted) == (48, 12, 1.0, True)
    assert min(counted.train, counted.val, counted.test) > 0


def test_what_is_measured_is_measured(tiny_params: Params) -> None:
    params = of_mlp(tiny_params)
    rows = {name: rows_of(params, name) for name in params.run.data}
    language, vision = _language(params, rows, time.time()), _vision(params, rows, time.time())
    assert 0 < language.read < language.trained and all(seconds > 0 for seconds in language.written.values())
    assert min(vision.encoded, vision.decoded, vision.axes) > 0 and vision.stored == {}
    one = vision.adapters["mlp"]
    assert 0 < one.pair < one.held_out < one.step


def planned(monkeypatch: pytest.MonkeyPatch, stale: set[str]) -> list[int]:
    """Have the commands plan with made-up measurements; how often was measured."""
    measured: list[int] = []

    def calibrate(params: Params, rows: dict[str, Rows], jobs: int) -> tuple[Language, Vision]:
        measured.append(jobs)
        return LANGUAGE, VISION

    graph = {"prepare@classes": [], "pretrain@mlp": ["prepare@classes"], "report": ["pretrain@mlp"]}
    monkeypatch.setattr("stages.plan.stale_stages", lambda: (graph, stale))
    monkeypatch.setattr("pipeline.plan.calibrate.calibrate", calibrate)
    return measured


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["plan", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_an_unchanged_profile_has_nothing_to_do(tiny_params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = planned(monkeypatch, set())
    assert "nothing to do" in run() and measured == []
    assert json.loads(run("--json"))["stages"] == {}


def test_a_plan_is_shown_kept_and_held_against_what_came(tiny_params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(of_mlp(tiny_params).model_dump(mode="json")))
    planned(monkeypatch, {"pretrain@mlp", "report"})
    assert "no plan yet" in run("--check", code=2)
    said = run()
    assert "pretrain@mlp" in said and "prepare@classes" not in said and "on the clock" in said
    assert "of stages alone; not in it: the 0 s of measuring" in said
    kept = json.loads(Path("data/tiny/plan.json").read_text())
    assert kept["sum"] == pytest.approx(sum(one["seconds"] for one in kept["stages"].values()))
    assert "none of its stages ran since" in run("--check", code=2)
    seconds = Path("data/tiny/seconds")
    seconds.mkdir()
    took = kept["stages"]["pretrain@mlp"]["seconds"] / 2
    (seconds / "pretrain@mlp.json").write_text(json.dumps({"seconds": took, "peak_bytes": 5e8}))
    (seconds / "report.json").write_text('{"seconds": 1000}')
    os.utime(seconds / "report.json", (0, 0))  # ran before the plan
    os.utime(seconds / "pretrain@mlp.json", (kept["at"] + 1, kept["at"] + 1))
    found = json.loads(run("--check", "--json"))
    assert list(found["stages"]) == ["pretrain@mlp"] and found["ratio"] == pytest.approx(2)
    assert found["stages"]["pretrain@mlp"]["peak"] == 5e8
    said = run("--check")
    assert "100 % too much planned, more than the 25 %" in said and "other work on the machine" in said
