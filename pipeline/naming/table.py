"""What stage `name` found out about the pictures of a data set of classes, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import atomically
from pipeline.naming.rules import RULES
from pipeline.naming.weigh import LOWEST
from pipeline.runs import Run, remedy, require

if TYPE_CHECKING:
    import pandas as pd

TABLE = "names.parquet"
COLUMNS = ("split", "label", "candidates", "probabilities", *RULES)
HINTED = 0.9


def hinted(likeliest: Iterable[tuple[str, float]], count: int) -> list[str]:
    """The names that the LLM is told of a picture: the likeliest, until together they have HINTED of the probability.

    At most `count`. `likeliest` are names with their probabilities, the likeliest first. A picture that is surely
    named has one name: among five the LLM now and then takes another, and is wrong more often than right.
    """
    names: list[str] = []
    total = 0.0
    for name, probability in likeliest:
        if len(names) == count or total >= HINTED:
            break
        names.append(name)
        total += probability
    return names


@dataclass(frozen=True)
class Named:
    """The pictures of a data set with their likeliest names and, but for training pictures, all probabilities.

    `rows` has a row for each labelled picture, by its id: split, label, candidates (names, the likeliest first), their
    probabilities, and the log-probabilities of all names by each of RULES. Candidates of training pictures are from
    classifiers that did not see them (`cross_fitted`).
    """

    names: list[str]
    rows: pd.DataFrame

    def candidates(self, row_id: str, count: int) -> list[str]:
        """The likeliest names of a picture, the likeliest first; none where it has no label."""
        return list(self.rows["candidates"].get(row_id, ())[:count])

    def hinted(self, row_id: str, count: int) -> list[str]:
        """Those of them that the LLM is told (`hinted`)."""
        columns = (self.rows[column].get(row_id, ()) for column in ("candidates", "probabilities"))
        return hinted(zip(*columns, strict=True), count)

    def log_probabilities(self, rule: str, ids: Sequence[str]) -> Tensor:
        """Of validation or test pictures, [n, C]."""
        return torch.from_numpy(np.stack(self.rows.loc[list(ids), rule].to_list())).float()

    def in_columns(self, scores: Tensor, listed: Sequence[Sequence[str]]) -> Tensor:
        """Scores [n, K] of the names listed for each picture, as scores of all names [n, C]; LOWEST for the others."""
        place = {name: i for i, name in enumerate(self.names)}
        found = scores.new_full((len(scores), len(self.names)), LOWEST)
        for row, some in enumerate(listed):
            found[row, [place[name] for name in some]] = scores[row, : len(some)]
        return found

    def write(self, folder: Path) -> None:
        table = pa.Table.from_pandas(self.rows.reset_index(), preserve_index=False)
        with atomically(folder / TABLE) as file:
            pq.write_table(table, file, compression="zstd")

    @classmethod
    def read(cls, run: Run, adapter: str, data: str) -> Named:
        """Raises UserError when `name` has not run, or its table cannot be read."""
        path = require(run.named(adapter) / data / TABLE)
        try:
            rows = pq.read_table(path).to_pandas().set_index("id")[list(COLUMNS)]
            return cls(sorted(set(rows["label"])), rows)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(path, f"cannot be read ({error})", remedy(path.parents[1])) from None
