"""Classification accuracy by the thesis's rule, and what to compare it with."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from pipeline.store.reader import ImageTokens
from pipeline.vlm import VLM


def find_class(output: str, names: Sequence[str]) -> str | None:
    """The class whose name appears in an output: whole words, any case; the longest name counts (thesis, 3.7).

    A name without words is in no output.
    """
    found = [
        name for name in names if name.strip() and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", output, re.IGNORECASE)
    ]
    return max(found, key=len, default=None)


def labelled(images: ImageTokens, *splits: str) -> list[int]:
    """Positions of the pictures of some splits whose class has a name: one without words is no answer."""
    return [i for split in splits for i in images.split(split) if str(images.rows["label"].iloc[i]).strip()]


def class_names(images: ImageTokens) -> list[str]:
    """The names of all classes, sorted."""
    return sorted({label for label in images.rows["label"] if str(label).strip()})


def predict(model: VLM, images: ImageTokens, prompt: str, max_new_tokens: int, batch: int) -> pd.DataFrame:
    """Greedy answers for all labelled test images: id, image, label, output, predicted, correct, strict."""
    positions, names = labelled(images, "test"), class_names(images)
    outputs = model.answers(images, positions, prompt, max_new_tokens, batch)
    table = images.rows.iloc[positions][["id", "image", "label"]].reset_index(drop=True)
    table["output"] = outputs
    table["predicted"] = [find_class(output, names) for output in outputs]
    table["correct"] = table["predicted"] == table["label"]
    table["strict"] = table["output"] == table["label"]
    return table


def per_class(predictions: pd.DataFrame) -> pd.DataFrame:
    """label, images, correct, accuracy."""
    table = predictions.groupby("label")["correct"].agg(images="size", correct="sum").reset_index()
    return table.assign(accuracy=table["correct"] / table["images"])


def confusions(predictions: pd.DataFrame) -> pd.DataFrame:
    """label, predicted, count of the wrong answers, most frequent first; an answer naming no class is left empty."""
    wrong = predictions[~predictions["correct"]].fillna({"predicted": ""})
    counts = wrong.groupby(["label", "predicted"]).size().rename("count").reset_index()
    return counts.sort_values(["count", "label", "predicted"], ascending=[False, True, True], ignore_index=True)


def linear_probe(images: ImageTokens) -> float:
    """Test accuracy of logistic regression on mean-pooled image tokens, trained on the train and val parts.

    The line to reach: what the frozen encoder's features give to a linear classifier.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def pooled(positions: list[int]) -> np.ndarray:
        parts = [images.tokens(positions[i : i + 256]).mean(1) for i in range(0, len(positions), 256)]
        return torch.cat(parts).numpy()

    labels = images.rows["label"].to_numpy()
    train, test = labelled(images, "train", "val"), labelled(images, "test")
    if len(set(labels[train])) == 1:  # nothing to fit: it always says this class
        return float((labels[test] == labels[train][0]).mean())
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    probe.fit(pooled(train), labels[train])
    return float(probe.score(pooled(test), labels[test]))
