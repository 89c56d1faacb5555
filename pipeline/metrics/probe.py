"""Classifiers on the frozen encoder's features, which see the labels and no adapter: the lines to reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

        value = fitted_once(tested, "linear-probe", [sklearn.__version__], lambda: linear_probe(tested.images))
        return [accuracy_of("probe", value, "linear probe", tested)]


class AttentiveProbe(Metric):
    """Test accuracy of a classifier that chooses among the tokens of a picture before it averages them."""

    tasks = ("classify",)

    def figures(self, tested: Tested) -> list[Figure]:
        import torch

        from pipeline.devices import pick_device
        from pipeline.metrics.attention import attentive_probe

        seed, device = tested.params.seed, pick_device(tested.params.runtime.device)
        decides = [torch.__version__, seed]
        value = fitted_once(tested, "attentive-probe", decides, lambda: attentive_probe(tested.images, seed, device))
        return [accuracy_of("probe_attention", value, "attentive probe", tested)]


def fitted_once(tested: Tested, name: str, decides: Sequence[object], fit: Callable[[], float]) -> float:
    """The test accuracy that `fit` gives, of all adapters the same."""
    from pipeline.training.checkpoint import Checkpoint

    run, data = tested.run, tested.data
    inputs = [run.features("images", data), run.manifest(data)]
    kept = Checkpoint.of(run, f"{name}-{data}", decides, inputs, __name__)
    state = kept.load()
    if state is None:
        state = {"accuracy": fit()}
        kept.save(state)
    return float(state["accuracy"])


def accuracy_of(key: str, value: float, label: str, tested: Tested) -> Figure:
    count = len(labelled(tested.images, "test"))
    return Figure(key, value, label, wilson(round(value * count), count), baseline=True)


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
