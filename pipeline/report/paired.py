"""Methods of a study held against the first of it, and against controls, picture by picture."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from pipeline.config.study import Cell
from pipeline.report.tables import Cell as Shown
from pipeline.report.tables import Table

Scores = dict[Cell, pd.DataFrame]
"""Of a training, what is measured of each picture: columns by their key in study.csv, rows by the picture's id."""
Column = tuple[str, float, int]
OVER = "_over_"  # in the key of a difference that was taken when captions were scored


def compared(scores: Scores, cells: Iterable[Cell], reference: str, columns: dict[str, Column]) -> Table:
    """How far `reference` is ahead of each other method: a row for each adapter and method, a column for each figure.

    Differences are of the same seeds and pictures; for what stands below them see `interval`.
    """
    of, kept = _by_method(scores, cells), {key: column for key, column in columns.items() if OVER not in key}
    rows = {
        f"{adapter}: {method}": _differences(of[adapter, reference], own, kept)
        for (adapter, method), own in of.items()
        if method != reference and (adapter, reference) in of
    }
    return _table(rows, kept)


def over_controls(scores: Scores, cells: Iterable[Cell], columns: dict[str, Column]) -> Table:
    """What each method's captions get over captions of other origin or pictures (`CaptionScores`), likewise."""
    kept = {key: column for key, column in columns.items() if OVER in key}
    rows = {
        f"{adapter}: {method}": _differences(own, None, kept)
        for (adapter, method), own in _by_method(scores, cells).items()
    }
    return _table(rows, kept)


def interval(differences: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of differences [seeds, pictures], as for other seeds and other pictures.

    The variance of the mean is that of the pictures' means plus that of the seeds' means, which counts what is left
    over twice, so it is wide rather than narrow; Student's t has Satterthwaite's degrees of freedom (1946): of three
    seeds that differ much it is four standard errors. One seed says nothing of others: then it is of pictures alone.
    """
    from scipy.stats import t

    means = [differences.mean(axis) for axis in ((0, 1) if len(differences) > 1 else (0,))]
    variances = [values.var(ddof=1) / len(values) for values in means]
    parts = [one**2 / (len(values) - 1) for one, values in zip(variances, means, strict=True)]
    freedom = sum(variances) ** 2 / sum(parts) if sum(parts) else 1  # all are alike: whatever, times no error
    reach = float(t.ppf(0.975, freedom) * sum(variances) ** 0.5)
    return float(differences.mean()) - reach, float(differences.mean()) + reach


def _by_method(scores: Scores, cells: Iterable[Cell]) -> dict[tuple[str, str], dict[int, pd.DataFrame]]:
    """The pictures' scores by seed, by adapter and method."""
    found: dict[tuple[str, str], dict[int, pd.DataFrame]] = {}
    for cell in cells:
        if cell in scores:
            found.setdefault((cell.adapter, cell.method), {})[cell.seed] = scores[cell]
    return found


def _differences(
    ours: dict[int, pd.DataFrame], theirs: dict[int, pd.DataFrame] | None, columns: dict[str, Column]
) -> dict[str, Shown]:
    found = {key: _stacked(ours, theirs, key) for key in columns}  # one picture has no spread, and so no interval
    return {key: _shown(differences, columns[key]) for key, differences in found.items() if differences.shape[1] > 1}


def _stacked(ours: dict[int, pd.DataFrame], theirs: dict[int, pd.DataFrame] | None, key: str) -> np.ndarray:
    """One's scores less the other's, of the seeds and pictures that both have: [seeds, pictures]."""
    pairs = [
        own[key] - (0 if theirs is None else theirs[seed][key])
        for seed, own in ours.items()
        if key in own and (theirs is None or (seed in theirs and key in theirs[seed]))
    ]
    return pd.concat(pairs, axis=1).dropna().to_numpy().T if pairs else np.empty((0, 0))


def _shown(differences: np.ndarray, column: Column) -> Shown:
    _, factor, digits = column
    low, high = (factor * end for end in interval(differences))
    seeds = f"{len(differences)} seeds" if len(differences) > 1 else "one seed"
    sure = (low > 0) - (high < 0) if len(differences) > 1 else 0
    mood = {1: "yes", 0: "", -1: "no"}[sure]
    return Shown(
        f"{factor * differences.mean():+.{digits}f}", f"{low:+.{digits}f} to {high:+.{digits}f}, {seeds}", mood
    )


def _table(rows: dict[str, dict[str, Shown]], columns: dict[str, Column]) -> Table:
    headings = {key: heading for key, (heading, _, _) in columns.items()}
    return Table.of(headings, {name: cells for name, cells in rows.items() if cells}, "adapter: method")
