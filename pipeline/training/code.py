"""Which code decides a result: the modules that one module imports, found in their sources."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMPONENT = re.compile(r"(pipeline(?:\.\w+)+):\w+")  # as the rooms' lists name their classes
# What they do decides no bit of a result: what is said and shown, where files lie and whether they are whole, how
# parameters are read (whose values are seen themselves).
EXCUSED = frozenset(
    {
        *("pipeline.errors", "pipeline.files", "pipeline.progress", "pipeline.needs", "pipeline.runs"),
        *("pipeline.config", "pipeline.weights"),
    }
)


@cache
def modules_of(module: str) -> frozenset[str]:
    """The modules of `pipeline` that a module of it needs, itself among them, less those that are excused.

    Imports count wherever they stand, also inside functions, but not those for type checkers alone; and so do classes
    that a list names as `pipeline.room.module:Class`.
    """
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found or any(f"{name}.".startswith(f"{excused}.") for excused in EXCUSED):
            continue
        path = source_of(name)
        if path is None:
            continue
        found.add(name)
        waiting += [name.rpartition(".")[0], *_named(ast.parse(path.read_bytes()))]
    return frozenset(found)


def digest_of(module: str) -> str:
    """SHA-256 of all that code, with its names."""
    digest = hashlib.sha256()
    for name in sorted(modules_of(module)):
        path = source_of(name)
        assert path is not None, "only modules with a source are found"
        digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def source_of(module: str) -> Path | None:
    """The file of a module of `pipeline`; None for anything else."""
    if module != "pipeline" and not module.startswith("pipeline."):
        return None
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _named(tree: ast.AST) -> Iterator[str]:
    """What a module's source names; of `from package import name` both, since a name may be a module."""
    if isinstance(tree, ast.If) and isinstance(tree.test, ast.Name) and tree.test.id == "TYPE_CHECKING":
        return
    if isinstance(tree, ast.Import):
        yield from (alias.name for alias in tree.names)
    elif isinstance(tree, ast.ImportFrom) and tree.module and not tree.level:
        yield from (tree.module, *(f"{tree.module}.{alias.name}" for alias in tree.names))
    elif isinstance(tree, ast.Constant) and isinstance(tree.value, str):
        yield from (match[1] for match in [COMPONENT.fullmatch(tree.value)] if match)
    for child in ast.iter_child_nodes(tree):
        yield from _named(child)
