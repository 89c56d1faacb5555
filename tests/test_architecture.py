"""The house stands as docs/architecture.md says: rooms in layers, small modules, and code that DVC watches."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import schema
from pipeline.config.base import Section
from pipeline.training.code import EXCUSED, modules_of, source_of

PROJECT = Path(__file__).parents[1]
# From above to below: a room imports only from those above it. The solver's file may be long: it is one algorithm.
ROOMS = (
    *("errors", "progress", "files", "needs", "started", "versions", "config", "weights", "devices", "runs", "inputs"),
    *("media", "sources", "encoders", "llms", "store", "origin", "extraction", "adapters", "transport", "objectives"),
    *("naming", "lora", "vlm", "tasks"),
    *("training", "metrics", "alignment", "answers", "serve", "report", "plan", "first", "doctor"),
    *("export", "serving", "lmms"),
)
LONGEST_MODULE, LONGEST_FUNCTION, MAY_BE_LONG = 400, 45, {"pipeline.transport.exact"}
# The stages that train or measure, and the module that does their work.
WORK = {
    "pretrain": "pipeline.training.pretrain",
    "name": "pipeline.metrics.named",
    "finetune": "pipeline.training.finetune",
    "finetune_scratch": "pipeline.training.finetune",
    "evaluate": "pipeline.metrics.evaluate",
    "pca": "pipeline.alignment",
}
# Sections of params.yaml that decide results, by the model that has their defaults.
DECIDING: dict[str, type[Section]] = {
    "data": schema.DataSettings, "vision": schema.Vision, "llm": schema.LLM,
    "pretrain": schema.Pretrain, "finetune.lora": schema.LoRA, "finetune.recipe": schema.Recipe,
    "evaluate": schema.Evaluate, "pca": schema.PCA,
}  # fmt: skip
GRAPH = yaml.safe_load((PROJECT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def modules() -> dict[str, ast.Module]:
    """The sources of pipeline/, by the names of their modules."""
    found = {}
    for path in sorted((PROJECT / "pipeline").rglob("*.py")):
        name = ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def imports(tree: ast.AST, lazy: bool) -> Iterator[str]:
    """The modules of the project that a source imports, without those for type checkers; `lazy`: in functions, too."""
    if isinstance(tree, ast.If) and isinstance(tree.test, ast.Name) and tree.test.id == "TYPE_CHECKING":
        return
    if isinstance(tree, ast.FunctionDef) and not lazy:
        return
    if isinstance(tree, ast.Import):
        yield from (alias.name for alias in tree.names)
    elif isinstance(tree, ast.ImportFrom) and tree.module:
        names = [f"{tree.module}.{alias.name}" for alias in tree.names]
        yield from (name if name in MODULES else tree.module for name in names)
    for child in ast.iter_child_nodes(tree):
        yield from imports(child, lazy)


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_every_module_is_in_a_room() -> None:
    assert {room_of(name) for name in MODULES if name != "pipeline"} <= set(ROOMS)


def test_the_page_has_the_rooms_in_their_order() -> None:
    page = (PROJECT / "docs" / "architecture.md").read_text(encoding="utf-8")
    columns = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    assert re.findall(r"`(\w+)`", " ".join(columns)) == list(ROOMS)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_room_imports_only_from_those_above_it(name: str) -> None:
    if name == "pipeline":
        return
    for other in imports(MODULES[name], lazy=True):
        assert not other.startswith("stages"), f"{name} imports {other}"
        if other.startswith("pipeline."):
            assert ROOMS.index(room_of(other)) <= ROOMS.index(room_of(name)), f"{name} imports {other}, below it"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: {other for other in imports(tree, lazy=False) if other in MODULES} for name, tree in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_modules_and_functions_are_short() -> None:
    for name, tree in MODULES.items():
        path = source_of(name)
        assert path is not None
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= LONGEST_MODULE or name in MAY_BE_LONG, f"{path} has {lines} lines"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                text = node.body[0] if ast.get_docstring(node) else None
                length = (node.end_lineno or 0) - node.lineno + 1
                length -= (text.end_lineno or 0) - text.lineno + 1 if text else 0
                assert length <= LONGEST_FUNCTION, f"{path}: {node.name} has {length} lines"


def test_product_code_mocks_nothing() -> None:
    for name, tree in MODULES.items():
        assert not any("mock" in other for other in imports(tree, lazy=True)), name


def watched(stage: str) -> set[Path]:
    """The files of pipeline/ that a stage of dvc.yaml depends on."""
    paths = [PROJECT / dep for dep in GRAPH[stage]["deps"] if dep.startswith("pipeline/")]
    return {file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py"))}


@pytest.mark.parametrize("stage", WORK)
def test_dvc_watches_exactly_the_code_that_decides_a_result(stage: str) -> None:
    """The same code that checkpoint keys are made of (training/code.py); packages without content need no watching."""
    deciding = {path for name in modules_of(WORK[stage]) if (path := source_of(name)) is not None}
    deciding = {path for path in deciding if path.name != "__init__.py" or "{" in path.read_text(encoding="utf-8")}
    assert deciding <= watched(stage), f"{stage} lacks {sorted(map(str, deciding - watched(stage)))}"
    extra = {path for path in watched(stage) - deciding if path.name != "__init__.py"}
    assert not extra, f"{stage} does not need {sorted(map(str, extra))}"


def test_what_is_excused_exists_and_nothing_else_is_left_out() -> None:
    for module in EXCUSED:
        assert source_of(module) is not None, module
    assert "pipeline.store.reader" in modules_of("pipeline.training.pretrain")
    assert "pipeline.store.dtypes" in modules_of("pipeline.training.pretrain")
    assert "pipeline.devices" in modules_of("pipeline.training.finetune")
    assert "pipeline.objectives.emd" in modules_of("pipeline.training.pretrain")  # named by the room's list alone


def at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


@pytest.mark.parametrize("section", DECIDING)
def test_a_default_that_decides_a_result_is_in_the_file_that_dvc_watches(section: str) -> None:
    defaults = at(schema.DEFAULTS, section)
    for key, field in DECIDING[section].model_fields.items():
        if not field.is_required():
            assert key in defaults, f"{section}.{key}"
            if field.default_factory is None:
                assert field.default == defaults[key], f"{section}.{key}"


def test_stages_watch_the_defaults_of_the_sections_that_they_watch() -> None:
    for name, stage in GRAPH.items():
        own = {str(key).split(".")[0] for key in stage["params"] if isinstance(key, str)}
        [defaults] = [
            entry["pipeline/config/defaults.yaml"] for entry in stage["params"] if isinstance(entry, dict)
        ] or [[]]
        assert own & set(schema.DEFAULTS) <= set(defaults) or name in ("report", "inputs"), name
