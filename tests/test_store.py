"""The feature store: what is made anew after a change, how damage is found and mended, and copies elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import sources
from pipeline.backbones.vision import load_vision_encoder
from pipeline.extract import extract_captions, extract_images
from pipeline.params import Params
from pipeline.store.shards import STORE, Manifest, manifest_path, read_record

BASE = Path("data/tiny")


class Counting:
    """A cheap encoder that counts the pictures it encodes; `name` tells two of them apart."""

    def __init__(self, name="one", by_place=False):
        self.identity = {"encoder": name}
        self.pictures, self.by_place = 0, by_place

    def preprocess(self, image):
        return torch.from_numpy(np.asarray(image.resize((8, 8)), np.float32)).permute(2, 0, 1) / 255

    def encode(self, pixels):
        self.pictures += int((pixels.flatten(1).any(1)).sum())
        place = torch.arange(len(pixels)).view(-1, 1, 1) if self.by_place else 0
        return pixels.flatten(2).transpose(1, 2) - 0.5 + place


@pytest.fixture
def pictures(tiny_params: Params) -> Params:
    """Twenty pictures of noise in two classes, prepared; three shards."""
    generator = np.random.default_rng(0)
    for i in range(20):
        path = Path(f"pictures/class{i % 2}/{i:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (24, 24, 3), np.uint8)).resize((64, 64)).save(path)
    params = tiny_params.model_dump()
    params["data"]["classes"] |= {"source": "imagefolder", "root": "pictures", "count": None}
    return prepare(Params.model_validate(params))


def prepare(params: Params) -> Params:
    sources.write(sources.prepare(params, "classes"), sources.manifest_path(params, "classes"))
    return params


def extract(params: Params, encoder) -> Manifest:
    manifest = extract_images(params, "classes", encoder, lambda n: None)
    manifest.write(manifest_path(BASE, "images", "classes"))
    return manifest


def contents(manifest: Manifest) -> dict[str, bytes]:
    return {shard.name: (manifest.folder / shard.name).read_bytes() for shard in manifest.files}


def edit(name: str) -> None:
    with Image.open(name) as picture:
        Image.eval(picture, lambda x: 255 - x).save(name)


@pytest.mark.parametrize("real", [False, True], ids=["cheap", "resnet10t"])
@pytest.mark.parametrize("change", ["edit", "add", "remove", "rename"])
def test_a_changed_picture_is_all_that_is_encoded(pictures, change, real, monkeypatch):
    encoder = load_vision_encoder(pictures.vision) if real else Counting()
    before = extract(pictures, encoder)
    victim = Path("pictures/class1/07.png")
    if change == "edit":
        edit(victim)
    elif change == "add":
        shutil.copy("pictures/class0/04.png", "pictures/class0/new.png")
        edit("pictures/class0/new.png")
    elif change == "remove":
        victim.unlink()
    else:
        victim.rename("pictures/class1/other.png")
    prepare(pictures)
    after = extract(pictures, encoder)
    new = set(contents(after)) - set(contents(before))
    assert len(new) <= (2 if change == "rename" else 1), "only the shards concerned are made"
    made = [read_record(after.folder / name)[1] for name in new]
    assert sum(one["encoded"] for one in made) == (1 if change in ("edit", "add") else 0)
    incremental = contents(after)
    shutil.rmtree(STORE)
    assert contents(extract(pictures, encoder)) == incremental, "the bytes are those of an extraction from nothing"


def test_rows_of_an_encoder_that_minds_the_place_are_not_copied(pictures, capsys):
    encoder = Counting(by_place=True)
    extract(pictures, encoder)
    edit("pictures/class1/07.png")
    prepare(pictures)
    incremental = contents(extract(pictures, encoder))
    assert "no row is copied" in capsys.readouterr().err
    shutil.rmtree(STORE)
    assert contents(extract(pictures, encoder)) == incremental


def test_a_damaged_shard_gives_no_rows(pictures):
    encoder = Counting()
    before = extract(pictures, encoder)
    for name in contents(before):
        flip(before.folder / name, -2000)
    edit("pictures/class1/07.png")
    prepare(pictures)
    after = extract(pictures, encoder)
    [new] = set(contents(after)) - set(contents(before))
    assert read_record(after.folder / new)[1]["copied"] == 0
    kept = [shard for shard in after.shards if shard in before.shards]
    assert len(kept) == 2, "a manifest made anew does not take the damage for the truth"


def flip(path: Path, at: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.chmod(0o644)
    path.write_bytes(content)


def test_back_to_an_earlier_encoder_costs_nothing(pictures):
    first, second = Counting("one"), Counting("two")
    before = extract(pictures, first)
    extract(pictures, second)
    assert first.pictures == second.pictures == 20
    assert extract(pictures, first) == before
    assert first.pictures == 20


def test_a_changed_caption_makes_its_shard_alone(tiny_params, tiny_llm):
    path = sources.manifest_path(tiny_params, "captions")
    table = sources.prepare(tiny_params, "captions")
    sources.write(table, path)
    before = extract_captions(tiny_params, "captions", *tiny_llm, lambda n: None)
    kept = {shard.name: (before.folder / shard.name).stat().st_mtime_ns for shard in before.shards}
    captions = table["captions"].to_pylist()
    captions[3][0] = "something else altogether"
    sources.write(table.set_column(table.column_names.index("captions"), table.field("captions"), [captions]), path)
    after = extract_captions(tiny_params, "captions", *tiny_llm, lambda n: None)
    assert len({shard.name for shard in after.shards} - set(kept)) == 1
    assert sum((after.folder / name).stat().st_mtime_ns == time for name, time in kept.items()) == 3
    incremental = contents(after)
    shutil.rmtree(STORE)
    assert contents(extract_captions(tiny_params, "captions", *tiny_llm, lambda n: None)) == incremental


@pytest.fixture
def tiny_llm(tiny_params):
    from pipeline.backbones.llm import load_embedding, load_tokenizer

    return load_tokenizer(tiny_params.llm), load_embedding(tiny_params.llm)
