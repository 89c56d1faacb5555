"""transformers as a process that only answers needs it, which is a second and a half sooner there."""

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
    """Have torch's compiler be a package of marks that do nothing for a while, but for modules of it by their names."""
    spec = find_spec(COMPILER)
    if COMPILER in sys.modules or spec is None:
        yield
        return
    sys.modules[COMPILER] = package = module_from_spec(spec)
    package.__class__ = _Marks
    try:
        yield
    finally:
        del sys.modules[COMPILER]  # who asks for it now gets the real one


class _Marks(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _unmarked


def _unmarked(function: Any = None, *_: object, **__: object) -> Any:
    """A decorator, with or without arguments, that leaves a function as it is: a mark for the compiler."""
    return (lambda marked: marked) if function is None else function
