"""The tutorial: every command can be typed as it stands there, and the first look does what it says."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from stages import cli

PROJECT = Path(__file__).parents[1]
TEXT = (PROJECT / "docs" / "tutorial.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines() if line]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_can_be_typed(line: str) -> None:
    program, name, *words = shlex.split(line)
    assert program == "terraalign"
    typer.main.get_command(cli.app).commands[name].make_context(name, words)


def test_the_first_look_says_what_is_there_and_writes_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.first.reckoned", lambda params, *more: {"profile": params.profile, "stages": {}})
    (project / "pipeline/config").mkdir(parents=True)
    for file in ("dvc.yaml", "pipeline/config/defaults.yaml"):
        shutil.copy(PROJECT / file, project / file)
    random = np.random.default_rng(0)
    for kind in ("robin", "wren"):
        for number in range(20):
            path = project / "birds" / kind / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    (project / "birds/wren/cut.jpg").write_bytes(path.read_bytes()[:300])
    before = {file for file in project.rglob("*") if file.is_file()}
    first = next(line for line in COMMANDS if "--dry-run" in line)
    result = CliRunner().invoke(cli.app, shlex.split(first)[1:])
    assert result.exit_code == 0, result.output
    assert "2 class folders (robin, wren)" in result.output and "pictures: 40" in result.output
    assert "cut.jpg" in result.output and "profiles/birds.yaml" in result.output
    assert {file for file in project.rglob("*") if file.is_file()} - before <= {*project.rglob("quarantine/*")}
