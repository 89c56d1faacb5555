"""What every metric is: figures of a task's answers to test pictures."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pipeline.config import Params
from pipeline.config.schema import LLM, MetricSettings
from pipeline.errors import UserError
from pipeline.runs import Run, remedy, require

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from pipeline.metrics.choice import Chooser
    from pipeline.store.reader import ImageTokens

FIGURES = "figures.json"
Kind = Literal["share", "number", "count"]
DRAWS = 2000  # of pictures, for an interval


@dataclass(frozen=True)
class Figure:
    """Something measured: under which key, how it is called, and its 95 % interval where it has one.

    A baseline is of the data set alone, whatever adapter and recipe; a `share` is shown in percent.
    """

    key: str
    value: float
    label: str
    interval: tuple[float, float] | None = None
    kind: Kind = "share"
    baseline: bool = False

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Figure:
        """Raises TypeError, ValueError, LookupError or AttributeError for what is no figure."""
        interval = values.get("interval")
        ends = None if interval is None else (float(interval[0]), float(interval[1]))
        return cls(**values | {"value": float(values["value"]), "interval": ends})


def read_figures(made: Path, data: str) -> list[Figure]:
    """Those of a data set that a stage wrote into its folder. Raises UserError when the file is missing or damaged."""
    path = require(made / data / FIGURES)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return [Figure.from_json(figure) for figure in (values if isinstance(values, list) else [values])]
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise UserError(path, f"no list of figures ({error})", remedy(made, force=True)) from None


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


def mean_of(key: str, values: np.ndarray, label: str, kind: Kind = "number", baseline: bool = False) -> Figure:
    """The mean of a number of each picture, [n], or of differences; its interval is that of drawing pictures anew."""
    import numpy as np

    low, high = np.quantile(redrawn(len(values)) @ values / len(values), (0.025, 0.975))
    return Figure(key, float(values.mean()), label, (float(low), float(high)), kind, baseline)


def redrawn(n: int) -> np.ndarray:
    """How often each of n pictures is in each of DRAWS samples of n: [DRAWS, n] (Efron's bootstrap, 1979)."""
    import numpy as np

    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), DRAWS)


@dataclass(frozen=True)
class Tested:
    """What a metric sees: a data set, and a task's answers to its test pictures."""

    params: Params
    data: str
    images: ImageTokens
    predictions: pd.DataFrame
    chooser: Callable[[LLM | None], Chooser]
    """An LLM without an adapter, to be asked about texts: the run's own, which is loaded, for None; else it loads."""

    @property
    def run(self) -> Run:
        return Run.of(self.params)


class Metric(ABC):
    """Figures of one kind. A metric of an own package is one class with `tasks` and `figures`."""

    Settings: ClassVar[type[MetricSettings]] = MetricSettings
    tasks: ClassVar[tuple[str, ...]]
    """The tasks whose answers it measures."""
    needs_text_tower: ClassVar[bool] = False
    """Whether it asks the vision encoder's own text tower, which not every encoder has."""

    def __init__(self, settings: Any):
        self.settings = settings

    @abstractmethod
    def figures(self, tested: Tested) -> list[Figure]:
        """What there is to say of some answers."""
