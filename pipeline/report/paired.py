"""Methods of a study held against the first of it, and against what needs no adapter, picture by picture."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from pipeline.config.study import Cell
from pipeline.metrics.base import redrawn
from pipeline.report.tables import Cell as Shown
from pipeline.report.tables import Table

Scores = dict[Cell, pd.DataFrame]
"""Of a training, what is measured of each picture: columns by their key in study.csv, rows by the picture's id."""
Column = tuple[str, float, int]
OVER = "_over_"  # in the key of a difference that was taken when captions were scored


def compared(scores: Scores, cells: Iterable[Cell], reference: str, columns: dict[str, Column]) -> Table:
    """How far `reference` is ahead of each other method: a row for each adapter and method, a column for each figure.

    Differences are of the same seeds and pictures; for the intervals see `interval`.
    """
    of = _by_method(scores, cells)
    rows = {
        f"{adapter}: {reference} over {method}": {
            key: _shown(_stacked(of[adapter, reference], own, key), columns[key]) for key in columns if OVER not in key
        }
        for (adapter, method), own in of.items()
        if method != reference and (adapter, reference) in of
    }
    return _table(rows, columns)


def over_baselines(scores: Scores, cells: Iterable[Cell], columns: dict[str, Column]) -> Table:
    """What each method's captions get over what needs no adapter, likewise."""
    rows = {
        f"{adapter}: {method}": {key: _shown(_stacked(own, None, key), columns[key]) for key in columns if OVER in key}
        for (adapter, method), own in _by_method(scores, cells).items()
    }
    return _table(rows, columns)


def interval(differences: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of differences [seeds, pictures], seeds and pictures each drawn anew.

    Owen's pigeonhole bootstrap (2007, arXiv:0704.2099), which is wide rather than narrow; of one seed it is that of
    pictures alone.
    """
    seeds, pictures = differences.shape
    means = np.einsum("ds,sp,dp->d", redrawn(seeds, 1), differences, redrawn(pictures), optimize=True)
    low, high = np.quantile(means / differences.size, (0.025, 0.975))
    return float(low), float(high)


def _by_method(scores: Scores, cells: Iterable[Cell]) -> dict[tuple[str, str], dict[int, pd.DataFrame]]:
    """The pictures' scores by seed, by adapter and method."""
    found: dict[tuple[str, str], dict[int, pd.DataFrame]] = {}
    for cell in cells:
        if cell in scores:
            found.setdefault((cell.adapter, cell.method), {})[cell.seed] = scores[cell]
    return found


def _stacked(ours: dict[int, pd.DataFrame], theirs: dict[int, pd.DataFrame] | None, key: str) -> np.ndarray | None:
    """Of the seeds and pictures that both have, one's less the other's [seeds, pictures]; None where there are none."""
    pairs = []
    for seed, frame in ours.items():
        other = frame if theirs is None else theirs.get(seed)
        if other is not None and key in frame and key in other:
            pairs.append(frame[key] - (0 if theirs is None else other[key]))
    joined = pd.concat(pairs, axis=1).dropna() if pairs else pd.DataFrame()
    return joined.to_numpy().T if joined.size else None


def _shown(differences: np.ndarray | None, column: Column) -> Shown:
    if differences is None:
        return Shown("–")
    _, factor, digits = column
    low, high = (factor * end for end in interval(differences))
    seeds = f", {len(differences)} seeds" if len(differences) > 1 else ", one seed"
    mood = "yes" if low > 0 else "no" if high < 0 else ""
    return Shown(f"{factor * differences.mean():+.{digits}f}", f"{low:+.{digits}f} to {high:+.{digits}f}{seeds}", mood)


def _table(rows: dict[str, dict[str, Shown]], columns: dict[str, Column]) -> Table:
    shown = {name: {key: cell for key, cell in cells.items() if cell.small} for name, cells in rows.items()}
    headings = {key: heading for key, (heading, _, _) in columns.items()}
    return Table.of(headings, {name: cells for name, cells in shown.items() if cells}, "adapter: method")
