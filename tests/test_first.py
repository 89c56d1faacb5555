"""From a folder of pictures to a profile: what is recognised, said and written; tables of captions."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.progress import Progress
from typer.testing import CliRunner

from pipeline.config import Params, load_params, parse_params
from pipeline.errors import UserError
from pipeline.first.layout import Layout, recognise
from pipeline.first.profile import fitted, name_of, split_for
from pipeline.sources import manifest
from pipeline.sources.prepare import prepare
from pipeline.sources.table import read
from stages import TOLD, cli

SILENT = Progress(disable=True)
pytestmark = pytest.mark.usefixtures("project")


def picture(path: str, shade: int = 0) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade % 256, shade // 256, 7)).save(path)


def classes(root: str, count: int = 8, names: tuple[str, ...] = ("ant", "bee"), by: str = "{}.png") -> None:
    for number, name in enumerate(names):
        for at in range(count):
            picture(f"{root}/{name}/{by.format(at)}", 100 * number + at)


def text(path: str, content: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(content, encoding="utf-8")


def coco(path: str, names: list[str]) -> None:
    images = [{"id": at, "file_name": name} for at, name in enumerate(names)]
    said = [{"image_id": at, "caption": f"a picture of {at}"} for at in range(len(names))]
    text(path, json.dumps({"images": images, "annotations": said}))


def sections(layout: Layout) -> dict[str, dict[str, Any]]:
    return {name: {**one.section, "root": one.section["root"].name} for name, one in layout.sets.items()}


def of(folder: str) -> dict[str, dict[str, Any]]:
    return sections(recognise(Path(folder).resolve()))


def imagefolder(root: str) -> dict[str, Any]:
    return {"task": "classify", "source": "imagefolder", "root": root}


def test_class_folders_are_recognised_wherever_they_lie() -> None:
    classes("flat")
    classes("deep/images")
    classes("parts/train")
    classes("parts/test", 2)
    classes("one", names=("robin",))
    picture("flat/.hidden/1.png")
    assert of("flat") == {"classes": imagefolder("flat")}
    assert of("deep") == {"classes": imagefolder("images")}
    assert of("parts") == {"classes": imagefolder("parts")}
    assert not recognise(Path("parts").resolve()).sets["classes"].has_parts  # val is carved
    classes("parts/valid", 2)
    assert recognise(Path("parts").resolve()).sets["classes"].has_parts


def test_one_class_is_nothing_to_tell_apart() -> None:
    classes("one", names=("robin",))
    classes("parts/train", names=("robin",))
    classes("parts/test", 2, names=("robin",))
    for folder in ("one", "parts"):
        with pytest.raises(UserError, match=r"robin: the only class folder, .*; put the pictures of other kinds into"):
            recognise(Path(folder).resolve())
    text("one/captions.csv", "file,text\nrobin/1.png,a robin\nrobin/2.png,another\n")
    found = recognise(Path("one").resolve())
    assert list(found.sets) == ["captions"]
    assert found.unused == [f"{Path('one/robin').resolve()}: the only class folder, and so nothing to tell apart"]
    classes("broken")
    for at in range(8):
        text(f"broken/bee/{at}.png", "no picture")
    Path("broken/ant").rename("broken/wasp")
    classes("broken", 72, names=("ant",))
    shutil.rmtree("broken/wasp")
    with pytest.raises(UserError, match="usable pictures of ant alone: the only class"):
        fitted(recognise(Path("broken").resolve()), "broken", Path("broken"), "try", SILENT)


def test_a_folder_of_captioned_pictures_is_no_class_beside_others(capsys: pytest.CaptureFixture[str]) -> None:
    classes("mixed", 10, ("ant", "bee", "scenes"))
    picture("mixed/alone.png", 999)
    text("mixed/ant/notes.txt", "of no interest")
    text("mixed/captions.csv", "file,text\n" + "".join(f"scenes/{at}.png,scene {at}\n" for at in range(10)))
    layout = recognise(Path("mixed").resolve())
    assert layout.sets["classes"].section["without"] == ["scenes"]
    assert "2 class folders (ant, bee), without scenes, where the captions are" in layout.sets["classes"].said
    _, looks = fitted(layout, "mixed", Path("mixed"), "try", SILENT)
    assert looks["classes"].classes == {"ant": 10, "bee": 10} and looks["captions"].pictures == 10
    said = capsys.readouterr().err
    assert "data.captions: 20 files beside its own are of data.classes\n" in said
    assert "data.classes: 1 file beside its own is of data.captions\n" in said  # captions.csv
    assert "1 not used: named by no line of captions.csv (1: " in said and said.count("alone.png") == 2
    assert "notes.txt" in said and "scenes/" not in said and "ant/1.png" not in said
    text("mixed/captions.csv", "file,text\nscenes/1.png,scene\nant/1.png,ant\n")  # of pictures of several kinds
    assert len(recognise(Path("mixed").resolve()).sets["classes"].classes) == 3
    names = [f"scenes/{at}.png" for at in range(10)]
    coco("mixed/captions.json", names)
    Path("mixed/captions.csv").unlink()
    _, looks = fitted(recognise(Path("mixed").resolve()), "mixed", Path("mixed"), "try", SILENT)
    assert looks["classes"].classes == {"ant": 10, "bee": 10}
    assert "data.captions: 20 files beside its own are of data.classes\n" in capsys.readouterr().err


def test_files_of_captions_are_recognised_with_the_folder_of_their_pictures() -> None:
    names = [f"{at}.png" for at in range(4)]
    for name in names:
        picture(f"a/images/{name}")
        picture(f"b/{name}")
        picture(f"c/photos/{name}")
    coco("a/annotations/val.json", names)
    text("b/lines.jsonl", "".join(json.dumps({"image": name, "captions": ["one", "two"]}) + "\n" for name in names))
    text("c/texts.csv", "Photo;x\n1.png;no\n")
    text("c/captions.csv", "File Name;Caption\n" + "".join(f"{name};said\n" for name in names))
    text("c/about.txt", "nothing of interest\n")
    assert of("a") == {
        "captions": {
            "task": "caption", "source": "coco", "root": "a", "captions": "annotations/val.json", "images": "images",
        }
    }  # fmt: skip
    table = {"task": "caption", "source": "table"}
    assert of("b") == {"captions": {**table, "root": "b", "table": "lines.jsonl", "images": ""}}
    assert of("c") == {"captions": {**table, "root": "c", "table": "captions.csv", "images": "photos"}}


def test_both_are_recognised_on_the_same_pictures_and_on_others() -> None:
    classes("same")
    text("same/captions.csv", "file,text\nant/1.png,an ant\nbee/2.png,a bee\n")
    assert of("same")["classes"] == imagefolder("same")
    assert of("same")["captions"]["images"] == ""
    classes("apart/kinds")
    picture("apart/captioned/images/1.png")
    coco("apart/captioned/captions.json", ["1.png"])
    assert of("apart")["classes"] == imagefolder("kinds")
    assert of("apart")["captions"] | {"root": ""} == {
        "task": "caption", "source": "coco", "root": "", "captions": "captioned/captions.json",
        "images": "captioned/images",
    }  # fmt: skip


def test_a_second_file_of_captions_is_said_and_not_used() -> None:
    for at in range(3):
        picture(f"two/{at}.png")
    text("two/more.csv", "file,text\n0.png,a\n1.png,b\n2.png,c\n")
    text("two/few.csv", "file,text\n0.png,a\n")
    found = recognise(Path("two").resolve())
    assert found.sets["captions"].section["table"] == "more.csv"
    assert len(found.unused) == 1 and "few.csv" in found.unused[0]


def test_nothing_to_learn_from_is_told() -> None:
    for at in range(3):
        picture(f"flat/{at}.png")
    text("flat/captions.csv", "file,text\ngone.png,a text\n")
    with pytest.raises(UserError, match=r"3 pictures, and nothing that says what they show; .*captions.csv"):
        recognise(Path("flat").resolve())
    Path("empty").mkdir()
    with pytest.raises(UserError, match="no picture in it"):
        recognise(Path("empty").resolve())
    with pytest.raises(UserError, match="no such folder"):
        recognise(Path("gone").resolve())


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("captions.csv", b"file,text\ngone.png,a text\n", "no file that it names is there; the first is gone.png"),
        (
            "captions.csv",
            b"0.png;a bird\n1.png;a cat\n",
            "its first line, '0.png;a bird', has no columns file and text",
        ),
        ("captions.csv", b"file,text\n,a bird\n", "no entry has a file and a text"),
        ("captions.csv", b"file,text\n0.png,\xe9\xe8 bird\n", "not UTF-8 text"),
        ("captions.csv", b"", "empty"),
        ("captions.jsonl", b'{"file": "0.png"}\n', "no entry has a file and a text"),
        ("captions.json", b'{"images": [', "Expecting value: line 1 column 13"),
        ("captions.json", b"3", "no entry has a file and a text"),
    ],
)
def test_a_file_of_captions_that_is_none_is_named_with_the_reason(name: str, content: bytes, reason: str) -> None:
    for kind in ("robin", "crow"):
        picture(f"birds/{kind}/0.png")
    Path("birds", name).write_bytes(content)
    [told] = recognise(Path("birds").resolve()).unused
    assert told.startswith(f"{Path('birds', name).resolve()}: no captions (") and reason in told
    for at in range(3):
        picture(f"flat/{at}.png")
    Path("flat", name).write_bytes(content)
    with pytest.raises(UserError, match="3 pictures, and nothing that says what they show") as error:
        recognise(Path("flat").resolve())
    assert reason in str(error.value)


def test_what_is_not_meant_to_hold_captions_is_not_called_unused() -> None:
    for kind in ("ant", "bee"):
        picture(f"food/images/{kind}/1.png")
        picture(f"kinds/{kind}/1.png")
        text(f"kinds/{kind}/1.txt", "an insect\n")
    for name in ("classes", "labels", "train", "test"):
        text(f"food/meta/{name}.txt", "ant\nbee\n")
    text("food/meta/train.json", '{"ant": ["ant/1"]}')
    text("kinds/README.txt", "Notes\rin old lines, " + "very " * 40_000)
    for name in ("food", "kinds"):
        assert recognise(Path(name).resolve()).unused == []


def test_a_long_name_does_not_hide_the_others() -> None:
    for at in range(3):
        picture(f"long/{at}.png")
    text("long/captions.csv", "file,text\n0.png,a\n1.png,b\n" + "x" * 300 + ".png,c\n")
    assert recognise(Path("long").resolve()).sets["captions"].section["table"] == "captions.csv"


def test_a_folder_of_pictures_that_are_not_read_says_so() -> None:
    Path("phone").mkdir()
    for at in range(5):
        Path(f"phone/IMG_{at}.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(UserError, match=r"no picture in it; .*save it as JPEG or PNG \(5: .*IMG_0.HEIC"):
        recognise(Path("phone").resolve())


def test_numbered_names_are_split_in_blocks() -> None:
    assert split_for([f"a/IMG_{number:04}.jpg" for number in range(40)])[0] == "blocks"
    assert split_for([f"{number * 977 % 9973}.jpg" for number in range(40)])[0] == "hash"
    assert split_for(["robin.jpg", "crow.jpg"])[0] == "hash"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("My Birds (2)", "my-birds-2"),
        ("store", "store-pictures"),
        ("nc Übung Fotos", "nc-ubung-fotos"),
        ("Straße e\u0301", "strasse-e"),
        ("鳥 2024", "2024"),
        ("鳥", "pictures"),
    ],
)
def test_a_profile_is_called_after_its_folder(name: str, expected: str) -> None:
    assert name_of(Path(name)) == expected


@pytest.mark.parametrize("name", ["my birds!", "", "store", "vögel"])
def test_a_name_that_no_profile_may_have_is_told_in_words(name: str) -> None:
    Path("dvc.yaml").touch()
    said = CliRunner().invoke(cli.app, ["try", "gone", "--name", name])
    assert said.exit_code == 2 and said.output.startswith(f"error: --name {name}: ") and "\n" not in said.output.strip()
    assert "e.g. --name " in said.output and "^" not in said.output
    rest = said.output.rstrip().rpartition(" ")[2]
    assert "gone: no such folder" in CliRunner().invoke(cli.app, ["try", "gone", "--name", rest]).output


def test_what_is_said_of_a_data_set_is_said_once() -> None:
    classes("birds", 12)
    _, looks = fitted(recognise(Path("birds").resolve()), "birds", Path("birds"), "try", SILENT)
    assert dict(looks["classes"].lines())["classes"] == "2, with 12 pictures each"


def test_the_profile_fits_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    classes("birds", 12, ("ant", "bee", "wasp"))
    text("birds/captions.jsonl", "".join(
        json.dumps({"file": f"{kind}/{at}.png", "text": f"an insect by the number of {at}"}) + "\n"
        for kind in ("ant", "bee") for at in range(6)
    ))  # fmt: skip
    shutil.copy("birds/ant/0.png", "birds/wasp/copy.png")
    text("birds/bee/broken.png", "no picture")
    written, looks = fitted(recognise(Path("birds").resolve()), "birds", Path("birds"), "try", SILENT)
    params = parse_params(written, "birds")
    assert params.run.recipes == ["captions", "classes"] and params.run.scratch == []
    assert params.data["classes"].split == "blocks"
    assert params.finetune.recipes["classes"].hints == 2  # as there are no three other names
    lines = dict(looks["classes"].lines())
    assert lines["pictures"].startswith("37 (") and looks["classes"].copies == 1
    assert lines["classes"].startswith("3, with 12 (")
    assert lines["left out"].startswith("1: ") and lines["left out"].endswith("broken.png (not a picture)")
    assert lines["copies"].startswith("1 picture has the bytes of an earlier one; all: data/birds/quarantine/classes-")
    assert lines["labels"].startswith("1 picture is in two classes, which is a labelling mistake: ")
    assert "ant/0.png (ant) and " in lines["labels"] and "wasp/copy.png (wasp)" in lines["labels"]
    said = capsys.readouterr().err
    assert "broken.png" not in said and "copy.png" not in said, "once is enough"
    assert dict(looks["captions"].lines())["captions"].startswith("12, 1 for a picture; 7 to 7 words")


def test_few_pictures_are_split_so_that_no_part_is_empty() -> None:
    names = [f"{at}.png" for at in range(7)]
    for at, name in enumerate(names):
        picture(f"few/{name}", at)
    coco("few/captions.json", names)
    _, looks = fitted(recognise(Path("few").resolve()), "few", Path("few"), "try", SILENT)
    assert min(looks["captions"].parts.values()) >= 1 and sum(looks["captions"].parts.values()) == 7
    classes("two", 1)
    with pytest.raises(UserError, match="of 2 pictures none falls into"):
        fitted(recognise(Path("two").resolve()), "two", Path("two"), "try", SILENT)


def test_the_command_says_only_what_it_would_do_in_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    classes("birds")
    runner = CliRunner()
    said = runner.invoke(cli.app, ["try", "birds", "--dry-run"])
    project = Path(__file__).parent.parent
    told = f"no project folder, as it has no dvc.yaml; `cd {shlex.quote(str(project))}` first"
    assert said.exit_code == 2 and told in said.output
    assert runner.invoke(cli.app, ["plan"]).output == runner.invoke(cli.app, ["profile", "list"]).output == said.output
    for file in ("dvc.yaml", "pipeline/config/defaults.yaml"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(project / file, file)
    planned: dict[str, Any] = {}

    def reckoned(params: Params, jobs: int, rows: Any, graph: dict[str, list[str]], *more: Any) -> dict[str, Any]:
        planned.update(graph)
        return {"profile": params.profile, "stages": {}}

    monkeypatch.setattr("stages.first.reckoned", reckoned)
    said = runner.invoke(cli.app, ["try", "birds", "--dry-run"])
    assert said.exit_code == 0, said.output
    assert {"prepare@classes", "pretrain@mlp", "finetune@mlp-classes", "report"} <= planned.keys()
    assert planned["pretrain@mlp"] == ["inputs"]
    assert "would write profile profiles/birds.yaml" in said.output
    assert "2 class folders (ant, bee)" in said.output and "classes: pictures: 16" in said.output
    assert "\nclasses: 2, with 8 pictures each\n" in said.output
    assert not Path("profiles").exists() and not Path("params.yaml").exists()
    assert re.search(r"warning: classes: \d test pictures?: figures will say little", said.output)
    for own in ("", ".", "birds/.."):  # an empty name, as of a variable that is not set, is the current folder
        said = runner.invoke(cli.app, ["try", own, "--dry-run"])
        assert said.exit_code == 2 and "this project is in it; name a folder" in said.output


def test_a_dry_run_of_what_is_up_to_date_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    classes("birds")
    Path("dvc.yaml").touch()
    monkeypatch.setattr("stages.first.planned", lambda *more: {"profile": "birds", "stages": {}})
    runner = CliRunner()
    assert runner.invoke(cli.app, ["init", "birds"]).exit_code == 0
    monkeypatch.setattr("stages.first.stale_stages", lambda: ({}, set()))
    said = runner.invoke(cli.app, ["try", "birds", "--dry-run"])
    assert said.exit_code == 0 and "profile birds: nothing to do, everything is up to date" in said.output
    shutil.copy(Path(__file__).parent.parent / "profiles/demo.yaml", "profiles/demo.yaml")
    said = runner.invoke(cli.app, ["try", "birds", "--name", "demo"])
    assert "profiles/demo.yaml: one of the project's own profiles; take another --name\n" in said.output


def test_a_profile_that_is_there_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    classes("birds")
    Path("dvc.yaml").touch()
    Path("params.yaml").write_text("my: own\n")
    empty: dict[str, Any] = {"profile": "birds", "stages": {}}
    monkeypatch.setattr("stages.first.planned", lambda params, jobs, counted: empty)
    runner = CliRunner()
    said = runner.invoke(cli.app, ["init", "birds"])
    assert said.exit_code == 0, said.output
    assert Path("params-before.yaml").read_text() == "my: own\n"
    assert "the active profile is now birds: " in said.output and "next:" not in said.output
    assert "back: `terraalign profile use params-before.yaml`" in said.output
    assert load_params().profile == "birds"
    path = Path("profiles/birds.yaml")
    path.write_text(path.read_text().replace("lr: 0.0002", "lr: 0.003"))
    assert "as it is there already" in runner.invoke(cli.app, ["init", "birds"]).output
    assert load_params().pretrain.lr == 0.003
    assert "the active profile" not in runner.invoke(cli.app, ["init", "birds"]).output
    assert "profile use birds`" in runner.invoke(cli.app, ["init", "birds", "--name", "again"]).output
    text("birds/captions.csv", "file,text\nant/1.png,an ant\nbee/2.png,a bee\n")
    assert "not in it, as it was not there: captions; to have it, " in runner.invoke(cli.app, ["init", "birds"]).output
    assert runner.invoke(cli.app, ["profile", "use", "birds", "--set", "pretrain.lr=0.005"]).exit_code == 0
    said = runner.invoke(cli.app, ["init", "birds"]).output
    assert f"to have them from now on, put these lines into {path}:\npretrain:\n  lr: 0.005\nthe active" in said
    assert load_params().pretrain.lr == 0.003
    classes("other")
    said = runner.invoke(cli.app, ["init", "other", "--name", "birds"])
    assert said.exit_code == 2 and "; take another --name" in said.output
    assert f"profiles/birds.yaml: the profile of other pictures, {Path('birds').absolute()}" in said.output


def test_added_pictures_are_said_and_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    classes("birds", by="{}x.png")
    Path("dvc.yaml").touch()
    monkeypatch.setattr("stages.first.planned", lambda params, jobs, counted: {"profile": "birds", "stages": {}})

    def init() -> tuple[str, str | None]:
        """What is said, and what DVC watches."""
        said = CliRunner().invoke(cli.app, ["init", "birds"])
        assert said.exit_code == 0, said.output
        return said.output, load_params().data["classes"].seen

    _, first = init()
    manifest.write(prepare(load_params(), "classes"), Path("data/birds/prepare/classes.parquet"))
    path = Path("profiles/birds.yaml")
    path.write_text(path.read_text().replace("lr: 0.0002", "lr: 0.003"))
    said, again = init()
    assert again == first and "since the last run" not in said
    Path("params-before.yaml").unlink()
    for at in range(3):
        picture(f"birds/bee/new{at}.png", 200 + at)
    said, again = init()
    assert "classes: since the last run: 3 pictures are new, 0 gone or changed\n" in said
    assert "as it is there already, but for data.classes.seen" in said
    assert first != again and load_params().pretrain.lr == 0.003 and path.read_text() == Path("params.yaml").read_text()
    assert not Path("params-before.yaml").exists()
    manifest.write(prepare(load_params(), "classes"), Path("data/birds/prepare/classes.parquet"))
    assert init()[1] == again
    Path("birds/bee/new0.png").unlink()
    picture("birds/ant/1x.png", 999)
    text("birds/ant/2x.png", "no picture")
    said, last = init()
    assert "0 pictures are new, 1 gone, 2 changed\n" in said and last != again
    manifest.write(prepare(load_params(), "classes"), Path("data/birds/prepare/classes.parquet"))
    text("series.csv", "id,group\n" + "".join(f"ant/{at}x.png,{at % 2}\n" for at in range(8) if at != 1))
    path.write_text(path.read_text().replace('    split: "blocks"', '    groups: series.csv\n    split: "blocks"'))
    said, of_series = init()
    assert "classes: since the last run: " in said and " in another part\n" in said and of_series != last
    path.unlink()
    assert init()[1] not in (first, again, last)  # a profile written anew is never one that DVC knows the result of


@pytest.mark.parametrize("stale", [True, False])
def test_what_is_up_to_date_is_not_run_again(stale: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    classes("birds")
    Path("dvc.yaml").touch()
    ran: list[str | None] = []
    found = {"profile": "birds", "stages": {"report": {}} if stale else {}}
    monkeypatch.setattr("stages.first.planned", lambda params, jobs, counted: found)
    monkeypatch.setattr("stages.first.show", lambda found: None)
    monkeypatch.setattr("stages.run.run", lambda jobs: ran.append(os.environ.get(TOLD)))
    said = CliRunner().invoke(cli.app, ["try", "birds"])
    assert said.exit_code == 0 and ran == ["1"] * stale and TOLD not in os.environ
    assert "data/birds/report/index.html\nnext: `terraalign classify PHOTO`, `terraalign serve`" in said.output


def reasons(table: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The captions of each file, and why what is left out."""
    found = read(Path("set"), table, "", None)
    return {row.id: row.captions for row in found.rows}, {one.name: one.reason for one in found.left_out}


def test_a_table_leaves_out_by_name_what_it_cannot_use() -> None:
    for at in range(3):
        picture(f"set/{at}.png")
    lines = [
        '{"file": "0.png", "text": "a"}', '{"file": "0.png", "text": ["b", " "]}', "{broken", "[1]",
        '{"file": "../x.png", "text": "t"}', '{"text": "t"}', '{"file": "1.png", "text": 7}',
        '{"file": "0.png", "text": "a"}', '{"file": "2.png", "text": ""}', '{"text": "t", "text": "u", "file": "1"}',
    ]  # fmt: skip
    text("set/t.jsonl", "\n".join(lines))
    captions, left_out = reasons("t.jsonl")
    assert captions == {"0.png": ["a", "b"], "2.png": []}
    assert left_out["t.jsonl:3"].startswith("not valid JSON: Expecting property name")
    assert left_out["t.jsonl:4"] == "no object, so without a file and a text"
    assert "is no file name below" in left_out["t.jsonl:5"]
    assert left_out["t.jsonl:6"] == "has no file, only text"
    assert left_out["t.jsonl:7"] == "has a int for 'text'; it must be a text or a list of texts"
    assert left_out["t.jsonl:8"] == "a repetition of an earlier line"
    assert left_out["t.jsonl:9"] == "with an empty text"
    assert "ambiguous, with two values of the key 'text'" in left_out["t.jsonl:10"]
    assert left_out["set/1.png"] == "named by no line of t.jsonl"


def test_a_table_in_csv_with_quotes_commas_and_groups() -> None:
    for at in range(3):
        picture(f"set/{at}.png")
    text("set/t.csv", '\ufefffile,caption,group\n0.png,"red, with\ngreen",g\n1.png,red, with green,g\n2.png,blue\n')
    found = read(Path("set"), "t.csv", "", None)
    assert {row.id: (row.captions, row.group) for row in found.rows} == {
        "0.png": (["red, with\ngreen"], "g"),
        "2.png": (["blue"], None),
    }
    assert found.left_out[0].name == "t.csv:4"
    assert found.left_out[0].reason == "has 4 cells, the header 3; put a text that holds ',' in quotes"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "a,b\n1.png,x\n", "t.csv:1: no header that is understood: 'a,b'; it needs a column file"),
        ("t.csv", "", "t.csv:1: no header that is understood"),
        ("t.jsonl", "\n", "no line can be used (empty)"),
        ("t.jsonl", '{"a": 1}', "no line can be used (t.jsonl:1: has no file, only a)"),
        ("t.json", '{"images": []}', "expected a list of objects, found a dict; or use source: coco"),
        ("t.json", "[{]", "t.json:1:3: not valid JSON"),
        ("t.csv", "\udcff", "not UTF-8 text"),
        ("gone.csv", None, "No such file"),
    ],
)
def test_a_table_that_is_none_is_told(name: str, content: str | None, message: str) -> None:
    Path("set").mkdir()
    if content is not None:
        Path("set", name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as caught:
        read(Path("set"), name, "", None)
    assert message in str(caught.value)


def test_a_table_becomes_a_manifest() -> None:
    names = [f"{at}.png" for at in range(20)]
    for at, name in enumerate(names):
        picture(f"set/pictures/{name}", at)
    entries = [{"path": name, "description": f"number {name}"} for name in names]
    text("set/captions.json", json.dumps(entries))
    layout = recognise(Path("set").resolve())
    written, _ = fitted(layout, "set", Path("set"), "init", SILENT)
    rows = prepare(parse_params(written, "set"), "captions").to_pylist()
    assert {row["id"]: row["captions"] for row in rows} == {name: [f"number {name}"] for name in names}
    assert {row["split"] for row in rows} == {"train", "val", "test"}
