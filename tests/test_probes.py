"""Probes of the frozen features: what attention takes, against PyTorch's own, and when it is worth its while."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from pipeline.config import Params
from pipeline.metrics import base
from pipeline.metrics.attention import Attentive, attentive_probe, spread
from pipeline.metrics.probe import AttentiveProbe, Probe, linear_probe
from pipeline.runs import Run
from pipeline.store.reader import ImageTokens

CLASSES, TOKENS, WIDTH = 5, 8, 64


def pictures(count: int = 1000, splits: tuple[str, ...] = ("train", "train", "val", "test")) -> ImageTokens:
    """Of each picture's tokens one is marked and of its class; the others are of any."""
    rng = np.random.default_rng(0)
    words, mark = rng.standard_normal((CLASSES, WIDTH)), rng.standard_normal(WIDTH)
    labels = rng.integers(CLASSES, size=count)
    of = rng.integers(CLASSES, size=(count, TOKENS))
    marked = rng.integers(TOKENS, size=count)
    of[np.arange(count), marked] = labels
    tokens = words[of].astype(np.float32)
    tokens[np.arange(count), marked] += 2 * mark
    rows = pd.DataFrame({"id": [f"p{i:03}" for i in range(count)], "label": [f"dish {i}" for i in labels]})
    rows["split"] = [splits[i % len(splits)] for i in range(count)]
    return ImageTokens(rows, (TOKENS, WIDTH), "float32", lambda at: {"tokens": tokens[at]})


def test_the_pooling_is_attention_by_one_query() -> None:
    images = pictures(50)
    tokens = images.tokens(list(range(50)))
    mean, scale = spread(images, list(range(50)), torch.device("cpu"))
    x = (tokens - tokens.mean((0, 1))) / tokens.flatten(0, 1).std(0, correction=0)
    probe = Attentive(mean, scale, CLASSES, 0.5).eval()
    for query in (torch.zeros(WIDTH), torch.randn(WIDTH)):  # of zeros: the mean
        probe.query = nn.Parameter(query)
        pooled = scaled_dot_product_attention(query.expand(50, 1, WIDTH), x, x)[:, 0]
        expected = probe.linear(nn.functional.layer_norm(pooled, [WIDTH]))
        torch.testing.assert_close(probe(tokens), expected, atol=1e-5, rtol=1e-4)


def test_a_channel_that_is_always_the_same_counts_as_it_is() -> None:
    images = pictures(20)
    still = images.tokens(list(range(20)))
    still[..., 2], still[..., 3] = 0, 1000
    fixed = ImageTokens(images.rows, images.shape, "float32", lambda at: {"tokens": still.numpy()[at]})
    mean, scale = spread(fixed, list(range(20)), torch.device("cpu"))
    assert mean[2:4].tolist() == [0, 1000] and scale[2:4].tolist() == [1, 1]


def test_attention_finds_the_token_that_says_it() -> None:
    images, before = pictures(), torch.get_rng_state()
    found = attentive_probe(images, 17)
    assert found > 0.95 > 0.8 > linear_probe(images)
    assert attentive_probe(images, 17) == found and torch.equal(torch.get_rng_state(), before)


def test_no_validation_pictures_and_a_single_class() -> None:
    assert attentive_probe(pictures(900, ("train", "train", "test")), 17) > 0.9
    one = pictures(40)
    one.rows["label"] = "dish"
    assert attentive_probe(one, 17) == 1


def test_both_are_fitted_once_for_all_adapters(tiny_params: Params) -> None:
    images, run = pictures(120), Run.of(tiny_params)
    for path in (run.features("images", "classes"), run.manifest("classes")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"one")
    one = base.Tested(
        tiny_params, "classes", images, pd.DataFrame(), lambda wanted: pytest.fail("no LLM is needed for this")
    )
    figures = [*Probe(None).figures(one), *AttentiveProbe(None).figures(one)]
    assert [(figure.key, figure.baseline) for figure in figures] == [("probe", True), ("probe_attention", True)]
    for figure in figures:
        assert figure.interval == base.wilson(round(figure.value * 30), 30)
    images.stored = lambda at: pytest.fail("fitted again")
    assert [*Probe(None).figures(one), *AttentiveProbe(None).figures(one)] == figures
    run.features("images", "classes").write_bytes(b"another")
    for probe in (Probe, AttentiveProbe):
        with pytest.raises(pytest.fail.Exception, match="fitted again"):
            probe(None).figures(one)
