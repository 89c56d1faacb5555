"""transformers as a process that only answers needs it, which is two seconds sooner there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

OPTIONAL = ("scipy", "torchvision")  # to transformers, for losses of detection and for pictures
COMPILER = "torch._dynamo"


def import_transformers() -> None:
    """Import what loading and asking an LLM needs of transformers, but not what that imports for other uses.

    It is told that scipy and torchvision are not installed and that this torch was built without its distributed part,
    all of which it can do without; and torch's compiler is imported when something first asks for it. It remembers what
    it was told: only for a process that computes nothing but answers. What has been imported already stays.
    """
    import torch.compiler
    import torch.distributed

    with (
        _not_installed(),
        _compiler_later(),
        _set(torch.distributed, "is_available", lambda: False),
        _set(torch.compiler, "disable", _unmarked),
    ):
        from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel  # noqa: F401


@contextmanager
def _set(module: ModuleType, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def _not_installed() -> Iterator[None]:
    """Have optional packages be missing for a while: None is what Python's import system takes for that."""
    absent = [name for name in OPTIONAL if name not in sys.modules]
    sys.modules |= dict.fromkeys(absent)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


@contextmanager
def _compiler_later() -> Iterator[None]:
    """Have torch's compiler be imported later, but for single modules of it that are asked for meanwhile."""
    spec = find_spec(COMPILER)
    if COMPILER in sys.modules or spec is None:
        yield
        return
    package = module_from_spec(spec)
    package.__class__ = _Later
    for mark in ("disable", "allow_in_graph", "assume_constant_result"):
        setattr(package, mark, _unmarked)
    sys.modules[COMPILER] = package
    yield
    if isinstance(package, _Later):
        del package.__path__  # so that importing a module of it asks for that


class _Later(ModuleType):
    """A package that is empty until a name is asked of it (importlib's LazyLoader is for modules without others)."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        if (name.startswith("__") and name != "__path__") or spec is None or spec.loader is None:
            raise AttributeError(name)
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__path__ = spec.submodule_search_locations or []
        spec.loader.exec_module(self)
        return getattr(self, name)


def _unmarked(function: Any = None, *_: object, **__: object) -> Any:
    """A decorator, with or without arguments, that leaves a function as it is: a mark for the compiler."""
    return function or (lambda marked: marked)
