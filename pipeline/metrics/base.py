"""What every metric is: figures of a task's answers to test pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pipeline.config.schema import MetricSettings

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.runs import Run
    from pipeline.store.reader import ImageTokens


@dataclass(frozen=True)
class Figure:
    """Something measured: under which key, how it is called, and its 95 % interval where it has one.

    A baseline is of the data set alone, whatever adapter and recipe; a `share` is shown in percent.
    """

    key: str
    value: float
    label: str
    interval: tuple[float, float] | None = None
    kind: Literal["share", "number", "count"] = "share"
    baseline: bool = False

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Figure:
        interval = values.get("interval")
        return cls(**values | {"interval": None if interval is None else (interval[0], interval[1])})


def share_of(key: str, hits: Iterable[bool], label: str, baseline: bool = False) -> Figure:
    """The share of hits among trials, with Wilson's interval (1927): sound near 0 and 1 too."""
    found = [bool(hit) for hit in hits]
    return Figure(key, sum(found) / len(found), label, wilson(sum(found), len(found)), baseline=baseline)


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share."""
    from scipy.stats import binomtest

    if not trials:
        return 0.0, 1.0
    low, high = binomtest(hits, trials).proportion_ci(0.95, "wilson")
    return float(low), float(high)


@dataclass(frozen=True)
class Tested:
    """What a metric sees: a data set, and a task's answers to its test pictures."""

    run: Run
    data: str
    images: ImageTokens
    predictions: pd.DataFrame


class Metric(ABC):
    """Figures of one kind. A metric of an own package is one class with `tasks` and `figures`."""

    Settings: ClassVar[type[MetricSettings]] = MetricSettings
    tasks: ClassVar[tuple[str, ...]]
    """The tasks whose answers it measures."""

    def __init__(self, settings: Any):
        self.settings = settings

    @abstractmethod
    def figures(self, tested: Tested) -> list[Figure]:
        """What there is to say of some answers."""
