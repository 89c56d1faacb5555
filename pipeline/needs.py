"""What a profile needs: whether it is there, what is wrong with it, and how to get it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """What keeps something from being used, and how to mend it."""

    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.found}; {self.remedy}" if self.remedy else self.found


@dataclass(frozen=True)
class Need:
    """What is needed, whether it is there, what was found, and how to get it."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def package(name: str, module: str, distribution: str) -> Need:
    """The need of a Python package."""
    there = importlib.util.find_spec(module) is not None
    return Need(name, there, f"package {distribution}", "" if there else f"pip install {distribution}")
