"""Parts that are carved: by the hash of an id, or in blocks, so that a series of shots is not on both sides."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.extraction import near
from pipeline.extraction.near import near_pictures, series_of
from pipeline.sources import split
from pipeline.sources.prepare import prepare
from pipeline.sources.rows import SHARES, Found, Row
from pipeline.store.reader import ImageTokens
from stages import cli

DEMO = yaml.safe_load((Path(__file__).parents[1] / "profiles" / "demo.yaml").read_text(encoding="utf-8"))
VAL = {"val": 0.1, "train": 0.9}


def row(at: str, label: str | None = None, group: str | None = None) -> Row:
    return Row(at, Path(at), [], label, group=group)


def shots(name: str, count: int, label: str | None = None) -> list[Row]:
    return [row(f"{name}/img_{i}", label or name) for i in range(count)]


def held_out(rows: list[Row], parts: dict[str, str], part: str = "val") -> list[int]:
    """The numbers at the ends of the ids of a part, sorted."""
    return sorted(int(one.id.rpartition("_")[2]) for one in rows if parts[one.id] == part)


def test_a_small_class_has_one_block_of_consecutive_pictures_in_the_order_people_count() -> None:
    for name in ("apple", "pear", "plum", "fig", "date"):
        rows = shots(name, 120)
        held = held_out(rows, split.in_blocks(reversed(rows), VAL))
        assert 12 <= len(held) <= 13
        assert held == list(range(held[0], held[0] + len(held))), "img_2 before img_10"


def test_a_large_set_has_several_blocks_of_the_asked_size_in_each_part() -> None:
    rows = [row(f"img_{i}") for i in range(4000)]
    parts = split.in_blocks(rows, SHARES)
    counts = Counter(parts.values())
    assert [counts[part] for part in ("train", "val", "test")] == pytest.approx([2800, 600, 600], abs=2)
    held = held_out(rows, parts)
    edges = sum(b - a > 1 for a, b in pairwise(held)) + 1
    assert 5 <= edges <= 60, "stretches: neither one alone nor single pictures"


def test_every_class_keeps_a_picture_for_training_and_small_ones_have_their_share_together() -> None:
    rows = [one for i in range(300) for one in shots(f"class{i}", 1 + i % 4)]
    parts = split.in_blocks(rows, {"test": 0.3, "val": 0.49, "train": 0.21})
    trained = {one.label for one in rows if parts[one.id] == "train"}
    assert trained == {f"class{i}" for i in range(300)}
    few = [one for i in range(300) for one in shots(f"class{i}", 4)]
    counts = Counter(split.in_blocks(few, VAL).values())
    assert counts["val"] == pytest.approx(120, abs=25)


def test_a_group_is_wholly_on_one_side_even_with_pictures_of_several_classes() -> None:
    rng = np.random.default_rng(0)
    rows = [row(f"img_{i}", f"class{rng.integers(5)}", f"visit{i % 60}") for i in range(1500)]
    parts = split.in_blocks(rows, VAL)
    sides: dict[str | None, set[str]] = {}
    for one in rows:
        sides.setdefault(one.group, set()).add(parts[one.id])
    assert all(len(there) == 1 for there in sides.values())
    assert 0.05 < Counter(parts.values())["val"] / 1500 < 0.2
    assert split.in_blocks([row(f"img_{i}", "x", "one visit") for i in range(50)], VAL) == {
        f"img_{i}": "train" for i in range(50)
    }, "one group alone is for training"


def test_an_added_picture_moves_few_others_and_the_order_of_reading_none() -> None:
    rows = [one for name in ("apple", "pear", "plum") for one in shots(name, 200)]
    before = split.in_blocks(rows, VAL)
    assert split.in_blocks(reversed(rows), VAL) == before
    moved = []
    for i in range(30):
        after = split.in_blocks([*rows, row(f"apple/img_{7 * i}b", "apple")], VAL)
        assert all(after[one.id] == before[one.id] for one in rows if one.label != "apple"), "nor any other class"
        moved.append(sum(after[one.id] != before[one.id] for one in rows))
    assert np.median(moved) <= 2


def test_hash_is_as_ever_and_rows_with_a_part_keep_it() -> None:
    given = replace(row("z", "a"), split="test")
    rows, remarks = split.assign(Found([given, *shots("a", 50)], shares=VAL), "hash", "data.x")
    assert rows[0].split == "test" and not remarks
    assert {one.split for one in rows[1:]} == {"train", "val"}
    assert [one.split for one in rows[1:]] == [split.by_hash(one.id, VAL) for one in rows[1:]]
    with pytest.raises(UserError, match=r"data\.x\.split blocks: this source gives the part of every picture"):
        split.assign(Found([given]), "blocks", "data.x")


def test_ids_with_numbers_beyond_all_measure_are_sorted() -> None:
    rows = [row(f"{'0' * (i % 3)}{'1' + '0' * 5000}_{i}") for i in range(120)]  # int() takes 4,300 digits
    held = held_out(rows, split.in_blocks(rows, VAL))
    assert held == list(range(held[0], held[0] + len(held))), "leading zeros say nothing"


def params(name: str, **section: Any) -> Params:
    task = {"captions": "caption", "classes": "classify"}[name]
    data = {**DEMO["data"], name: {"task": task, "max_broken": 0.1, "split": "blocks", **section}}
    return Params.model_validate({**DEMO, "data": data})


def png(colour: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 24), (colour % 256, 80, 160)).save(stream, "PNG")  # of any name; no two are the same
    return stream.getvalue()


def food101(root: Path) -> None:
    """Two classes of 40 pictures for training and 5 for the test."""
    keys = [f"{name}/img_{i}" for name in ("fig", "pear") for i in range(45)]
    (root / "meta").mkdir(parents=True)
    for name in ("classes", "labels"):
        (root / f"meta/{name}.txt").write_text("fig\npear\n")
    test = [key for key in keys if int(key.rpartition("_")[2]) >= 40]
    (root / "meta/test.txt").write_text("\n".join(test))
    (root / "meta/train.txt").write_text("\n".join(key for key in keys if key not in test))
    for i, key in enumerate(keys):
        path = root / f"images/{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))


def numbers(table: list[dict[str, Any]], part: str, under: str = "") -> list[int]:
    ids = [one["id"].removesuffix(".jpg") for one in table if one["split"] == part and one["id"].startswith(under)]
    return sorted(int(one.rpartition("_")[2]) for one in ids)


@pytest.mark.usefixtures("project")
def test_folders_of_classes_keep_their_test_part_and_hold_out_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    food101(Path("set"))
    table = prepare(params("classes", source="food101", root="set"), "classes").to_pylist()
    for name in ("fig", "pear"):
        held = numbers(table, "val", name)
        assert len(held) in (4, 5) and held == list(range(held[0], held[0] + len(held)))
        assert numbers(table, "test", name) == list(range(40, 45))
    Path("set/parts").mkdir()
    Path("set/images").rename("set/parts/train")
    table = prepare(params("classes", source="imagefolder", root="set/parts"), "classes").to_pylist()
    for part, least in (("val", 4), ("test", 6)):
        held = numbers(table, part, "train/fig")
        assert least <= len(held) <= least + 1, "of 45"
    assert "val is 10 % of train, by blocks; test is 15 % of train, by blocks" in capsys.readouterr().err


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("source", ["coco", "webdataset"])
def test_groups_of_captioned_pictures_stay_together(source: str) -> None:
    ids = [f"{i:03d}" for i in range(90)]
    if source == "coco":
        Path("set/images").mkdir(parents=True)
        for i, one in enumerate(ids):
            Path(f"set/images/{one}.jpg").write_bytes(png(9 if i == 10 else i))
        images = [{"id": one, "file_name": f"{one}.jpg", "group": i % 9} for i, one in enumerate(ids)]
        texts = [{"id": i, "image_id": one, "caption": "a thing"} for i, one in enumerate(ids)]
        Path("set/captions.json").write_text(json.dumps({"images": images, "annotations": texts}))
        section = {"root": "set"}
    else:
        with tarfile.open("a.tar", "w") as tar:
            for i, one in enumerate(ids):
                text = json.dumps({"caption": "a thing", "group": i % 9}).encode()
                for ending, content in (("jpg", png(9 if i == 10 else i)), ("json", text)):
                    member = tarfile.TarInfo(f"{one}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        section = {"shards": "a.tar"}
    table = prepare(params("captions", source=source, **section), "captions").to_pylist()
    used = [one for one in table if not one["quarantine"]]
    parts = [{one["split"] for one in used if int(one["id"]) % 9 == group} for group in range(9)]
    assert all(len(part) == 1 for part in parts)
    assert table[10]["sha256"] == table[9]["sha256"] and len(used) == 89
    assert table[10]["quarantine"] == f"has the bytes of {table[9]['image']}, which is in another part than its group"
    assert set.union(*parts) == {"train", "val", "test"}


def tokens_of(vectors: np.ndarray, parts: list[str]) -> ImageTokens:
    """Image tokens [n, 2, D] as if they were in the store."""
    rows = pd.DataFrame({"id": [str(i) for i in range(len(parts))], "label": None, "split": parts})
    stored = np.repeat(vectors[:, None].astype(np.float32), 2, axis=1)
    return ImageTokens(rows, stored.shape[1:], "float32", lambda at: {"tokens": stored[at]})


def test_pictures_of_one_series_on_both_sides_are_counted() -> None:
    rng = np.random.default_rng(0)
    train = rng.normal(size=(200, 64)) + 5
    val = np.concatenate([train[:30] + 0.1 * rng.normal(size=(30, 64)), rng.normal(size=(70, 64)) + 5])
    images = tokens_of(np.concatenate([train, val]), ["train"] * 200 + ["val"] * 100)
    assert near_pictures(images) == {"val": (30, 100), "test": (0, 0)}


@pytest.mark.usefixtures("project")
def test_what_is_near_is_kept_for_the_page_and_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    shot = np.random.default_rng(0).normal(size=(60, 64)) + 5
    images = tokens_of(np.concatenate([shot, shot[:10], -shot[10:20]]), ["train"] * 60 + ["val"] * 10 + ["test"] * 10)
    monkeypatch.setattr(ImageTokens, "open", lambda run, data: images)
    found = params("classes", source="imagefolder", root="set", split="hash")
    said = near.look(found, "classes")
    assert said is not None and "for training, as shots of a series are: 10 of 10 in val; figures there promise" in said
    assert "set data.classes.split to blocks; if that does not help, `terraalign series classes` finds series" in said
    assert json.loads(Path("data/demo/images/classes/near.json").read_text()) == {"val": [10, 10], "test": [0, 10]}


@pytest.mark.usefixtures("project")
def test_series_are_listed_with_the_lines_that_keep_them_on_one_side(monkeypatch: pytest.MonkeyPatch) -> None:
    shot = np.repeat(np.random.default_rng(0).normal(size=(4, 64)) + 5, 5, axis=0)
    monkeypatch.setattr(ImageTokens, "open", lambda run, data: tokens_of(shot, ["train"] * 20))
    data = {**DEMO["data"], "classes": {"task": "classify", "source": "imagefolder", "root": "set"}}
    Path("profiles").mkdir()
    for path in ("params.yaml", "profiles/demo.yaml"):
        Path(path).write_text(yaml.safe_dump({**DEMO, "data": data}))

    def said(*options: str) -> str:
        return CliRunner().invoke(cli.app, ["series", "classes", *options]).output.replace("\n", " ")

    first = {"split": "blocks", "groups": "data/demo/series/classes.csv"}
    found = "data/demo/series/classes.csv: 20 pictures in 4 series "
    assert said() == (
        f"{found}to keep each on one side, have data.classes.split: blocks and data.classes.groups: "
        f"{first['groups']} in profiles/demo.yaml and params.yaml: `terraalign series classes --use`, "
        "then `terraalign run` "
    )
    used = "profiles/demo.yaml and params.yaml keep each on one side now; next: `terraalign run` "
    assert said("--use") == found + used
    for path in ("params.yaml", "profiles/demo.yaml"):
        wanted = {**DEMO, "data": {**data, "classes": {**data["classes"], **first}}}
        assert yaml.safe_load(Path(path).read_text()) == wanted
    assert " and data.classes.seen: " in said(), (
        "the rest is there; with another text DVC has prepare read the file again"
    )
    Path("profiles/demo.yaml").write_text(yaml.safe_dump({**DEMO, "data": data}))  # as where params.yaml alone has them
    said("--use")
    for path in ("params.yaml", "profiles/demo.yaml"):
        section = yaml.safe_load(Path(path).read_text())["data"]["classes"]
        assert isinstance(section.pop("seen"), str) and section == {**data["classes"], **first}
    assert pd.read_csv("data/demo/series/classes.csv")["group"].tolist() == [i - i % 5 for i in range(20)]


def test_series_are_found_within_a_class_by_their_tokens() -> None:
    rng = np.random.default_rng(0)
    shot = np.repeat(rng.normal(size=(40, 64)) + 5, 5, axis=0) + 0.1 * rng.normal(size=(200, 64))
    images = tokens_of(shot, ["train"] * 200)
    assert series_of(images) == [str(i - i % 5) for i in range(200)]
    images.rows["label"] = ["a", "a", "a", "a", "b"] * 40
    assert series_of(images) == [str(i - i % 5) if i % 5 < 4 else str(i) for i in range(200)], "another class: another"
    assert series_of(images, 1.0) == images.ids, "none is as near as that"


@pytest.mark.usefixtures("project")
def test_classes_of_one_series_are_told_before_validation_lacks_them(monkeypatch: pytest.MonkeyPatch) -> None:
    near = np.repeat([[9.0, 0.1], [0.1, 9.0]], 10, axis=0) + np.random.default_rng(0).normal(size=(20, 2))
    images = tokens_of(near, ["train"] * 20)
    images.rows["label"] = ["fig"] * 10 + ["pear"] * 10
    monkeypatch.setattr(ImageTokens, "open", lambda run, data: images)
    data = DEMO["data"] | {"classes": {"task": "classify", "source": "imagefolder", "root": "set"}}
    Path("params.yaml").write_text(yaml.safe_dump(DEMO | {"data": data}))

    def said(*options: str) -> str:
        return " ".join(CliRunner().invoke(cli.app, ["series", "classes", *options]).output.split())

    told = "all pictures for training of 2 classes are one series, so validation would have none of them: fig, pear"
    assert f"in 2 series {told}; `terraalign series classes --cosine 0.85` finds shorter ones" in said()
    assert "`terraalign series classes --cosine 0.6 --use`" in said("--cosine", "0.6")
    assert "one series" not in said("--cosine", "1")
    images.rows["label"] = pd.Series([None] * 10 + ["pear"] * 10, dtype="str")  # as pictures with captions have none
    assert "of 1 class are one series, so validation would have none of them: pear;" in said()


@pytest.mark.usefixtures("project")
def test_a_file_of_groups_serves_any_source_and_its_faults_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    food101(Path("set"))
    lines = [f"{name}/img_{i},{i % 4}" for name in ("fig", "pear") for i in range(40)]
    Path("groups.csv").write_text("\n".join(["id,group", *lines]))
    section = {"source": "food101", "root": "set", "groups": "groups.csv", "validation": 0.25}
    table = prepare(params("classes", **section), "classes").to_pylist()
    for name in ("fig", "pear"):
        assert len({i % 4 for i in numbers(table, "val", name)}) == 1, "one whole group of four"
        assert len(numbers(table, "val", name)) == 10
    assert "groups.csv" not in capsys.readouterr().err
    Path("groups.csv").write_text(
        "\n".join(["id,group", *(f"{name}/img_{i},{name}" for name in ("fig", "pear") for i in range(40))])
    )
    prepare(params("classes", **section), "classes")
    said = "2 of 2 classes are one group each, which stays in training, so they have no validation pictures: fig, pear"
    assert said in capsys.readouterr().err
    Path("groups.csv").write_text("\n".join(["id,group", *lines]))
    Path("set/meta/train.txt").write_text(Path("set/meta/train.txt").read_text() + "\nfig/new\npear/broken")
    Path("set/images/fig/new.jpg").write_bytes(png(99))
    Path("set/images/pear/broken.jpg").write_bytes(b"no picture")
    prepare(params("classes", **section), "classes")
    said = "data.classes: 1 picture is not in groups.csv, and so in no series: fig/new; add it to the file\n"
    assert said in capsys.readouterr().err, "of those that can be used, and are no test pictures"
    for text, fault in (
        ("id,series\n1,2", "a CSV file of the columns id and group"),
        ("id,group\n1,2", "no id of this"),
    ):
        Path("groups.csv").write_text(text)
        with pytest.raises(UserError, match=fault):
            prepare(params("classes", **section), "classes")
