"""A linear classifier on the frozen encoder's features: the line to reach."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.metrics.base import Figure, Metric, Tested, wilson
from pipeline.naming.classes import labelled

if TYPE_CHECKING:
    import numpy as np

    from pipeline.store.reader import ImageTokens


class Probe(Metric):
    """Test accuracy of a logistic regression, fitted once: no adapter has a part in it."""

    tasks = ("classify",)

    def figures(self, tested: Tested) -> list[Figure]:
        import sklearn

        from pipeline.training.checkpoint import Checkpoint

        run, data = tested.run, tested.data
        inputs = [run.features("images", data), run.manifest(data)]
        kept = Checkpoint.of(run, f"linear-probe-{data}", [sklearn.__version__], inputs, __name__)
        state = kept.load()
        if state is None:
            state = {"accuracy": linear_probe(tested.images)}
            kept.save(state)
        value, count = float(state["accuracy"]), len(labelled(tested.images, "test"))
        interval = wilson(round(value * count), count)
        return [Figure("probe", value, "linear probe", interval, baseline=True)]


def linear_probe(images: ImageTokens) -> float:
    """Test accuracy of logistic regression on mean-pooled image tokens, trained on the train and val parts."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels = images.rows["label"].to_numpy()
    train, test = labelled(images, "train", "val"), labelled(images, "test")
    if len(set(labels[train])) == 1:  # nothing to fit: it always says this class
        return float((labels[test] == labels[train][0]).mean())
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    probe.fit(pooled(images, train), labels[train])
    return float(probe.score(pooled(images, test), labels[test]))


def pooled(images: ImageTokens, positions: list[int]) -> np.ndarray:
    """The mean token of some pictures: float32 [B, D]."""
    import torch

    parts = [images.tokens(positions[i : i + 256]).mean(1) for i in range(0, len(positions), 256)]
    return torch.cat(parts).numpy()
