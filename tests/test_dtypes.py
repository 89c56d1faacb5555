"""The stored types: what comes back, and that training reads each of them."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from test_pipeline import terraalign

from pipeline.config.schema import Cache
from pipeline.runs import Run
from pipeline.store.dtypes import DoesNotFit, pack, unpack
from pipeline.store.reader import ImageTokens

RUN = Run("tiny")

DTYPES = ("float16", "bfloat16", "float32", "int8")


def tokens() -> torch.Tensor:
    """[6, 5, 8]; exact in float32 on every processor; the last token of each row is zero."""
    numbers = torch.arange(6 * 5 * 8).mul(7919).remainder(2001).sub(1000).float() / 1024
    return numbers.reshape(6, 5, 8) * torch.tensor([0.015625, 1, 7, 30, 0]).view(5, 1)


@pytest.mark.parametrize(
    ("dtype", "step"), [("float16", 2**-11), ("bfloat16", 2**-8), ("float32", 0), ("int8", 0.5 / 127)]
)
def test_numbers_come_back_within_half_a_step(dtype, step):
    """A step is relative to the number, in int8 to the largest of its token."""
    x = tokens()
    back = unpack(pack(x, dtype), dtype)
    assert back.dtype == torch.float32 and back.shape == x.shape
    scale = x.abs().amax(-1, keepdim=True) if dtype == "int8" else x.abs()
    assert ((back - x).abs() <= scale * step * (1 + 1e-5) + 1e-7).all()
    assert (back[:, 4] == 0).all()


def test_bfloat16_is_torchs_own():
    x = torch.randn(3, 4, 5)
    stored = pack(x, "bfloat16")["tokens"]
    assert stored.dtype == np.uint16
    bits = x.numpy().view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # round to nearest, ties to even
    assert (stored == nearest).all()


def test_int8_is_symmetric_per_token():
    stored = pack(torch.tensor([[[-2.0, 1.0, 0.5], [0.1, -0.05, 0.0]]]), "int8")
    assert stored["tokens"].dtype == np.int8 and stored["scale"].dtype == np.float32
    assert stored["tokens"].tolist() == [[[-127, 64, 32], [127, -64, 0]]]
    np.testing.assert_allclose(stored["scale"], [[2 / 127, 0.1 / 127]], rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", 1e5), ("float32", math.inf), ("int8", math.nan), ("bfloat16", -math.inf)]
)
def test_numbers_that_do_not_fit_are_named(dtype, value):
    x = torch.zeros(4, 2, 3)
    x[2, 1, 0] = value
    with pytest.raises(DoesNotFit) as fault:
        pack(x, dtype)
    assert fault.value.row == 2


def test_stored_bytes_are_stable():
    """Golden values: when one changes, raise its version, or old shards would mean something else."""
    digests = {dtype: hashlib.sha256(b"".join(c.tobytes() for c in pack(tokens(), dtype).values())) for dtype in DTYPES}
    assert {dtype: digest.hexdigest()[:12] for dtype, digest in digests.items()} == {
        "float16": "cccf0f1a39cc",
        "bfloat16": "ed8a0fe92aed",
        "float32": "c78b9e775eee",
        "int8": "c52af9f70a67",
    }


def test_params_and_code_know_the_same_types():
    from pipeline.plan.costs import TOKEN_BYTES
    from pipeline.store.schema import STORED

    [allowed] = [field.annotation.__args__ for name, field in Cache.model_fields.items() if name == "dtype"]
    assert set(allowed) == set(STORED) == set(TOKEN_BYTES) == set(DTYPES)


def test_each_type_trains(tiny_params, monkeypatch):
    """Two steps through the stages; the image-blind baseline, which reads no image tokens, is not fitted."""
    monkeypatch.setattr(
        "pipeline.objectives.constant_set.fit_constant_set", lambda emd, count: emd.pairs.table[:count].clone()
    )
    values = yaml.safe_load(Path("params.yaml").read_text())
    values["pretrain"] |= {"data": ["captions"], "max_steps": 2}
    terraalign("prepare", "captions")
    losses, read = {}, {}
    for dtype in DTYPES:
        values["cache"]["dtype"] = dtype
        Path("params.yaml").write_text(yaml.safe_dump(values))
        for command in (("extract-images", "captions"), ("extract-captions", "captions"), ("pretrain", "linear")):
            torch.manual_seed(0)  # the encoder's weights are random
            terraalign(*command)
        images = ImageTokens.open(RUN, "captions")
        read[dtype] = images.tokens([0, 3])
        losses[dtype] = pd.read_csv("data/tiny/pretrain/linear/history.csv")["val"].iloc[-1]
    assert list(losses.values()) == pytest.approx([losses["float32"]] * 4, rel=3e-3)
    for dtype in DTYPES:
        assert torch.equal(read[dtype], unpack(pack(read["float32"], dtype), dtype))
