"""The exchangeable parts, by the names that params.yaml gives them: each room's own list, or a class of the user's.

This room stands above those of the parts and imports none of them: it finds a class by its address when a parameter
file names it. That is also what keeps `terraalign --help` and a fault in params.yaml quick.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from pipeline.config.base import Section
from pipeline.errors import readable, reason

# Where each kind of part has its list {name: "package.module:Class"}, and the class that its classes derive from.
KINDS = {
    "source": ("pipeline.sources:SOURCES", "pipeline.sources.base:Source"),
    "task": ("pipeline.tasks:TASKS", "pipeline.tasks.base:Task"),
    "encoder": ("pipeline.encoders:ENCODERS", "pipeline.encoders.base:Encoder"),
    "loader": ("pipeline.llms:LOADERS", "pipeline.llms.base:Loader"),
    "adapter": ("pipeline.adapters:ADAPTERS", "pipeline.adapters.base:Architecture"),
    "objective": ("pipeline.objectives:OBJECTIVES", "pipeline.objectives.base:Objective"),
    "metric": ("pipeline.metrics:METRICS", "pipeline.metrics.base:Metric"),
}


_named: set[tuple[str, str]] = set()  # (kind, address) of the user's classes that params.yaml has named


def known(kind: str) -> dict[str, str]:
    """The parts of a kind that TerraAlign brings: name and address."""
    found: dict[str, str] = _import(KINDS[kind][0])
    return found


def find(kind: str, name: str) -> Any:
    """The class of a part, by a name of its room's list or by `package.module:Class`.

    Raises ValueError, with what is allowed, for a name that is neither, a class that is not there, or one of another
    kind. A user's own package is looked for where Python finds packages, and then in the current folder; what is
    imported is said on stderr before it runs. Nothing else that a parameter file says is ever imported.
    """
    if name in known(kind):
        return _import(known(kind)[name])
    if ":" not in name:
        raise ValueError(f"should be {one_of(kind)}")
    return _foreign(kind, name)


def is_foreign(name: str) -> bool:
    """Whether a name is the address of a class of the user's own."""
    return ":" in name


def is_trusted(kind: str, name: str) -> bool:
    """Whether a part may be loaded because a file other than params.yaml names it: one of ours, or there already."""
    return not is_foreign(name) or (kind, name) in _named


def one_of(kind: str) -> str:
    """'a', 'b' or 'c', or an own package.module:Class: what a parameter file may name."""
    *first, last = [repr(name) for name in known(kind)]
    names = f"{', '.join(first)} or {last}" if first else last
    return f"{names}, or an own package.module:Class"


def settings_of(kind: str, name: str) -> type[Section]:
    """The typed settings of a part; ValueError as `find`."""
    found: type[Section] = find(kind, name).Settings
    return found


def sources_of(names: list[tuple[str, str]]) -> list[Path]:
    """The files of those (kind, name) that are classes of the user's own: code that decides a result like ours."""
    modules = {name.partition(":")[0] for _, name in names if is_foreign(name)}
    return sorted(Path(str(sys.modules[module].__file__)) for module in modules)


@cache
def _foreign(kind: str, name: str) -> Any:
    """A user's class, imported once a process."""
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), attribute]):
        raise ValueError(f"should be {one_of(kind)}, such as my_package.my_module:MyClass")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: nothing in it hides a package
    file = _file_of(module)
    if file is None:
        raise ValueError(f"there is no module {module}; install its package, or put it into the project folder")
    if module not in sys.modules:
        print(f"{kind} {name}: imports {readable(file)}", file=sys.stderr)
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except (Exception, SystemExit) as error:  # a user's code raises what it likes
        raise ValueError(f"{module} cannot be imported: {type(error).__name__}: {reason(error)}") from error
    _check(kind, module, attribute, found)
    _named.add((kind, name))
    return found


def _check(kind: str, module: str, attribute: str, found: Any) -> None:
    """Raises ValueError for what is no class of a kind, or lacks something that those of this kind have to have."""
    base = _import(KINDS[kind][1])
    if found is None:
        there = [value for value in vars(sys.modules[module]).values() if _is_a(value, base)]
        own = [value.__name__ for value in there if value.__module__ == module]
        raise ValueError(f"{module} has no class {attribute}; of kind {kind} it has {', '.join(own) or 'none'}")
    if not _is_a(found, base):
        raise ValueError(f"{module}:{attribute} is no {kind}: derive it from {KINDS[kind][1]}")
    lacking = [*sorted(found.__abstractmethods__), *(key for key in base.__annotations__ if not hasattr(found, key))]
    settings, wanted = getattr(found, "Settings", None), getattr(base, "Settings", Section)
    if settings is not None and not _is_a(settings, wanted):
        raise ValueError(f"{module}:{attribute}.Settings is no {wanted.__name__}; derive it from {wanted.__module__}'s")
    if lacking:
        raise ValueError(f"{module}:{attribute} lacks {', '.join(lacking)}; {KINDS[kind][1]} says what each is")


def _is_a(value: object, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base)


def _file_of(module: str) -> str | None:
    """The file of a module, found without importing anything, not even the packages that it is in."""
    name, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    for part in inner:
        name, inside = f"{name}.{part}", spec.submodule_search_locations if spec else None
        spec = PathFinder.find_spec(name, inside) if inside else None
    return spec.origin if spec else None


def _import(address: str) -> Any:
    module, _, attribute = address.partition(":")
    return getattr(importlib.import_module(module), attribute)
