"""Exported features: the stock library reads back what the store holds, by the code that the documentation shows."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import fsspec
import numpy as np
import pandas as pd
import pytest
import torch
import webdataset
import yaml
from PIL import Image
from typer.testing import CliRunner

from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.extraction.captions import extract_captions
from pipeline.extraction.images import extract_images
from pipeline.runs import STORE, Run
from pipeline.sources import manifest as manifest_table
from pipeline.sources.prepare import prepare
from pipeline.store.reader import CaptionTokens, ImageTokens
from pipeline.store.webdataset import export, identity, key_of, open_tars, read_tars
from stages.cli import app

PROJECT = Path(__file__).parents[1]
RUN = Run("demo")
BASE = RUN.base


class Pixels:
    """An encoder whose tokens are pixels."""

    identity: ClassVar = {"encoder": "pixels"}

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image.resize((4, 4)), np.float32)).permute(2, 0, 1)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(2).transpose(1, 2)


class Noise(Pixels):
    """Tokens whose bits no type but the stored one holds."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().encode(pixels) * 1e3 / 7  # beyond the largest float16 for some


class Letters:
    """A tokenizer with a token for each letter."""

    added_tokens_decoder: dict[int, object] = {}  # noqa: RUF012
    is_fast = True

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
    values["data"]["classes"] = {"task": "classify", "source": "imagefolder", "root": "set", "validation": 0.2}
    params = Params.model_validate(values)
    manifest_table.write(prepare(params, "classes"), Run.of(params).manifest("classes"))
    return params


def extract(params: Params, encoder: Any, data: str = "classes") -> tuple[ImageTokens, CaptionTokens]:
    run = Run.of(params)
    extract_images(params, data, encoder, lambda n: None).write(run.features("images", data))
    torch.manual_seed(0)
    words = extract_captions(params, data, Letters(), torch.nn.Embedding(128, 6), lambda n: None)
    words.write(run.features("text", data))
    return ImageTokens.open(run, data), CaptionTokens.open(run, data)


def test_the_library_reads_back_what_the_store_holds(params: Params) -> None:
    images, captions = extract(params, Pixels())
    done: list[int] = []
    shards = export(images, captions, "x", Path("deep/er/exported"), 10, done.append)
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
            assert sample["tokens.npy"].dtype == np.float16, "as the store keeps them"
            expected = images.tokens([images.ids.index(row_id)])[0].numpy()
            np.testing.assert_array_equal(sample["tokens.npy"], expected)
            assert sample["captions.json"] == captions.captions(row_id)
            ids = sample["captions.json"][0]
            np.testing.assert_array_equal(table[np.searchsorted(token_ids, ids)], captions.embeddings(ids).numpy())


def test_the_documented_lines_run(params: Params, capsys: pytest.CaptureFixture[str]) -> None:
    export(*extract(params, Pixels()), "x", Path("exported"), 1000, lambda n: None)
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
    paths = [export(*features, "x", Path(name), 25, lambda n: None) for name in ("one", "two")]
    assert len(paths[0]) > 3
    assert [path.read_bytes() for path in paths[0]] == [path.read_bytes() for path in paths[1]]
    with tarfile.open(paths[0][0]) as tar:
        first = {name.partition("/")[0] for name in tar.getnames()[:20]}
    assert first == {"hot dog", "pear"}


def test_a_folder_with_something_in_it_is_left_alone(params: Params) -> None:
    features = extract(params, Pixels())
    Path("empty").mkdir()
    assert export(*features, "x", Path("empty"), 100, lambda n: None)
    Path("file").write_text("mine")
    for taken in ("empty", "file"):
        with pytest.raises(UserError, match=f"{taken}: there already; name a new folder"):
            export(*features, "x", Path(taken), 100, lambda n: None)
    assert Path("file").read_text() == "mine"


def test_a_failed_export_leaves_nothing(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    _, captions = extract(params, Pixels())
    before = sorted(Path().iterdir())
    with pytest.raises(UserError, match="has image tokens, but no caption tokens"):
        with monkeypatch.context() as patch:
            patch.setattr(captions, "captions", {}.__getitem__)
            export(extract(params, Pixels())[0], captions, "x", Path("exported"), 100, lambda n: None)

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(*extract(params, Pixels()), "x", Path("exported"), 100, stop)
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


def test_any_id_is_found_in_a_tar(tmp_path: Path) -> None:
    ids = sorted([*IDS, *(f"{'deep/' * 30}{number}" for number in range(3))])
    numbers = np.random.default_rng(0).standard_normal((len(ids), 2, 3), np.float32)
    rows = pd.DataFrame({"id": ids, "split": "train"})
    images = ImageTokens(rows, (2, 3), "float32", lambda positions: {"tokens": numbers[positions]})
    captions = CaptionTokens({row_id: [[7]] for row_id in ids}, np.array([7]), torch.zeros(1, 4))
    export(images, captions, "x", tmp_path / "tars", 4, lambda n: None)
    read, _ = read_tars(str(tmp_path / "tars"), "x", "")
    assert read.ids == ids
    for position in range(len(ids)):
        np.testing.assert_array_equal(read.tokens([position])[0], numbers[position])


def with_cache(params: Params, **values: Any) -> Params:
    return params.model_copy(update={"cache": params.cache.model_copy(update=values)})


@pytest.fixture
def bucket() -> Iterator[str]:
    """A place that is read by requests of byte ranges."""
    yield "memory://bucket"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("dtype", "kept"), [("float16", "<f2"), ("bfloat16", "<f4"), ("int8", "<f4"), ("float32", "<f4")]
)
def test_tars_give_what_the_store_gives(params: Params, bucket: str, dtype: str, kept: str) -> None:
    """The same bits, from a folder and from a URL, and without the store."""
    params = with_cache(params, dtype=dtype)
    images, captions = extract(params, Pixels() if dtype == "float16" else Noise())
    tars = export(images, captions, identity(RUN, "classes"), BASE / "webdataset/classes", 13, lambda n: None)
    with tarfile.open(tars[0]) as tar:
        assert f"'descr': '{kept}'".encode() in (tar.extractfile(tar.getnames()[0]) or io.BytesIO()).read(128)
    fsspec.filesystem("memory").put(str(BASE / "webdataset"), "/bucket", recursive=True)
    order = np.random.default_rng(0).permutation(len(images.ids)).tolist()
    expected, table = images.tokens(order), captions.table.clone()
    shutil.rmtree(STORE)
    for place in (None, bucket):
        read, words = open_tars(with_cache(params, tars=place), "classes")
        assert read.ids == images.ids and read.shape == images.shape
        assert all(read.split(split) == images.split(split) for split in ("train", "val", "test"))
        assert torch.equal(read.tokens(order), expected)
        assert [words.captions(row_id) for row_id in read.ids] == [captions.captions(row_id) for row_id in images.ids]
        assert words.token_ids.tolist() == captions.token_ids.tolist() and torch.equal(words.table, table)


def test_pretraining_has_the_same_losses_from_tars(tiny_params: Params) -> None:
    values = tiny_params.model_dump(mode="json")
    for data in tiny_params.run.data:
        manifest_table.write(prepare(tiny_params, data), Run.of(tiny_params).manifest(data))
        extract(tiny_params, Pixels(), data)
        run("store", "export", data, f"data/tiny/webdataset/{data}", "--per-shard", "7")
    out, kept = Path("data/tiny/pretrain/mlp"), ("history.csv", "metrics.json", "last.safetensors", "first.safetensors")
    run("pretrain", "mlp")
    from_store = {name: (out / name).read_bytes() for name in kept}
    shutil.rmtree(out)
    shutil.rmtree(STORE)
    values["cache"]["reader"] = "webdataset"
    Path("params.yaml").write_text(yaml.safe_dump(values))
    run("pretrain", "mlp")
    assert {name: (out / name).read_bytes() for name in kept} == from_store
    assert len(from_store["history.csv"].splitlines()) == 4

    shutil.rmtree("data/tiny/webdataset/captions")
    fault = "captions/index.parquet: no such file; delete data/tiny/webdataset/captions, if it is there, and run " \
        "`terraalign store export captions data/tiny/webdataset/captions`"  # fmt: skip
    assert fault in run("pretrain", "mlp", code=2)


def run(*command: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, command)
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return " ".join(result.output.split())


def cut(folder: Path) -> None:
    content = (folder / "train-000001.tar").read_bytes()
    (folder / "train-000001.tar").write_bytes(content[:3000])


def remove(folder: Path) -> None:
    (folder / "train-000001.tar").unlink()


def other_order(folder: Path) -> None:
    """Tars of the same size with each other's names."""
    one, two = folder / "train-000000.tar", folder / "train-000001.tar"
    assert one.stat().st_size == two.stat().st_size
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)


def other_tar(folder: Path) -> None:
    """The tar of an export of other features of the same pictures, sizes and names."""
    (folder / "train-000001.tar").write_bytes(Path("other/train-000001.tar").read_bytes())


def other_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    Path("other").rename(folder)


def no_index(folder: Path) -> None:
    (folder / "index.parquet").write_bytes(b"PAR1")


def no_table(folder: Path) -> None:
    path = folder / "embeddings.npy"
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"train-000001.tar: has 3000 bytes instead of \d+"),
        (remove, r"train-000001.tar: no such file"),
        (other_order, r"train-00000[01].tar: damaged or of another export at \S+"),
        (other_tar, r"train-000001.tar: damaged or of another export at \S+"),
        (other_folder, r"index.parquet: of other features than the profile's manifests name"),
        (no_index, r"index.parquet: not a whole Parquet file"),
        (no_table, r"embeddings.npy: not a whole .npy file"),
    ],
)
def test_missing_cut_and_foreign_tars_are_named(params: Params, damage: Any, message: str) -> None:
    features, folder = extract(params, Pixels()), BASE / "webdataset/classes"
    export(*features, "another", Path("other"), 10, lambda n: None)
    export(*features, identity(RUN, "classes"), folder, 10, lambda n: None)
    damage(folder)
    with pytest.raises(
        UserError, match=rf"^{folder}/{message}.*; delete {folder}, .* `terraalign store export classes"
    ):
        images, _ = open_tars(params, "classes")
        images.tokens(images.split("train"))
