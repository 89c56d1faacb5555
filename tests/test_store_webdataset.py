"""Exported features: the stock library reads back what the store holds, by the code that the documentation shows."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import numpy as np
import pytest
import torch
import webdataset
import yaml
from PIL import Image
from typer.testing import CliRunner

from pipeline import sources
from pipeline.errors import UserError
from pipeline.extract import extract_captions, extract_images
from pipeline.params import Params
from pipeline.store.reader import CaptionTokens, ImageTokens
from pipeline.store.webdataset import export, key_of
from stages.cli import app

PROJECT = Path(__file__).parents[1]
BASE = Path("data/demo")


class Pixels:
    """An encoder whose tokens are pixels."""

    identity: ClassVar = {"encoder": "pixels"}
    scale = 1.0

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image.resize((4, 4)), np.float32)).permute(2, 0, 1) * self.scale

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(2).transpose(1, 2)


class Letters:
    """A tokenizer with a token for each letter."""

    def get_vocab(self) -> dict[str, int]:
        return {chr(code): code for code in range(128)}

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(text.encode("ascii")) for text in texts]}


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """A prepared data set of labelled pictures, whose ids have a folder, dots and a blank."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for label in ("hot dog", "pear"):
        (tmp_path / "set" / label).mkdir(parents=True)
        for number in range(30):
            noise = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "set" / label / f"{number:02d}.small.PNG")
    values = yaml.safe_load((PROJECT / "profiles" / "demo.yaml").read_text(encoding="utf-8"))
    values["data"]["classes"] = {"source": "imagefolder", "root": "set", "validation": 0.2}
    params = Params.model_validate(values)
    sources.write(sources.prepare(params, "classes"), sources.manifest_path(params, "classes"))
    return params


def extract(params: Params, encoder: Any) -> tuple[ImageTokens, CaptionTokens]:
    extract_images(params, "classes", encoder, lambda n: None).write(BASE / "images/classes/manifest.json")
    torch.manual_seed(0)
    words = extract_captions(params, "classes", Letters(), torch.nn.Embedding(128, 6), lambda n: None)
    words.write(BASE / "text/classes/manifest.json")
    return ImageTokens.open(BASE, "classes"), CaptionTokens.open(BASE, "classes")


def test_the_library_reads_back_what_the_store_holds(params: Params) -> None:
    images, captions = extract(params, Pixels())
    done: list[int] = []
    shards = export(images, captions, Path("deep/er/exported"), 10, done.append)
    assert sum(done) == len(images.ids) == 60
    assert sorted(shards) == sorted(Path("deep/er/exported").glob("*.tar"))
    token_ids = np.load("deep/er/exported/token_ids.npy", allow_pickle=False)
    table = np.load("deep/er/exported/embeddings.npy", allow_pickle=False)
    for split in ("train", "val", "test"):
        found = [str(path) for path in shards if path.name.startswith(split)]
        samples = list(webdataset.WebDataset(found, shardshuffle=False).decode())
        assert {unquote(s["__key__"]) for s in samples} == {images.ids[position] for position in images.split(split)}
        assert max(np.unique([s["__url__"] for s in samples], return_counts=True)[1]) <= 10
        for sample in samples:
            row_id = unquote(sample["__key__"])
            assert sample["tokens.npy"].dtype == np.float16
            expected = images.tokens([images.ids.index(row_id)])[0].numpy()
            np.testing.assert_array_equal(sample["tokens.npy"], expected)
            assert sample["captions.json"] == captions.captions(row_id)
            ids = sample["captions.json"][0]
            np.testing.assert_array_equal(table[np.searchsorted(token_ids, ids)], captions.embeddings(ids).numpy())


def test_the_documented_lines_run(params: Params, capsys: pytest.CaptureFixture[str]) -> None:
    export(*extract(params, Pixels()), Path("exported"), 1000, lambda n: None)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (PROJECT / "docs/webdataset.md").read_text("utf-8"), re.DOTALL):
        exec(block, names)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(webdataset.WebDataset("exported/train-000000.tar", shardshuffle=False)))
    assert all("(16, 3)" in line for line in lines)
    assert names["embeddings"].shape == (len(names["captions"][0]), 6)


def test_the_command_exports_the_active_profile(params: Params) -> None:
    extract(params, Pixels())
    Path("params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    command = ["store", "export", "classes", "exported", "--format", "webdataset", "--per-shard", "7"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    tars = list(Path("exported").glob("*.tar"))
    assert f"exported: 60 pictures in {len(tars)} tars" in result.output and len(tars) >= 9
    assert "there already" in CliRunner().invoke(app, command).output


def test_the_same_bytes_each_time_and_neighbours_are_mixed(params: Params) -> None:
    features = extract(params, Pixels())
    paths = [export(*features, Path(name), 25, lambda n: None) for name in ("one", "two")]
    assert len(paths[0]) > 3
    assert [path.read_bytes() for path in paths[0]] == [path.read_bytes() for path in paths[1]]
    with tarfile.open(paths[0][0]) as tar:
        first = {name.partition("/")[0] for name in tar.getnames()[:20]}
    assert first == {"hot dog", "pear"}


def test_a_folder_with_something_in_it_is_left_alone(params: Params) -> None:
    features = extract(params, Pixels())
    Path("empty").mkdir()
    assert export(*features, Path("empty"), 100, lambda n: None)
    Path("file").write_text("mine")
    for taken in ("empty", "file"):
        with pytest.raises(UserError, match=f"{taken}: there already; name a new folder"):
            export(*features, Path(taken), 100, lambda n: None)
    assert Path("file").read_text() == "mine"


def test_a_failed_export_leaves_nothing(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = params.model_copy(update={"cache": params.cache.model_copy(update={"dtype": "float32"})})
    large = Pixels()
    large.scale = 1e4  # beyond float16's 65504
    images, captions = extract(wide, large)
    before = sorted(Path().iterdir())
    with pytest.raises(UserError, match="do not fit float16"):
        export(images, captions, Path("exported"), 100, lambda n: None)

    with pytest.raises(UserError, match="has image tokens, but no caption tokens"):
        with monkeypatch.context() as patch:
            patch.setattr(captions, "captions", {}.__getitem__)
            export(extract(params, Pixels())[0], captions, Path("exported"), 100, lambda n: None)

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(*extract(params, Pixels()), Path("exported"), 100, stop)
    assert sorted(Path().iterdir()) == before


IDS = ["42", "pear/0.JPG", "a.b/c.d", "../up", "/root", "%41", "é ñ", "x%2Ey", "__x__", "a//b", ".hidden", "a/.b/c"]


@pytest.mark.parametrize("row_id", IDS)
def test_any_id_survives_as_a_key(row_id: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(f"{key_of(row_id)}.captions.json"))
    (tmp_path / "one.tar").write_bytes(buffer.getvalue())
    (sample,) = webdataset.WebDataset(str(tmp_path / "one.tar"), shardshuffle=False)
    assert unquote(sample["__key__"]) == row_id and "captions.json" in sample
    assert key_of("42") == "42" and key_of("hot_dog/0001") == "hot_dog/0001", "plain ids stay as they are"
    assert not key_of(row_id).startswith("/") and ".." not in key_of(row_id)
