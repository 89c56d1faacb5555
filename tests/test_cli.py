"""The command line: help that teaches, profiles that are checked before they replace anything, faults on one line."""

from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from ruamel.yaml import YAML
from typer.testing import CliRunner

import stages
from pipeline.config import load_params
from pipeline.errors import UserError, UserErrors
from stages import cli

PROJECT = Path(__file__).parents[1]
runner = CliRunner()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with the profiles and no params.yaml, as the current folder."""
    (tmp_path / "profiles").mkdir()
    for path in (PROJECT / "profiles").glob("*.yaml"):
        (tmp_path / "profiles" / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def terraalign(*arguments: str) -> tuple[int, str]:
    """Exit code and everything printed."""
    result = runner.invoke(cli.app, arguments)
    return result.exit_code, result.output


def test_help_teaches_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from stages.cli import app; heavy = {'torch', 'transformers', 'matplotlib', 'pandas', 'pyarrow'}; "
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "print(sorted(heavy & set(sys.modules)))"],
        cwd=PROJECT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
    _, text = terraalign("--help")
    for word in ("dvc repro", "params.yaml", "report/index.html", "data/store", *cli.COMMANDS):
        assert word in " ".join(text.split()), word


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    code, text = terraalign(name, "--help")
    assert code == 0 and len(text) > 200
    example = cli.COMMANDS[name][2]
    assert f"Example: {example}" in " ".join(text.split())
    command, words = typer.main.get_command(cli.app).commands[name], shlex.split(example)
    command.make_context(name, words[2:])  # raises where it cannot be typed
    assert words[:2] == ["terraalign", name]


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in cli.GROUPS for name in cli.GROUPS[group][2]])
def test_every_command_of_a_group_explains_itself(group: str, name: str) -> None:
    code, text = terraalign(group, name, "--help")
    example = cli.GROUPS[group][2][name]
    assert code == 0 and f"Example: {example}" in " ".join(text.split())
    commands = typer.main.get_command(cli.app).commands[group].commands
    words = shlex.split(example)
    commands[name].make_context(name, words[3:])
    assert words[:3] == ["terraalign", group, name] and commands.keys() == cli.GROUPS[group][2].keys()


def test_the_version_is_that_of_the_package() -> None:
    code, said = terraalign("--version")
    assert code == 0 and said == f"terraalign {version('terraalign')}\n"


def test_use_writes_the_profile_byte_for_byte(folder: Path) -> None:
    code, _ = terraalign("profile", "use", "demo")
    assert code == 0
    assert (folder / "params.yaml").read_bytes() == (folder / "profiles" / "demo.yaml").read_bytes()


def test_use_changes_values_and_keeps_comments(folder: Path) -> None:
    code, text = terraalign(
        "profile", "use", "thesis", "--set", "data.captions.root=/coco", "--set", "data.classes.root=/food",
        "--set", "adapters.mlp.architecture={hidden: 64}", "--set", "pretrain.lr=5e-4",
    )  # fmt: skip
    assert code == 0, text
    written = (folder / "params.yaml").read_text()
    assert "# the thesis names no" in written and "system_prompt: null" in written
    params = load_params()
    assert params.data["captions"].root == Path("/coco") and params.pretrain.lr == 5e-4
    assert params.adapters["mlp"].architecture == {"hidden": 64}


def test_use_takes_a_path(folder: Path) -> None:
    (folder / "mine.yaml").write_text(
        (folder / "profiles" / "demo.yaml").read_text().replace("profile: demo", "profile: my")
    )
    assert terraalign("profile", "use", "mine.yaml")[0] == 0
    assert load_params().profile == "my"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "there is no profile nope; known: demo, photos, thesis"),
        (["nope.yaml"], "nope.yaml: cannot be read"),
        (["photos"], "data.captions.root is null"),
        (
            ["demo", "--set", "pretrain.epoch=1"],
            "pretrain.epoch is 1: unknown key; did you mean epochs? known here: accumulate",
        ),
        (["demo", "--set", "pretrian.lr=1"], "pretrian: unknown key; did you mean pretrain?"),
        (["demo", "--set", "pretrain.lr"], "expected KEY=VALUE"),
        (["demo", "--set", "pretrain.lr.x=1"], "lr is a value, not a section"),
        (["demo", "--set", "pretrain.lr=[1"], "not valid YAML"),
    ],
)
def test_a_bad_choice_leaves_the_old_file_alone(folder: Path, arguments: list[str], message: str) -> None:
    (folder / "params.yaml").write_text("old")
    code, text = terraalign("profile", "use", *arguments)
    assert code == 2 and message in text, text
    assert (folder / "params.yaml").read_text() == "old"
    assert not (folder / "params.tmp").exists()


TEXTS = [
    "My Set #2", "a: b/classes", " lead", "trail ", '"quoted"', "it's", "- x", "? x", "{a}", "[a]", "a\nb", "a\r\nb",
    "é 漢字 😀", "no", "Yes", "1e3", "~", "null", "007", "1_000", "0x1f", "1:30", "2024-01-01", ".inf", "true", "!x",
    "&a", "*a", "@a", "%a", "|", "\ta", "a\\b", "\\n", "\x07", "\u2028", "\ufeffx", "...", "---", "=", "<<", "#b",
    "key: value\nother: 2", "x" * 300 + " y", "",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_use_writes_a_text_that_reads_back_equal(folder: Path, text: str) -> None:
    code, output = terraalign("profile", "use", "demo", "--set", f"evaluate.pretrained_prefix={text}")
    assert code == 0, output
    values = YAML(typ="safe").load((folder / "params.yaml").read_text(encoding="utf-8"))  # as DVC does
    assert load_params().evaluate.pretrained_prefix == values["evaluate"]["pretrained_prefix"] == text


def test_use_reads_a_value_by_the_type_of_its_key(folder: Path) -> None:
    settings = {
        "llm.revision": "1234567", "llm.system_prompt": "null", "pretrain.lr": "1e-3", "pretrain.max_steps": "1e4",
        "adapters.mlp.pretrain.lr": "5e-4", "adapters.mlp.architecture.hidden": "64", "data.captions.root": "My Set #2",
        "adapters.mlp.finetune.classes.prompts.classes": '["no", "a: #b"]', "data.captions.source": "coco",
    }  # fmt: skip
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    code, output = terraalign("profile", "use", "demo", *options)
    assert code == 0, output
    params = load_params()
    assert (params.llm.revision, params.llm.system_prompt) == ("1234567", None)
    assert (params.pretrain.lr, params.pretrain.max_steps, params.pretrain_for("mlp").lr) == (1e-3, 10_000, 5e-4)
    assert params.data["captions"].root == Path("My Set #2") and params.adapters["mlp"].architecture["hidden"] == 64
    assert params.finetune_for("mlp", "classes").prompts == {"classes": ["no", "a: #b"]}


def test_what_cannot_be_written_is_refused_and_leaves_the_old_file_alone(folder: Path) -> None:
    (folder / "params.yaml").write_text("old")
    shared = (
        (folder / "profiles" / "demo.yaml").read_text().replace("pretrain: {epochs: 5}", "pretrain: &p {epochs: 5}", 1)
    )
    (folder / "shared.yaml").write_text(shared.replace("pretrain: {epochs: 5}", "pretrain: *p", 1))
    cases = {
        ("demo", "llm.model=caf\udce9"): "not valid UTF-8",
        ("photos", "data.captions.root="): "name the folder",
        ("demo", "finetune.recipes.classes.prompts.classes=[1e3]"): "put it in quotes",
        ("demo", "data.captions.root=/pictures"): "unknown key; known here: count,",
        ("shared.yaml", "adapters.query.pretrain.epochs=3"): "would read back as another",
    }
    for (profile, setting), message in cases.items():
        code, text = terraalign("profile", "use", profile, "--set", setting)
        assert code == 2 and message in text, text
        assert (folder / "params.yaml").read_text() == "old" and not (folder / "params.tmp").exists()


def test_another_source_leaves_out_what_only_the_former_knows(folder: Path) -> None:
    options = ("data.captions.source=webdataset", "data.captions.shards=/x/{0..3}.tar", "data.classes.root=/y")
    code, output = terraalign("profile", "use", "photos", *(part for one in options for part in ("--set", one)))
    assert code == 0, output
    assert "data.captions.images is left out" in output
    assert load_params().data["captions"].model_dump() == {
        "task": "caption", "source": "webdataset", "shards": "/x/{0..3}.tar", "count": None, "validation": 0.1,
        "max_broken": 0.01, "split": "blocks", "groups": None, "seen": None,
    }  # fmt: skip


@pytest.mark.parametrize("setting", ["vision=5", "llm=5", "data=5", "data.captions=5", "pretrain.objective=null"])
def test_a_section_that_is_none_is_one_line(folder: Path, setting: str) -> None:
    code, output = terraalign("profile", "use", "demo", "--set", setting)
    assert code == 2 and "Traceback" not in output and setting.partition("=")[0] in output, output


def test_a_key_that_was_just_set_is_refused_and_not_left_out(folder: Path) -> None:
    options = ("data.captions.source=webdataset", "data.captions.shards=/x.tar", "data.captions.root=/x")
    code, output = terraalign("profile", "use", "photos", *(part for one in options for part in ("--set", one)))
    assert code == 2 and "data.captions.root is /x: unknown key" in output, output


def test_another_pipeline_on_the_path_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").write_text("raise SystemExit('the wrong one')")
    code = "import stages.cli, pipeline.config; print(pipeline.__file__)"
    path = os.pathsep.join([str(tmp_path), str(PROJECT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.stdout.strip() == str(PROJECT / "pipeline" / "__init__.py"), done.stderr
    code = "import sys, pipeline2; sys.modules['pipeline'] = pipeline2; import stages"
    (tmp_path / "pipeline2.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 1 and "pipeline2.py is in the way of" in done.stderr and "Traceback" not in done.stderr


def test_list_and_show(folder: Path) -> None:
    assert "thesis    The thesis at full size" in terraalign("profile", "list")[1]
    terraalign("profile", "use", "demo", "--set", "seed=3")
    assert "seed: 3 (the profile has 17)" in terraalign("profile", "show")[1]


def test_show_without_a_report(folder: Path) -> None:
    assert "next: `terraalign run`" in terraalign("profile", "use", "demo")[1]
    code, text = terraalign("show")
    assert code == 2 and "`terraalign try FOLDER`" in text and "dvc repro" not in text


@pytest.mark.parametrize("name", ["prepare", "pretrain", "evaluate", "report", "doctor"])
def test_a_bad_parameter_stops_every_command_at_once(folder: Path, name: str) -> None:
    text = (folder / "profiles" / "demo.yaml").read_text()
    (folder / "params.yaml").write_text(re.sub(r"epochs: \d+", "epochs: 0", text, count=1))
    argument = {"prepare": ["captions"], "pretrain": ["mlp"], "evaluate": ["mlp", "captions"]}.get(name, [])
    code = (
        "import runpy, sys\ntry:\n    runpy.run_module('stages.cli', run_name='__main__')\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name, *argument], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    assert done.stdout.strip() == "2 False"  # told before any library that takes seconds to load
    output = done.stderr
    assert output.startswith("error: params.yaml:") and "pretrain.epochs is 0" in output


def _raise(fault: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise fault

    return command


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        (UserErrors([UserError("", "one"), UserError("", "two")]), 2, "error: one\nerror: two\n"),
        (OSError(errno.ENOSPC, "No space left on device", "data/x"), 2, "error: the disk is full (writing data/x)"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "error: the disk is full; free"),
        (KeyboardInterrupt(), 130, "error: interrupted; run the same command again"),
    ],
)
def test_faults_are_one_line_each(fault: BaseException, code: int, message: str) -> None:
    app = typer.Typer(cls=cli.Commands)
    app.command("fail")(_raise(fault))
    app.command("other")(_raise(fault))
    result = runner.invoke(app, ["fail"])
    assert result.exit_code == code and result.output.startswith(message)


def test_a_bug_keeps_its_traceback() -> None:
    app = typer.Typer(cls=cli.Commands)
    app.command("fail")(_raise(ZeroDivisionError()))
    app.command("other")(_raise(ZeroDivisionError()))
    assert isinstance(runner.invoke(app, ["fail"]).exception, ZeroDivisionError)


def test_timings_are_written_on_success_only(folder: Path) -> None:
    terraalign("profile", "use", "demo")
    params = load_params()
    with stages.timed(params, "pretrain@mlp"):
        pass
    with pytest.raises(UserError), stages.timed(params, "pretrain@query"):
        raise UserError("", "no")
    assert [path.name for path in (folder / "data" / "demo" / "seconds").iterdir()] == ["pretrain@mlp.json"]
