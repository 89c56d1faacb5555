"""What a change makes DVC run again, on the real dvc.yaml; the commands themselves are faked."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from dulwich import porcelain
from dvc.utils.serialize import dumps_yaml, parse_yaml

from pipeline.config.study import parameters_of, parse_study
from stages.repro import with_stage

PROJECT = Path(__file__).parents[1]
ADAPTERS = ("mlp", "query")  # two are enough to see what one change spares the other; DVC takes its time per stage
DATA = ("captions", "classes")

FAKE = """#!{python} -IS
import hashlib, json, os, pathlib, subprocess, sys
command = " ".join(sys.argv[1:])
log = pathlib.Path("{log}")
with log.open("a") as stream:
    print(command, file=stream)
if pathlib.Path("{log}.fails").exists() and pathlib.Path("{log}.fails").read_text() == command:
    sys.exit("error: the reason")
if command == "inputs":  # the real one: what it writes decides what runs again
    path = {{"PYTHONPATH": "{project}"}}
    sys.exit(subprocess.call(["{python}", "-m", "stages.cli", "inputs"], env=os.environ | path))
print("it is done")
content = hashlib.sha256(command.encode()).hexdigest()
if not command.startswith(("name ", "extract-captions ")):  # as when they come out the same, whatever was changed
    content += str(len(log.read_text().splitlines()))
for name in json.loads(pathlib.Path("{outputs}").read_text())[command]:
    path = pathlib.Path(name)
    file = path if path.suffix else path / "result.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
"""


def commands(graph: dict[str, Any], params: dict[str, Any]) -> dict[str, list[str]]:
    """Every command of dvc.yaml with its outputs, templates filled in."""

    def look_up(dotted: str, item: dict[str, str]) -> Any:
        value: Any = {**params, "item": item}
        for part in dotted.split("."):
            value = value[part]
        return value

    def fill(text: str, item: dict[str, str]) -> str:
        return re.sub(r"\$\{([\w.]+)\}", lambda match: str(look_up(match[1], item)), text)

    found = {}
    for stage in graph["stages"].values():
        matrix = {k: look_up(v[2:-1], {}) if isinstance(v, str) else v for k, v in stage.get("matrix", {}).items()}
        outputs = [o if isinstance(o, str) else next(iter(o)) for o in stage["outs"] + stage.get("metrics", [])]
        for values in itertools.product(*matrix.values()):
            item = dict(zip(matrix, values, strict=True))
            command = fill(stage["cmd"], item).removeprefix("terraalign ")
            found[command] = [fill(output, item) for output in outputs]
            if command.startswith("name "):
                found[command] = [
                    f"{folder}/{name}.json" for folder in found[command] for name in params["run"]["recipes"]
                ]
    return found


# DVC as `terraalign run` has it.
DVC = "import sys; from stages.repro import dvc; sys.exit(dvc(*sys.argv[1:]))"


class Repo:
    """A copy of the project in a git and DVC repository of its own, with a `terraalign` that only pretends."""

    def __init__(self, folder: Path, **run: list[str]) -> None:
        self.root, self.log = folder / "project", folder / "log.txt"
        self.all = self._copy(run)
        self._fake(folder / "bin", folder / "outputs.json")
        self.env = {
            **os.environ,
            "PYTHONPATH": str(PROJECT),
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_PYTHON_REFRESH": "quiet",  # there need not be a git program
            **{
                f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
            },
        }
        porcelain.init(self.root)
        self.dvc("init", "-q", "-f")
        shutil.copy(PROJECT / ".dvc" / "config", self.root / ".dvc" / "config")
        self.commit()

    def _copy(self, changed: dict[str, list[str]]) -> dict[str, list[str]]:
        self.root.mkdir()
        for name in ("dvc.yaml", "params.yaml", ".gitignore", ".dvcignore"):
            shutil.copy(PROJECT / name, self.root / name)
        for name in ("stages", "pipeline"):
            shutil.copytree(PROJECT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
        run = {"data": list(DATA), "adapters": list(ADAPTERS), "recipes": list(DATA)}
        self.set("run", {**run, "scratch": ["query"], "scratch_recipes": ["captions"], **changed})
        return self._commands()

    def _commands(self) -> dict[str, list[str]]:
        return commands(*(yaml.safe_load((self.root / name).read_text()) for name in ("dvc.yaml", "params.yaml")))

    def write_outputs(self) -> None:
        """What the pretended commands write, by the parameters of now."""
        self.outputs.write_text(json.dumps(self._commands()))

    def _fake(self, folder: Path, outputs: Path) -> None:
        folder.mkdir()
        self.outputs = outputs
        self.write_outputs()
        self.log.touch()
        (folder / "terraalign").write_text(
            FAKE.format(python=sys.executable, log=self.log, outputs=outputs, project=PROJECT)
        )
        (folder / "terraalign").chmod(0o755)

    def run(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.root, env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def dvc(self, *command: str) -> str:
        return self.run(sys.executable, "-c", DVC, *command)

    def commit(self) -> None:
        porcelain.add(self.root)
        someone = b"test <test@example.org>"
        porcelain.commit(self.root, message=b"state", author=someone, committer=someone)

    def repro(self, *command: str) -> set[str]:
        """The `terraalign` commands that `dvc repro` (or another DVC command) runs now."""
        before = len(self.log.read_text().splitlines())
        self.dvc(*(command or ("repro",)))
        return set(self.log.read_text().splitlines()[before:])

    def edit(self, name: str, change: Callable[[str], str]) -> None:
        path = self.root / name
        text = path.read_text()
        assert change(text) != text
        path.write_text(change(text))

    def set(self, key: str, value: Any) -> None:
        """Change one value of params.yaml."""

        def change(text: str) -> str:
            values = yaml.safe_load(text)
            section = values
            for part in key.split(".")[:-1]:
                section = section[part]
            section[key.rpartition(".")[2]] = value
            return yaml.safe_dump(values, sort_keys=False)

        self.edit("params.yaml", change)


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Repo:
    """The repository after its first `dvc repro`; every test leaves it up to date."""
    repo = Repo(tmp_path_factory.mktemp("graph"))
    assert repo.repro() == set(repo.all)
    repo.commit()
    return repo


def trained(*adapters: str, pretrain: bool = True, data: tuple[str, ...] = DATA) -> set[str]:
    """What runs again when these adapters are pre-trained (or only fine-tuned on `data`) again."""
    found = {"report"}
    for adapter in adapters:
        found |= {f"{command} {adapter} {name}" for command in ("finetune", "evaluate") for name in data}
        found |= {f"pca {adapter}"} if "captions" in data else set()
        found |= {f"pretrain {adapter}", f"name {adapter}"} if pretrain else set()
    return found


def test_every_dependency_exists() -> None:
    for stage in yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"].values():
        for path in stage["deps"]:
            assert path.startswith("data/") or (PROJECT / path).exists(), path


def test_nothing_runs_twice(repo: Repo) -> None:
    assert repo.repro() == set()


def test_an_architecture_concerns_its_adapter_alone(repo: Repo) -> None:
    repo.set("adapters.mlp.architecture.dropout", 0.2)
    assert repo.repro() == trained("mlp") | {"inputs"}


def test_side_by_side_runs_what_one_after_the_other_would(tmp_path: Path) -> None:
    """`terraalign run`: the same stages in an order that holds; what depends on one that failed waits."""
    repo = Repo(tmp_path, data=["classes"], adapters=["mlp"], recipes=["classes"], scratch=[], scratch_recipes=[])
    repo.set("pretrain.data", ["classes"])
    repo.set("pca", {"data": "classes", "recipe": "classes"})
    repo.write_outputs()
    fails = repo.log.with_name(f"{repo.log.name}.fails")
    fails.write_text("finetune mlp classes")
    code, ran, said = side_by_side(repo)
    assert code == 2 and "finetune@mlp-classes failed:" in said and "the reason" in said and "Traceback" not in said
    order = ["prepare classes", "extract-images classes", "inputs", "pretrain mlp", "name mlp", "finetune mlp classes"]
    assert [command for command in ran if command in order] == order and len(set(ran)) == len(ran)
    assert not {"evaluate mlp classes", "pca mlp", "report"} & set(ran)
    fails.unlink()
    code, rest, said = side_by_side(repo)
    assert code == 0 and "prepare@classes: up to date" in said and rest[-1] == "report"
    assert "git add" not in said and "autostage" not in said and "it is done" in said  # a stage's words, none of DVC's
    assert sorted(rest) == sorted(set(repo.all) - set(ran) | {"finetune mlp classes"})
    assert repo.repro() == set()


def side_by_side(repo: Repo) -> tuple[int, list[str], str]:
    """What `terraalign run` exits with, the commands that it has run, in order, and what it says."""
    before = len(repo.log.read_text().splitlines())
    command = [sys.executable, "-m", "stages.cli", "run"]
    done = subprocess.run(command, cwd=repo.root, env=repo.env, capture_output=True, text=True, check=False)
    return done.returncode, repo.log.read_text().splitlines()[before:], done.stderr


def test_a_stage_is_written_into_the_lock_file_as_dvc_does_it(repo: Repo) -> None:
    text = (repo.root / "dvc.lock").read_text()
    stages = parse_yaml(text, "dvc.lock")["stages"]
    for name, locked in stages.items():
        assert with_stage(text, name, locked) == text
    new = {"cmd": "terraalign new", "params": {"params.yaml": {"text": "a\n\nb: 'c' # d", "none": None, "on": "no"}}}
    for changed in ({"pretrain@mlp": new}, {"pretrain@new": new}):
        [(name, locked)] = changed.items()
        assert with_stage(text, name, locked) == dumps_yaml({"schema": "2.0", "stages": stages | changed})
    # What stands in two places is written twice: in a file of two stages the same anchor would stand for both.
    shared = ["a", "b"]
    twice = {"cmd": "c", "params": {"params.yaml": {"x": shared, "y": shared}}}
    found = with_stage(with_stage(text, "one", twice) or "", "two", twice) or ""
    assert parse_yaml(found, "dvc.lock")["stages"] == stages | {"one": twice, "two": twice}
    # Left to DVC, as are files that are not as it writes them.
    assert with_stage(text, "n" * 200, new) is None and with_stage(text, "it's", new) is None
    other = [
        "",
        "stages: {}\n",
        f"{text}datasets: []\n",
        text.removesuffix("\n"),
        text.replace("  inputs:", "  'inputs':"),
    ]
    other += [text.replace("  inputs:\n", "  inputs:  # mine\n"), text.replace("    cmd: ", "   cmd: ", 1)]
    other += [dumps_yaml({"schema": "2.0", "stages": stages | {"one": twice}})]
    for wrong in other:
        assert wrong != text and with_stage(wrong, "new", new) is None


def test_an_adapter_that_is_not_trained_concerns_the_report_alone(repo: Repo) -> None:
    repo.set("adapters.linear.architecture.pool", 2)
    assert repo.repro() == {"report", "inputs"}  # the one prints all parameters, the other looks at all objectives


def test_fine_tuning_parameters_leave_pretraining_alone(repo: Repo) -> None:
    repo.set("finetune.recipes.captions.lr", 0.003)
    scratch = {"finetune-scratch query captions", "inputs"}
    assert repo.repro() == trained(*ADAPTERS, pretrain=False, data=("captions",)) | scratch


def test_the_loss_retrains_but_extracts_nothing(repo: Repo) -> None:
    repo.edit("pipeline/transport/exact.py", lambda text: text + "\nEPSILON = 0\n")
    assert repo.repro() == trained(*ADAPTERS)


def test_a_comment_in_the_extractor_changes_nothing(repo: Repo) -> None:
    repo.edit("pipeline/extraction/images.py", lambda text: text + "\n# a comment\n")
    assert repo.repro() == set()


def test_another_encoder_extracts_images_but_no_captions(repo: Repo) -> None:
    repo.set("vision.dtype", "float32")
    images = {f"extract-images {name}" for name in DATA}
    assert repo.repro() == images | trained(*ADAPTERS) | {"finetune-scratch query captions", "inputs"}


def test_the_llm_concerns_the_pretraining_that_asks_it_alone(repo: Repo) -> None:
    repo.set("adapters.mlp.pretrain", {"objective": {"name": "caption_ce"}})
    assert repo.repro() == trained("mlp") | {"inputs"}
    repo.set("llm.system_prompt", "You see a picture.")
    captions = {f"extract-captions {name}" for name in DATA}
    tuned = trained(*ADAPTERS, pretrain=False) | trained("mlp")
    assert repo.repro() == captions | tuned | {"finetune-scratch query captions", "inputs"}


def test_the_runtime_decides_nothing(repo: Repo) -> None:
    repo.set("runtime.decode_threads", 7)
    assert repo.repro() == set()


def test_the_reader_decides_nothing(repo: Repo) -> None:
    repo.set("cache.reader", "webdataset")
    assert repo.repro() == {"report"}  # which prints all parameters


def test_the_graph_can_be_drawn(repo: Repo) -> None:
    drawn = repo.dvc("dag", "--mermaid")
    for name in ("prepare@captions", "finetune@mlp-classes", "finetune_scratch@query-captions", "pca@query", "report"):
        assert name in drawn


def test_an_experiment_changes_a_parameter(repo: Repo) -> None:
    repo.commit()
    assert repo.repro("exp", "run", "-S", "pretrain.lr=0.0005") == trained(*ADAPTERS) | {"inputs"}
    assert yaml.safe_load((repo.root / "params.yaml").read_text())["pretrain"]["lr"] == 0.0005


def test_another_recipe_has_its_names_and_concerns_no_other(repo: Repo) -> None:
    recipes = yaml.safe_load((repo.root / "params.yaml").read_text())["finetune"]["recipes"]
    repo.set("finetune.recipes", recipes | {"again": recipes["classes"]})
    repo.set("run.recipes", [*DATA, "again"])
    repo.write_outputs()
    names = {f"name {adapter}" for adapter in ADAPTERS}
    assert repo.repro() == trained(*ADAPTERS, pretrain=False, data=("again",)) | names | {"inputs"}


STUDY = """
adapters: [mlp]
seeds: [1, 2]
recipes: {captions: {}}
steps: 4
methods: {emd: {}, other: {pretrain: {lr: 0.01}}}
"""


def test_a_study_runs_what_is_asked_for_once_and_leaves_the_parameters(tmp_path: Path) -> None:
    repo = Repo(tmp_path, data=["captions"], recipes=["captions"])
    repo.set("pretrain.data", ["captions"])
    (repo.root / "study.yaml").write_text(STUDY)
    before = (repo.root / "params.yaml").read_bytes()
    values = parameters_of(parse_study(STUDY, "study"), yaml.safe_load(before))
    repo.outputs.write_text(json.dumps(commands(yaml.safe_load((repo.root / "dvc.yaml").read_text()), values)))
    names = [f"mlp_{method}_1" for method in ("emd", "other")]
    fails = repo.log.with_name(f"{repo.log.name}.fails")
    fails.write_text(f"pretrain {names[0]}")

    def study() -> tuple[list[str], str]:
        start = len(repo.log.read_text().splitlines())
        command = [sys.executable, "-m", "stages.cli", "study", "--only", "1"]
        done = subprocess.run(command, cwd=repo.root, env=repo.env, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr  # what is pretended has no figures to show
        return repo.log.read_text().splitlines()[start:], done.stderr

    ran, said = study()
    of = [f"{stage} {name}" for name in names for stage in ("pretrain", "name")]
    of += [f"{stage} {name} captions" for name in names for stage in ("finetune", "evaluate")]
    assert {command for command in ran if "mlp" in command} == {
        command for command in of if names[1] in command or command.startswith("pretrain")
    }
    assert f"pretrain@{names[0]} failed:" in said and "the reason" in said
    fails.unlink()
    assert set(study()[0]) == {command for command in of if names[0] in command}
    assert (repo.root / "params.yaml").read_bytes() == before
