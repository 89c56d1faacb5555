"""The tutorial: every command can be typed as it stands there, and the first look does what it says.

`make slow` runs all of them, one after the other, with DVC and the real small models: minutes.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
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


@pytest.mark.slow
def test_all_commands_one_after_the_other(tmp_path: Path) -> None:
    """On two kinds of twenty pictures, which are told apart by their colours."""
    for name in ("pipeline", "stages", "profiles", ".dvc/config", ".dvcignore", "dvc.yaml", "params.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if (PROJECT / name).is_dir():
            shutil.copytree(PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "birds.yaml"))
        else:
            shutil.copy(PROJECT / name, tmp_path / name)
    (tmp_path / ".dvc/config").write_text(
        (PROJECT / ".dvc/config").read_text().replace("[core]", "[core]\n no_scm = true")
    )
    random = np.random.default_rng(0)
    for kind, colour in (("robin", (230, 90, 40)), ("wren", (90, 110, 200))):
        for number in range(1, 21):
            path = tmp_path / "birds" / kind / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(random.normal(colour, 40, (96, 96, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).resize((300, 300)).save(path)
    shutil.copy(path, tmp_path / "new.jpg")
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env: dict[str, str] = {**os.environ, "PATH": programs, "PYTHONPATH": str(tmp_path)}

    def run(line: str) -> str:
        words = shlex.split(line)
        done = subprocess.run(words, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}: {done.stdout}\n{done.stderr}"
        return done.stdout

    said = {line: run(line) for line in COMMANDS if line != "terraalign serve"}
    assert (tmp_path / "data/birds/report/index.html").is_file()
    assert said["terraalign classify new.jpg --top 3"].startswith("new.jpg: wren ")
    assert said['terraalign ask birds/robin/1.jpg "What is on this picture?"'].strip()
    assert run(f"{sys.executable} -E out/example.py birds/wren/1.jpg").strip()  # without PYTHONPATH
    with subprocess.Popen(["terraalign", "serve", "--port", "0"], cwd=tmp_path, env=env, stdout=-1, text=True) as page:
        try:
            assert page.stdout is not None
            address = page.stdout.readline().split()[0]
            directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            assert "TerraAlign" in directly.open(address).read().decode()
        finally:
            page.terminate()
    again = run("terraalign try birds --yes")
    assert "everything is up to date" in again
