"""Accuracy of names by the thesis's rule and by a strict one, and what guessing would get."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pipeline.metrics.base import Figure, Metric, Tested, share_of
from pipeline.naming.classes import class_names
from pipeline.naming.rules import LLM_RULES
from pipeline.tasks.naming import SCORES

if TYPE_CHECKING:
    import pandas as pd


class Accuracy(Metric):
    """acc: the class's name stands in the answer (thesis, 3.7); macro: its mean over the classes; acc_strict: the name
    is the answer; acc_shuffled: the answer is that to another picture; and the figures of LLM_RULES where names were
    ranked."""

    tasks = ("classify",)

    def figures(self, tested: Tested) -> list[Figure]:
        import numpy as np
        import torch

        from pipeline.metrics.rules import figures_of

        rows, names = tested.predictions, class_names(tested.images)
        left_out = len(tested.images.split("test")) - len(rows)
        if left_out:
            print(
                f"{tested.data}: {left_out} test pictures are left out, whose class name has no words", file=sys.stderr
            )
        if len(names) == 1:
            print(
                f"{tested.data}: all pictures are of one class, {names[0]!r}: its accuracy says nothing, "
                "chance is 100 %",
                file=sys.stderr,
            )
        own = [names.index(label) for label in rows["label"]]
        ranked = [
            figure
            for rule in LLM_RULES
            if rule + SCORES in rows
            for figure in figures_of(rule, torch.from_numpy(np.stack(rows[rule + SCORES].to_list())), own)
        ]
        return [
            share_of("acc", rows["correct"], "accuracy"),
            Figure("macro", float(rows.groupby("label")["correct"].mean().mean()), "accuracy, mean over the classes"),
            share_of("acc_strict", rows["strict"], "accuracy, word for word"),
            Figure("acc_shuffled", shuffled_accuracy(rows), "accuracy of another picture's answer"),
            share_of("valid_name", rows["predicted"].notna(), "answers that are the name of a class"),
            *ranked,
            Figure("chance", 1 / len(names), "chance", baseline=True),
            Figure("test_images", len(rows), "test pictures", kind="count", baseline=True),
            Figure("classes", len(names), "classes", kind="count", baseline=True),
        ]


def shuffled_accuracy(rows: pd.DataFrame) -> float:
    """The mean accuracy over all ways to give each picture the answer to another one, by counting pairs."""
    if len(rows) < 2:
        return float("nan")
    said, own = rows["predicted"].value_counts(), rows["label"].value_counts()
    pairs = float((said.reindex(own.index, fill_value=0) * own).sum()) - float(rows["correct"].sum())
    return pairs / (len(rows) * (len(rows) - 1))
