"""WebDataset tars: read as the library that defines them does, byte for byte, and refused by name where unsafe."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import webdataset
import yaml
from PIL import Image
from rich.progress import Progress
from typer.testing import CliRunner

from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.extraction.images import extract_images
from pipeline.media import pictures
from pipeline.needs import Need
from pipeline.report.sections import thumbnail
from pipeline.runs import Run
from pipeline.sources import coco
from pipeline.sources import prepare as reading
from pipeline.store.reader import ImageTokens
from stages import cli

DEMO = yaml.safe_load((Path(__file__).parents[1] / "profiles" / "demo.yaml").read_text(encoding="utf-8"))
SILENT = Progress(disable=True)
pytestmark = pytest.mark.usefixtures("project")


def params(data: str = "captions", **section: Any) -> Params:
    task = "caption" if data == "captions" else "classify"
    chosen = {"task": task, "source": "webdataset", "shards": "set/*.tar", "max_broken": 0.5, **section}
    return Params.model_validate({**DEMO, "data": {**DEMO["data"], data: chosen}})


def prepare(data: Any = "captions", **section: Any) -> dict[str, dict[str, Any]]:
    rows = reading.prepare(params(data, **section), data).to_pylist()
    return {row["id"]: row for row in rows}


def fault(data: Any = "captions", **section: Any) -> str:
    """The one line that `prepare` fails with."""
    with pytest.raises(UserError) as caught:
        prepare(data, **section)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def jpeg(number: int = 0, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), (number * 5 % 256, 80, 160)).save(buffer, form)
    return buffer.getvalue()


def write(path: str, samples: list[dict[str, Any]]) -> Path:
    """A shard by the library's own writer."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(path) as writer:
        for sample in samples:
            writer.write(sample)
    return Path(path)


def captioned(numbers: range) -> list[dict[str, Any]]:
    """As img2dataset writes them: the caption in txt and, among other things, in json."""
    return [
        {"__key__": f"{n:09d}", "jpg": jpeg(n), "txt": f"Picture {n}", "json": {"caption": f"Picture {n}", "url": "?"}}
        for n in numbers
    ]


def pack(path: str, *members: tuple[Any, bytes]) -> Path:
    """A tar of any members, by the standard library: (name or TarInfo, content)."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member, content in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return Path(path)


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, standing in for object storage."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def test_the_same_pictures_and_captions_as_the_library_reads() -> None:
    write("set/00000.tar", captioned(range(30)))
    write("set/00001.tar", captioned(range(30, 50)))
    rows = prepare()
    library = webdataset.WebDataset([f"set/0000{i}.tar" for i in (0, 1)], shardshuffle=False)
    theirs = {sample["__key__"]: sample for sample in library}
    assert rows.keys() == theirs.keys() and len(rows) == 50
    for key, sample in theirs.items():
        assert pictures.read(rows[key]["image"]) == sample["jpg"]
        assert rows[key]["sha256"] == hashlib.sha256(sample["jpg"]).hexdigest()
        assert rows[key]["captions"] == [sample["txt"].decode()]
        assert rows[key]["split"] == coco.split_of(key) and rows[key]["label"] is None
    assert rows["000000000"]["image"].startswith("set/00000.tar#"), "relative to the project folder"
    few, more = prepare(count=10), prepare(count=20)
    assert len(few) == 10 and few.keys() < more.keys() < rows.keys()


def test_captions_of_json_and_txt_are_joined_and_faults_quarantined(capsys: pytest.CaptureFixture[str]) -> None:
    texts: dict[str, dict[str, Any]] = {
        "list": {"json": {"captions": [" one ", "two", "one"]}, "txt": "two"},
        "both": {"json": {"captions": ["one"], "caption": "two"}, "txt": "three\nin two lines\n"},
        "failed": {"json": {"caption": None, "status": "failed"}, "txt": ""},
        "latin": {"txt": b"caf\xe9"},
        "broken": {"json": b'{"caption": '},
        "deep": {"json": b"[" * 100_000},
        "array": {"json": b"[]"},
        "number": {"json": {"caption": 5}},
        "word": {"json": {"captions": "one"}},
        "long": {"txt": "x" * (2**20 + 1)},
        "alone": {},
    }
    write("set/0.tar", [{"__key__": key, "png": jpeg(1, "PNG"), **text} for key, text in texts.items()])
    rows = prepare(max_broken=0)
    assert rows["list"]["captions"] == ["one", "two"]
    assert rows["both"]["captions"] == ["one", "two", "three\nin two lines"]
    reasons = {key: row["quarantine"] for key, row in rows.items() if row["quarantine"]}
    assert reasons == {
        "failed": "no caption",
        "alone": "no caption",
        "latin": "its txt is not UTF-8 text",
        "broken": "its json is not valid JSON",
        "deep": "its json is not valid JSON",
        "array": "its json is no object",
        "number": "a caption in its json is no text",
        "word": '"captions" in its json is no list',
        "long": "its txt is over 1048576 bytes long",
    }
    assert "9 of 11 left out" in capsys.readouterr().err


def test_keys_are_those_of_the_library() -> None:
    """Folders, several dots, capitals, hidden and meta members."""
    names = ["a/b.c/0.JPG", "a/b.c/0.txt", "plain.webp", "plain.TXT", "x.y.jpg", "x.txt", "__meta__/m.jpg", "none"]
    path = pack("set/0.tar", *((name, jpeg(form="WEBP") if "webp" in name else jpeg()) for name in names))
    theirs = {
        sample["__key__"]
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
        if {"jpg", "webp"} & sample.keys()
    }
    text = b"A caption"
    pack(
        "set/0.tar", *((n, text if n.lower().endswith("txt") else jpeg()) for n in [*names, "._plain.jpg", ".DS_Store"])
    )
    rows = prepare()
    assert rows.keys() == theirs == {"a/b.c/0", "plain"}
    assert all(row["captions"] == ["A caption"] for row in rows.values())
    pack("set/0.tar", ("./a.txt", text), ("./b.jpg", jpeg()), (special(".", tarfile.DIRTYPE), b""), ("./a.jpg", jpeg()))
    assert prepare()["a"]["captions"] == ["A caption"], "as `tar cf x.tar .` packs them, in any order"


def listing(data: str = "captions") -> dict[str, str]:
    """What the listing says: member, key or picture below the shard's folder -> reason."""
    with Path(f"data/demo/quarantine/{data}.csv").open(encoding="utf-8", newline="") as file:
        return {row["image"].removeprefix(f"{Path.cwd()}/"): row["reason"] for row in csv.DictReader(file)}


def test_dots_in_names_lose_no_picture(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"IMG_{i}" + (".5x" if i % 3 == 0 else "") for i in range(12)]
    names += ["IMG_1.5x", "d.ir/v1.2.final", "DSC.0001"]  # the last two: beside another picture, and in a folder
    pack("set/0.tar", *((f"{n}{end}", body) for n in names for end, body in ((".jpg", jpeg()), (".txt", b"a square"))))
    rows = prepare()
    assert rows.keys() == set(names)
    assert all(pictures.read(row["image"]) == jpeg() for row in rows.values())
    assert not Path("data/demo/quarantine/captions.csv").exists()
    pack(
        "set/0.tar", ("a.jpg", jpeg()), ("a.txt", b"x"), ("a.left.jpg", jpeg()), ("a.depth.npy", b"1"),
        ("b.5x.jpg", jpeg()), ("b.txt", b"x"), ("c.5x.txt", b"x"), ("README", b"x"),
    )  # fmt: skip
    assert prepare().keys() == {"a"}
    dotted = "with a second dot in the name and no text of that name; a key ends at the first dot: rename it"
    assert listing() == {
        "set/0.tar: a.left": dotted,
        "set/0.tar: b.5x": dotted,
        "set/0.tar: b": "without a picture",
        "set/0.tar: c.5x": "without a picture",
        "set/0.tar: README": "without an extension, so without a key",
    }
    assert "5 not used" in capsys.readouterr().err


def test_what_is_hidden_or_no_picture_is_named_and_odd_extensions_are_read() -> None:
    odd = tarfile.TarInfo(os.fsdecode(b"caf\xe9.jpg"))
    pack(
        "set/0.tar", ("a.jfif", jpeg()), ("a.txt", b"x"), ("b.JPG_large", jpeg()), ("b.txt", b"x"), ("c.heic", b"ftyp"),
        ("c.txt", b"x"), (".ipynb_checkpoints/d.jpg", jpeg()), ("__MACOSX/._a.jpg", b"x"), (odd, jpeg()),
    )  # fmt: skip
    assert prepare().keys() == {"a", "b"}
    assert listing() == {
        "set/0.tar: c": "without a picture",
        "set/0.tar: .ipynb_checkpoints/d.jpg": "hidden",
        "set/0.tar: __MACOSX/._a.jpg": "hidden",
        r"set/0.tar: caf\xe9.jpg": "its name is not UTF-8; rename it (convmv -f latin1 -t utf8)",
    }


def test_tars_one_behind_another_are_read_to_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    parts = [write(f"part/{n}.tar", captioned(range(n * 10, n * 10 + 4))).read_bytes() for n in range(3)]
    Path("set").mkdir()
    Path("set/0.tar").write_bytes(b"".join(parts))
    rows = prepare()
    assert len(rows) == 12 and "not used" not in capsys.readouterr().err
    assert all(pictures.read(row["image"]) == jpeg(int(key)) for key, row in rows.items())
    Path("set/0.tar").write_bytes(parts[0] + b"a signature, say" + bytes(496))
    assert len(prepare()) == 4
    assert listing() == {f"set/0.tar#{len(parts[0])}": "behind the tar's end, and no tar"}
    Path("set/0.tar").write_bytes(parts[0] + parts[1][: parts[1].index(b"000000013.jpg") + 600])
    assert "unexpected end of data" in fault()
    Path("set/0.tar").write_bytes(parts[0] * 2)
    assert "two members are named '000000000.jpg'" in fault()


def test_a_text_that_fails_does_not_cost_the_others() -> None:
    samples: dict[str, dict[str, Any]] = {
        "null": {"json": {"captions": ["one", None, 5, "", " two "]}},
        "broken": {"json": b"{", "txt": "one"},
        "latin": {"txt": b"caf\xe9", "json": {"caption": "one"}},
        "utf16": {"txt": "cr\u00e8me".encode("utf-16"), "json": '{"caption": "one"}'.encode("utf-16")},
        "nan": {"json": b'{"caption": NaN}'},
        "digits": {"json": b'{"caption": "one", "n": ' + b"9" * 5000 + b"}"},
        "twice": {"json": b'{"caption": "one", "caption": "two"}'},
        "empty": {"json": b""},
        "lines": {"json": b'{"caption": "one"}\n{"caption": "two"}'},
        "half": {"json": b'{"captions": ["one", "a \\ud83d"]}'},
    }
    write("set/0.tar", [{"__key__": key, "jpg": jpeg(), **texts} for key, texts in samples.items()])
    rows = prepare()
    assert {key: row["captions"] for key, row in rows.items() if row["captions"]} == {
        "null": ["one", "two"], "broken": ["one"], "latin": ["one"], "utf16": ["one", "cr\u00e8me"], "half": ["one"]
    }  # fmt: skip
    assert {key: row["quarantine"] for key, row in rows.items() if row["quarantine"]} == {
        "nan": "a caption in its json is no text",
        "digits": "its json is not valid JSON",
        "twice": "its json is ambiguous, with two values of the key 'caption' in one object",
        "empty": "its json is empty",
        "lines": "its json is not valid JSON",
    }
    assert len(listing()) == 9, "three texts of pictures that have others, half an emoji, and the five"


def test_classes_of_any_type(capsys: pytest.CaptureFixture[str]) -> None:
    Path("set").mkdir()
    Path("set/classes.txt").write_text("pho\npeking_duck\n", encoding="utf-16")
    samples: dict[str, dict[str, Any]] = {
        "float": {"json": {"label": 1.0}},
        "list": {"json": {"label": ["pho"]}},
        "huge": {"cls": "9" * 5000},
        "broken": {"json": b"[", "cls": "pho"},
        "dash": {"cls": "---"},
        "case": {"cls": "Pho"},
    }
    write("set/0.tar", [{"__key__": key, "jpg": jpeg(), **texts} for key, texts in samples.items()])
    rows = prepare("classes")
    labels = {key: row["label"] for key, row in rows.items()}
    assert labels == {"float": "peking duck", "list": None, "huge": None, "broken": "pho", "dash": None, "case": "Pho"}
    assert rows["huge"]["quarantine"] == "its class is a number beyond all classes"
    assert "'Pho', 'pho' differ in case or separators alone" in capsys.readouterr().err


def test_classes_in_words_and_by_number() -> None:
    samples = {
        "word": {"cls": "hot_dog"},
        "label": {"json": {"label": "hot dog"}},
        "class": {"json": {"class": "apple pie", "label": 7}, "cls": "7"},
        "number": {"cls": 1},
        "json number": {"json": {"label": 0}},
        "none": {"json": {"label": True}},
    }
    write("set/0.tar", [{"__key__": key, "jpg": jpeg(), **texts} for key, texts in samples.items()])
    assert "set/classes.txt: no such file" in fault("classes")
    Path("set/classes.txt").write_text("pho\n")
    assert "set/classes.txt: no line for the class 1 of number in" in fault("classes")
    Path("set/classes.txt").write_text("pho\npeking_duck\n")
    rows = prepare("classes")
    assert {key: row["label"] for key, row in rows.items()} == {
        "word": "hot dog",
        "label": "hot dog",
        "class": "apple pie",
        "number": "peking duck",
        "json number": "pho",
        "none": None,
    }
    assert rows["none"]["quarantine"] == "no class" and rows["word"]["captions"] == ["hot dog"]


def test_count_is_per_class_and_insertion_moves_nothing() -> None:
    write("set/0.tar", [{"__key__": f"{n:04d}", "jpg": jpeg(n), "cls": f"class {n % 2}"} for n in range(80)])
    rows = prepare("classes")
    few = prepare("classes", count=5)
    assert sorted(row["label"] for row in few.values()) == ["class 0"] * 5 + ["class 1"] * 5
    write("set/1.tar", [{"__key__": f"new{n:04d}", "jpg": jpeg(90 + n), "cls": "class 1"} for n in range(9)])
    grown = prepare("classes")
    assert all(grown[key]["split"] == row["split"] for key, row in rows.items())
    assert {row["split"] for row in rows.values()} == {"train", "val", "test"}


def test_shards_by_path_glob_and_range() -> None:
    for number in range(8, 12):
        write(f"set/shard-{number:04d}.tar", captioned(range(number * 10, number * 10 + 3)))
    assert len(prepare(shards="set/shard-0009.tar")) == 3
    assert len(prepare(shards="set/shard-001?.tar")) == 6
    assert len(prepare(shards="set/shard-{0009..0011}.tar")) == 9
    assert len(prepare(shards="set/shard-{0008,0011}.tar")) == 6
    assert "set/{3..1}.tar: the range {3..1} is empty; write the smaller number first" in fault(shards="set/{3..1}.tar")
    Path("set/a{b.tar").write_bytes(Path("set/shard-0008.tar").read_bytes())
    assert len(prepare(shards="set/a{b.tar")) == 3, "a brace without its other is part of the name"
    Path("set/a{b.tar").unlink()
    assert len(prepare(shards=f"{Path.cwd()}/set/*.tar")) == 12
    assert len(prepare(shards=f"file://{Path.cwd()}/set/shard-{{0008..0011}}.tar")) == 12
    Path("odd [1]").mkdir()
    Path("set/shard-0008.tar").rename("odd [1]/a#1:2.tar")
    row = prepare(shards="odd [1]/a#1:2.tar")["000000080"]
    assert pictures.read(row["image"]) == jpeg(80)


def test_remote_shards_are_read_by_range(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    local = write("set/0.tar", captioned(range(6)))
    memory.pipe("/bucket/00000.tar", local.read_bytes())
    here, there = prepare(), prepare(shards="memory://bucket/*.tar")
    assert here.keys() == there.keys()
    assert re.fullmatch(r"memory://+bucket/00000\.tar#\d+:\d+", there["000000003"]["image"])
    assert there["000000003"]["sha256"] == here["000000003"]["sha256"]
    asked = []
    whole = type(memory).cat_file
    monkeypatch.setattr(
        type(memory), "cat_file", lambda self, path, start=None, end=None: asked.append((start, end)) or whole(
            self, path, start, end)
    )  # fmt: skip
    content = pictures.read(there["000000003"]["image"])
    assert content == jpeg(3) and [end - start for start, end in asked] == [len(content)]
    memory.pipe("/bucket/classes.txt", b"pho\n")
    memory.pipe("/bucket/c.tar", write("set/c.tar", [{"__key__": "1", "jpg": jpeg(), "cls": 0}]).read_bytes())
    assert prepare("classes", shards="memory://bucket/c.tar")["1"]["label"] == "pho"


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("../a.jpg", "'../a.jpg' leads out of the shard"),
        ("b/../../a.jpg", "'b/../../a.jpg' leads out"),
        ("..\\a.jpg", "leads out of the shard"),
        ("/etc/a.jpg", "'/etc/a.jpg' leads out"),
        (special("a.jpg", tarfile.SYMTYPE, "/etc/passwd"), "'a.jpg' is a link"),
        (special("a.jpg", tarfile.LNKTYPE, "1.jpg"), "'a.jpg' is a link"),
        (special("a.jpg", tarfile.CHRTYPE), "'a.jpg' is a link, a device"),
        (special("a.jpg", tarfile.FIFOTYPE), "'a.jpg' is a link, a device"),
        ("1.JPG", "two members are named '1.JPG'"),
        ("1.png", "the key '1' has more than one picture (jpg, png)"),
    ],
    ids=lambda value: f"{value.name} of type {value.type!r}" if isinstance(value, tarfile.TarInfo) else value,
)
def test_unsafe_and_double_members_are_refused_by_name(member: Any, message: str) -> None:
    pack("set/0.tar", ("1.jpg", jpeg()), ("1.txt", b"a"), (member, b""))
    found = fault()
    assert found.startswith(f"{Path.cwd()}/set/0.tar: ") and message in found


def test_one_key_in_two_shards_is_refused() -> None:
    write("set/a.tar", captioned(range(3)))
    write("set/b.tar", captioned(range(2, 4)))
    assert "b.tar: the key '000000002' is also in " in fault()


@pytest.mark.parametrize("shards", ["set/none.tar", "set/*.tar", "set/{000..002}.tar", "memory://none/*.tar"])
def test_missing_shards_name_the_parameter(shards: str) -> None:
    assert "no such tar; set data.captions.shards" in fault(shards=shards)


def test_a_server_that_does_not_answer_is_not_a_missing_tar(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def info(*_: Any) -> None:
        raise FileNotFoundError("a.tar") from ConnectionError("no route")  # as fsspec's http has it

    monkeypatch.setattr(type(memory), "info", info)
    assert "a.tar: cannot be looked up (ConnectionError: no route); " in fault(shards="memory://bucket/a.tar")


def test_damaged_shards(capsys: pytest.CaptureFixture[str]) -> None:
    path = write("set/0.tar", captioned(range(6)))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        fourth = next(member for member in tar if member.name.startswith("000000003."))
    path.write_bytes(whole[: fourth.offset_data + 2])
    assert "unexpected end of data" in fault()
    path.write_bytes(whole[: fourth.offset])  # nothing but the end mark is missing
    assert len(prepare()) == 3
    assert "no end mark, as if it were cut off" in capsys.readouterr().err
    path.write_bytes(whole[: fourth.offset] + b"\xff" * 512 + whole[fourth.offset + 512 :])
    assert f"damaged at byte {fourth.offset}, after 9 members" in fault()
    path.write_bytes(b"")
    assert "empty file" in fault()
    path.write_bytes(jpeg())
    assert "cannot be read as an uncompressed tar" in fault()
    with tarfile.open("set/0.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    assert "cannot be read as an uncompressed tar" in fault()
    path.rename("set/0.tar.gz")
    assert "0.tar.gz: not a .tar; decompress it" in fault(shards="set/*")
    assert "Protocol not known" in fault(shards="nowhere://a.tar")


def test_shards_without_pictures_or_captions_say_what_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    pack("set/0.tar", ("a.txt", b"a"), ("b.json", b"{}"))
    assert "set/*.tar: no picture in it; members are named KEY.jpg" in fault()
    pack("set/0.tar", ("a.jpg", jpeg()), ("b.json", b"{}"))
    assert "none of 1 pictures (a: no caption) has a caption; each KEY.jpg needs KEY.txt" in fault()
    assert "none of 1 pictures (a: no class) has a class; each KEY.jpg needs KEY.cls" in fault("classes")
    pack("set/0.tar", ("a.jpg", jpeg()), ("a.txt", b"a"), ("b.json", b"{}"))
    assert list(prepare()) == ["a"]
    assert f"1 not used: without a picture (1: {Path.cwd()}/set/0.tar: b)" in capsys.readouterr().err


def test_broken_pictures_in_shards_are_quarantined() -> None:
    samples = captioned(range(8))
    samples[2]["jpg"], samples[5]["jpg"] = b"", samples[5]["jpg"][:100]
    samples[3]["jpg"] = jpeg(3, "PNG")  # whatever the extension says, the content decides
    write("set/0.tar", samples)
    rows = prepare()
    assert rows["000000003"]["quarantine"] is None
    assert rows["000000002"]["quarantine"] == "empty file" and "not" in rows["000000005"]["quarantine"]
    found = fault(max_broken=0.1)
    assert "2 of 8 pictures can't be used" in found
    assert re.search(r"first: set/0\.tar#\d+:0 \(000000002\) \(empty file\)", found), "place and key"


def test_what_is_needed_is_seen_in_the_first_shard() -> None:
    def need(data: str = "captions", **section: Any) -> Need:
        return reading.source_of(params(data, **section), data).need()

    there = f"{Path.cwd()}/set/*.tar"
    found = need(shards=there)
    assert (found.ok, found.name, found.found) == (False, "data.captions (webdataset)", f"{there}: no such tar")
    assert "data.captions.shards" in found.remedy
    pack("set/0.tar", ("a.txt", b"a"))
    assert not need().ok and "no picture in it" in need().found
    pack("set/0.tar", ("a.jpg", jpeg()))
    assert not need().ok and "KEY.txt" in need().remedy and "KEY.cls" in need("classes").remedy
    for number in range(3):
        write(f"set/{number}.tar", captioned(range(number * 10, number * 10 + 4)))
    assert need().ok and need().found == "set/*.tar: 3 tars, 4 pictures in the first"
    remote = need(shards="s3://bucket/{0..2}.tar")
    assert remote.ok and "remote, looked at by `terraalign prepare captions` only" in remote.found


def test_pictures_are_counted_by_the_first_shard() -> None:
    def count(data: str = "captions", **section: Any) -> int | None:
        return reading.source_of(params(data, **section), data).pictures()

    assert count(shards="none/*.tar") is None
    for number in range(3):
        samples = captioned(range(number * 10, number * 10 + 4))
        write(f"set/{number}.tar", [{**sample, "cls": "a"} for sample in samples])
    assert count() == count("classes", count=2) == 12 and count(count=5) == 5
    assert count(shards="s3://bucket/{0..2}.tar") is None


def test_the_setting_that_keeps_shards() -> None:
    source = reading.source_of(params(shards="set/{0..2}.tar"), "captions")
    kept = ["data.captions.source=webdataset", "data.captions.shards=set/{0..2}.tar"]
    assert source.settings_for_use(missing=False) == kept


class Pixels:
    """An encoder whose tokens are the pixels."""

    identity: ClassVar = {"encoder": "pixels"}

    def preprocess(self, image: Image.Image) -> Any:
        import torch

        return torch.from_numpy(np.asarray(image.resize((4, 4)), np.float32)).permute(2, 0, 1)

    def encode(self, pixels: Any) -> Any:
        return pixels.flatten(2).transpose(1, 2)


def test_from_the_shards_to_image_tokens(memory: Any) -> None:
    content = write("set/0.tar", captioned(range(12))).read_bytes()
    memory.pipe("/bucket/0.tar", content)
    for shards in ("set/0.tar", "memory://bucket/0.tar"):
        chosen = params(shards=shards)
        Path("params.yaml").write_text(yaml.safe_dump(chosen.model_dump(mode="json")))
        assert CliRunner().invoke(cli.app, ["prepare", "captions"]).exit_code == 0
        manifest = extract_images(chosen, "captions", Pixels(), lambda n: None)
        run = Run.of(chosen)
        manifest.write(run.features("images", "captions"))
        images = ImageTokens.open(run, "captions")
        for position, key in enumerate(images.ids):
            expected = np.asarray(pictures.decode(jpeg(int(key))))[0, 0]
            np.testing.assert_array_equal(images.tokens([position])[0].numpy(), np.tile(expected, (16, 1)))
        for shard in manifest.shards:
            (manifest.folder / shard.name).unlink()
    memory.pipe("/bucket/0.tar", content.replace(jpeg(3), bytes(len(jpeg(3)))))
    with pytest.raises(UserError, match=r"#.*changed since it was prepared"):
        extract_images(chosen, "captions", Pixels(), lambda n: None)
    memory.rm("/bucket/0.tar")
    with pytest.raises(UserError, match=r"cannot be read .*FileNotFoundError"):
        extract_images(chosen, "captions", Pixels(), lambda n: None)


def test_thumbnails_of_pictures_in_shards() -> None:

    write("set/0.tar", captioned(range(1)))
    assert str(thumbnail(prepare()["000000000"]["image"])).startswith("data:image/jpeg;base64,")
