"""The name of what is in a picture, out of a list of classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.base import Positive, Prompt, Section
from pipeline.errors import UserError
from pipeline.naming.classes import class_names, labelled
from pipeline.runs import remedy, require
from pipeline.tasks.base import Models, Task

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.store.reader import ImageTokens

COLUMNS = ("id", "image", "label", "output", "predicted", "correct", "strict")


class NamingSettings(Section):
    class_tokens: Positive = 16
    class_prompt: Prompt


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
        """Greedy answers for all labelled test pictures, columns COLUMNS."""
        positions, names, named = labelled(images, "test"), class_names(images), models.named()
        hints = None
        if models.hints and named:
            hints = [self.hint(named.candidates(images.ids[i], models.hints)) for i in positions]
        with models.finetuned() as model:
            outputs = model.answers(images, positions, self.prompt, self.max_tokens, batch, hints)
        table = images.rows.iloc[positions][["id", "image", "label"]].reset_index(drop=True)
        table["output"] = outputs
        table["predicted"] = [find_class(output, names) for output in outputs]
        table["correct"] = table["predicted"] == table["label"]
        table["strict"] = table["output"] == table["label"]
        return table

    def write(self, predictions: pd.DataFrame, folder: Path) -> None:
        predictions.to_csv(folder / "predictions.csv", index=False)
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
