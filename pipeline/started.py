"""Values that are on their way while the caller goes on."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class NoPlan(ValueError):
    """Distances that are no numbers, or so large that no optimum is found: what is being trained has diverged."""


class Started:
    """A tensor whose work has begun elsewhere, or is put off until somebody asks."""

    def __init__(self, finish: Callable[[], Tensor]):
        self._finish = finish

    def result(self) -> Tensor:
        """Wait for what is still to come, and give the tensor, in the graph; raises what went wrong meanwhile.

        To be asked once: another time does again what is done here.
        """
        return self._finish()

    def then(self, function: Callable[[Tensor], Tensor]) -> Started:
        """A function of the result, called when that is asked for."""
        return Started(lambda: function(self.result()))
