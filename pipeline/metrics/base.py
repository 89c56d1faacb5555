"""What every metric is: figures of a task's answers to test pictures."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pipeline.config import Params
from pipeline.config.schema import LLM, MetricSettings
from pipeline.errors import UserError
from pipeline.files import atomically
from pipeline.runs import Run, remedy, require

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from pipeline.metrics.choice import Chooser
    from pipeline.store.reader import ImageTokens

FIGURES, PICTURES = "figures.json", "pictures.csv"
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
    each: tuple[float, ...] | None = field(default=None, compare=False, repr=False)
    """What it is the mean of, picture by picture in the order of the answers; in PICTURES, not in FIGURES."""

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "each"}

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


def write_figures(made: Path, data: str, figures: Sequence[Figure], ids: Sequence[str]) -> None:
    """FIGURES, and PICTURES: a row for each picture, a column for each figure that is a mean over all of them."""
    import pandas as pd

    with atomically(made / data / FIGURES) as file:
        file.write((json.dumps([figure.as_json() for figure in figures], indent=1) + "\n").encode())
    means = {figure.key: figure.each for figure in figures if figure.each and len(figure.each) == len(ids)}
    with atomically(made / data / PICTURES) as file:
        file.write(
            pd.DataFrame(means, index=pd.Index(ids, name="id")).to_csv(float_format="%.6g", na_rep="nan").encode()
        )


def read_pictures(made: Path, data: str) -> pd.DataFrame:
    """PICTURES, by id; no columns where it is not there. Raises UserError when it is damaged."""
    import pandas as pd

    path = made / data / PICTURES
    if not path.exists():
        return pd.DataFrame(index=pd.Index([], name="id"))
    try:
        return pd.read_csv(path, index_col="id", dtype={"id": str}, na_filter=False).astype(float)
    except (ValueError, OSError) as error:
        raise UserError(path, f"no table of pictures ({error})", remedy(made, force=True)) from None


def share_of(key: str, hits: Iterable[bool], label: str, baseline: bool = False) -> Figure:
    """The share of hits among trials, with Wilson's interval (1927): sound near 0 and 1 too."""
    found = [bool(hit) for hit in hits]
    interval = wilson(sum(found), len(found))
    return Figure(key, sum(found) / len(found), label, interval, baseline=baseline, each=tuple(map(float, found)))


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
    return Figure(key, float(values.mean()), label, (float(low), float(high)), kind, baseline, tuple(values.tolist()))


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
