"""Values that are being computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


class NotFinite(ValueError):
    """A distance that is no number: what is being trained has left all bounds."""


@dataclass(frozen=True)
class Started:
    """A computation under way, perhaps in another thread; `result` waits for it and gives the values."""

    result: Callable[[], Tensor]
