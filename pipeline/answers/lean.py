"""transformers as a process that only answers needs it, which is there some two seconds sooner."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

OPTIONAL = ("scipy", "torchvision")  # to transformers, for losses of detection and for pictures
COMPILER = "torch._dynamo"
ROTARY = "compute_default_rope_parameters"  # what transformers' models reckon rotary positions in
MARKS = {"allow_in_graph", "assume_constant_result", "disable"}  # on functions, for a compiler that comes to them


@contextmanager
def transformers_for_answers() -> Iterator[None]:
    """Import what loading and asking an LLM needs of transformers, but not what that imports for other uses.

    It is told that scipy and torchvision are not installed and that this torch was built without its distributed part
    and without flexible attention, all of which it can do without; and the 3,000 files that it looks through for what
    it has are read once. Inside, torch's compiler is imported only when something asks for more than a mark of it: to
    leave a function out of what is compiled, which loading a network does; and sympy is not, for what a network that is
    built to be loaded reckons. Modules remember what they were told: only for a process that computes nothing but
    answers, one at a time. What has been imported already stays.
    """
    import functools

    import torch.compiler
    import torch.distributed

    with _compiler_later():
        with (
            _not_installed(),
            _set(torch.distributed, "is_available", lambda: False),
            _set(torch.compiler, "disable", _unmarked),
        ):
            with _set(functools, "lru_cache", _unbounded(functools.lru_cache)):  # it has 450 folders, and keeps 128
                from transformers import utils
            flexible = "is_torch_flex_attn_available"
            with _set(utils, flexible, lambda: False), _set(utils.import_utils, flexible, lambda: False):
                from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel  # noqa: F401
        with _set(torch.nn.init, "normal_", _drawn(torch.nn.init.normal_)), _set(torch, "arange", _counted()):
            yield


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
    """Have torch's compiler be a package of MARKS that do nothing for a while, but for modules of it by their names."""
    spec = find_spec(COMPILER)
    if COMPILER in sys.modules or spec is None:
        yield
        return
    sys.modules[COMPILER] = package = module_from_spec(spec)
    package.__class__ = _Marks
    try:
        yield
    finally:
        if sys.modules.get(COMPILER) is package:
            del sys.modules[COMPILER]  # who asks for it now gets the real one


class _Marks(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name in MARKS:
            return _unmarked
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]
        return getattr(import_module(COMPILER), name)


def _drawn(normal_: Callable[..., Any]) -> Callable[..., Any]:
    """torch.nn.init.normal_, but that it draws nothing on the meta device, where a tensor keeps no numbers."""

    def drawn(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor if tensor.is_meta else normal_(tensor, *args, **kwargs)

    return drawn


def _counted() -> Callable[..., Any]:
    """torch.arange, but on the CPU for rotary positions, which are numbers again as soon as a network is loaded.

    Nowhere else: some networks reckon with ranges and other tensors, which have to be on one device.
    """
    import torch

    with torch.device("cpu"):
        torch.empty(0)  # torch looks up the first time which functions a device concerns: this one, and not ours
    arange = torch.arange

    def counted(*args: Any, **kwargs: Any) -> Any:
        is_rotary = sys._getframe(1).f_code.co_name == ROTARY
        return arange(*args, **({"device": "cpu"} | kwargs if is_rotary else kwargs))

    return counted


def _unbounded(lru_cache: Callable[..., Any]) -> Callable[..., Any]:
    """functools.lru_cache, but that it forgets nothing where it is not told how much to keep."""

    def cached(maxsize: Any = 128, typed: bool = False) -> Any:
        return lru_cache(None)(maxsize) if callable(maxsize) else lru_cache(maxsize, typed)

    return cached


def _unmarked(function: Any = None, *_: object, **__: object) -> Any:
    """A decorator, with or without arguments, that leaves a function as it is: a mark for the compiler."""
    return (lambda marked: marked) if function is None else function
