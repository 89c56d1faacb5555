"""Principal components: the figures against numpy's own SVD, the pictures, and the whole stage on fakes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import alignment
from pipeline.config import load_params
from pipeline.errors import UserError

DEMO = Path(__file__).parent.parent / "profiles" / "demo.yaml"
WIDTH = 24
PICTURES = ("epoch1.png", "last.png", "zoom.png", "vocabulary.png", "finetuned.png", "explained.png")


def clouds(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two anisotropic clouds, 3 apart on one axis."""
    random = np.random.default_rng(seed)
    scale = np.geomspace(3, 0.05, WIDTH)
    image, text = (random.normal(size=(n, WIDTH)) * scale for n in (120, 300))
    image[:, 4] += 3
    return image, text


def test_explained_variance_is_that_of_a_plain_svd() -> None:
    image, text = clouds()
    found = alignment.fit(image, text)
    together = np.concatenate([image, text])
    variance = np.linalg.svd(together - together.mean(0), compute_uv=False) ** 2
    ratios = variance / variance.sum()
    np.testing.assert_allclose(found.explained, ratios, atol=1e-12)
    assert found.k80 == next(k for k in range(1, WIDTH + 1) if ratios[:k].sum() >= 0.8)
    assert found.gap == pytest.approx(np.linalg.norm(image.mean(0) - text.mean(0)))


def test_fewer_tokens_than_dimensions() -> None:
    image, text = (cloud[:6] for cloud in clouds())
    found = alignment.fit(image, text)
    assert found.explained.sum() == pytest.approx(1) and 1 <= found.k80 <= 12


@pytest.mark.parametrize(("ratios", "k80"), [([1.0], 1), ([0.5, 0.3, 0.2], 2), ([0.4, 0.39, 0.2, 0.01], 3)])
def test_count_for(ratios: list[float], k80: int) -> None:
    assert alignment.count_for(np.array(ratios), 0.8) == k80


def test_window_of_clouds_that_meet_and_of_clouds_that_do_not() -> None:
    square = np.random.default_rng(0).uniform(0, 1, (400, 2))
    low, high, meet = alignment.overlap(square, square + 0.5)
    assert meet and (low > 0.4).all() and (high < 1.1).all()
    low, high, meet = alignment.overlap(square, square + 5)
    assert not meet and (low < 0.6).all() and (high > 5.4).all()


class Scale(torch.nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens * self.factor


def fake_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    table = torch.from_numpy(random.normal(size=(50, WIDTH))).float()
    tokens = torch.from_numpy(random.normal(size=(40, 5, WIDTH))).float()
    ids = [f"p{number:02}" for number in range(40)]
    images = SimpleNamespace(
        ids=ids, split=lambda name: list(range(10, 40)), tokens=lambda at, device: tokens[at].to(device)
    )
    captions = SimpleNamespace(
        captions=lambda row_id: [[int(row_id[1:]), 1, 2], [3]], embeddings=lambda row: table[row]
    )
    monkeypatch.setattr(alignment, "ImageTokens", SimpleNamespace(open=lambda base, data: images))
    monkeypatch.setattr(alignment, "CaptionTokens", SimpleNamespace(open=lambda base, data: captions))
    monkeypatch.setattr(alignment, "load_embedding", lambda llm: torch.nn.Embedding.from_pretrained(table))
    monkeypatch.setattr(alignment, "check_results", lambda *_: [])  # tests/test_origin.py


def weights(folder: Path) -> None:
    for path in ("pretrain/mlp/first", "pretrain/mlp/last", "finetune/mlp-captions/adapter"):
        file = folder / "data/demo" / f"{path}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_stage_writes_pictures_and_figures_the_same_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fake_stores(monkeypatch)
    weights(tmp_path)
    scale = {"first": 3.0, "last": 1.0, "adapter": 1.5}
    monkeypatch.setattr(alignment, "load_adapter", lambda folder, name: Scale(scale[name]))
    params = load_params(DEMO)
    folder = alignment.pca(params, "mlp")
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(first) == sorted([*PICTURES, "metrics.json"])
    metrics = json.loads(first["metrics.json"])
    assert list(metrics) == ["epoch1", "last", "finetuned", "text"]
    alone = metrics.pop("text")
    assert alone["k80"] == alignment.count_for(np.array(alone["explained"]), 0.8)
    assert all(set(state) == {"k80", "gap", "explained"} for state in metrics.values())
    for name in PICTURES:
        assert len(first[name]) < 150_000 and Image.open(folder / name).size == (902, 704)
    assert {path.name: path.read_bytes() for path in alignment.pca(params, "mlp").iterdir()} == first


def test_missing_weights_name_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fake_stores(monkeypatch)
    with pytest.raises(UserError, match=r"first\.safetensors.*dvc repro pretrain@mlp"):
        alignment.pca(load_params(DEMO), "mlp")


def test_an_adapter_that_diverged_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fake_stores(monkeypatch)
    weights(tmp_path)
    monkeypatch.setattr(alignment, "load_adapter", lambda folder, name: Scale(float("nan")))
    with pytest.raises(UserError, match="not finite"):
        alignment.pca(load_params(DEMO), "mlp")
