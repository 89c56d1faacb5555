"""The name of what is in a picture, out of a list of classes."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipeline.config.base import Positive, Prompt, Section
from pipeline.errors import UserError
from pipeline.naming.classes import class_names, labelled
from pipeline.runs import remedy, require
from pipeline.tasks.base import SPEEDS, Models, Task

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from pipeline.naming.table import Named
    from pipeline.store.reader import ImageTokens

COLUMNS = ("id", "image", "label", "output", "predicted", "correct", "strict")


SCORES = " scores"  # behind a rule: the column of the log-probabilities of all names, which no file keeps


class NamingSettings(Section):
    class_tokens: Positive = 16
    class_prompt: Prompt
    class_names: Literal["generated", "ranked"] = Field(
        "generated", description="ranked: the likeliest names are also ranked by the LLM, and read off its last state"
    )


class Naming(Task):
    """Which class a picture is of, in words."""

    Settings = NamingSettings
    settings: NamingSettings

    @property
    def prompt(self) -> str:
        return self.settings.class_prompt

    @property
    def max_tokens(self) -> int:
        return self.settings.class_tokens

    def answers(self, rows: pd.DataFrame) -> list[list[str]]:
        return [[label] for label in rows["label"]]

    def predict(self, models: Models, images: ImageTokens, batch: int, seed: int) -> pd.DataFrame:
        """Greedy answers for all labelled test pictures, columns COLUMNS.

        Where names are ranked also the names by each of LLM_RULES (naming/rules.py), and the log-probabilities of all.
        """
        positions, names = labelled(images, "test"), class_names(images)
        ranks = self.settings.class_names == "ranked"
        named = models.named() if models.hints or ranks else None
        hints = self._hints(models, named, images, positions)
        ranked: dict[str, Tensor] = {}
        with models.finetuned() as model:
            began = time.perf_counter()
            outputs = model.answers(images, positions, self.prompt, self.max_tokens, batch, hints)
            speeds = {"": len(positions) / (time.perf_counter() - began)} if positions else {}
            if ranks and named and positions:
                from pipeline.tasks.ranking import Ranking  # torch

                hints_of = partial(self._hints, models, named, images)
                ranking = Ranking(model, images, named, positions, self.prompt, batch, hints_of)
                ranked = ranking.by_rule()
                speeds |= ranking.speeds
        table = images.rows.iloc[positions][["id", "image", "label"]].reset_index(drop=True)
        table["output"] = outputs
        table["predicted"] = [find_class(output, names) for output in outputs]
        table["correct"] = table["predicted"] == table["label"]
        table["strict"] = table["output"] == table["label"]
        for rule, scores in ranked.items():
            table[rule] = [names[i] for i in scores.argmax(1).tolist()]
            table[rule + SCORES] = list(scores.numpy())
        table.attrs[SPEEDS] = speeds
        return table

    def _hints(
        self, models: Models, named: Named | None, images: ImageTokens, positions: list[int]
    ) -> list[str] | None:
        """The likeliest names of some pictures as they stand in the prompt; None where the recipe has none."""
        if not (models.hints and named):
            return None
        return [self.hint(named.hinted(images.ids[i], models.hints)) for i in positions]

    def write(self, predictions: pd.DataFrame, folder: Path) -> None:
        kept = predictions[[column for column in predictions if not column.endswith(SCORES)]]
        kept.to_csv(folder / "predictions.csv", index=False)
        per_class(predictions).to_csv(folder / "per_class.csv", index=False)
        confusions(predictions).to_csv(folder / "confusions.csv", index=False)

    @classmethod
    def read(cls, folder: Path) -> pd.DataFrame:
        """An empty cell is an empty text, and a dish called NA stays one."""
        import pandas as pd

        path = require(folder / "predictions.csv")
        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
        except pd.errors.EmptyDataError:
            table = pd.DataFrame()
        missing = [column for column in COLUMNS if column not in table]
        if missing:
            raise UserError(path, f"no column {', '.join(missing)}", remedy(folder, force=True))
        for column in ("correct", "strict"):
            table[column] = table[column].str.lower().isin(("true", "1"))
        return table


def find_class(output: str, names: Sequence[str]) -> str | None:
    """The class whose name appears in an output: whole words, any case; the longest name counts (thesis, 3.7).

    A name without words is in no output.
    """
    found = [
        name for name in names if name.strip() and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", output, re.IGNORECASE)
    ]
    return max(found, key=len, default=None)


def per_class(predictions: pd.DataFrame) -> pd.DataFrame:
    """label, images, correct, accuracy."""
    table = predictions.groupby("label")["correct"].agg(images="size", correct="sum").reset_index()
    return table.assign(accuracy=table["correct"] / table["images"])


def confusions(predictions: pd.DataFrame) -> pd.DataFrame:
    """label, predicted, count of the wrong answers, most frequent first; an answer naming no class is left empty."""
    wrong = predictions[~predictions["correct"]].fillna({"predicted": ""})
    counts = wrong.groupby(["label", "predicted"]).size().rename("count").reset_index()
    return counts.sort_values(["count", "label", "predicted"], ascending=[False, True, True], ignore_index=True)
