"""The feature store: what is made anew after a change, how damage is found and mended, and copies elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from pipeline.config import Params
from pipeline.encoders.vision import load_vision_encoder
from pipeline.errors import UserError
from pipeline.extraction.captions import extract_captions
from pipeline.extraction.images import extract_images
from pipeline.runs import STORE, Run
from pipeline.sources import manifest as manifest_table
from pipeline.sources.prepare import prepare as read_pictures
from pipeline.store.inventory import folders, timings, verify
from pipeline.store.reader import ImageTokens
from pipeline.store.shards import Manifest, in_use, read_record
from stages.cli import app

RUN = Run("tiny")
BASE = RUN.base


class Counting:
    """A cheap encoder that counts the pictures it encodes; `name` tells two of them apart."""

    def __init__(self, name="one", by_place=False):
        self.identity = {"encoder": name}
        self.seen, self.by_place = list[int](), by_place  # of each batch: they are encoded side by side

    @property
    def pictures(self):
        return sum(self.seen)

    def preprocess(self, image):
        return torch.from_numpy(np.asarray(image.resize((8, 8)), np.float32)).permute(2, 0, 1) / 255

    def encode(self, pixels):
        self.seen.append(int((pixels.flatten(1).any(1)).sum()))
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
    manifest_table.write(read_pictures(params, "classes"), Run.of(params).manifest("classes"))
    return params


def extract(params: Params, encoder) -> Manifest:
    manifest = extract_images(params, "classes", encoder, lambda n: None)
    manifest.write(RUN.features("images", "classes"))
    return manifest


def contents(manifest: Manifest) -> dict[str, bytes]:
    return {shard.name: (manifest.folder / shard.name).read_bytes() for shard in manifest.files}


def edit(name: str) -> None:
    with Image.open(name) as picture:
        Image.eval(picture, lambda x: 255 - x).save(name)


CHANGES = [("edit", False), ("add", False), ("remove", False), ("rename", False), ("edit", True), ("add", True)]


@pytest.mark.parametrize(("change", "real"), CHANGES, ids=lambda value: {False: "cheap", True: "resnet10t"}.get(value))
def test_a_changed_picture_is_all_that_is_encoded(pictures, change, real):
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


def test_half_a_shard_is_made_again(pictures, capsys):
    encoder = Counting()
    manifest = extract(pictures, encoder)
    before = contents(manifest)
    first = manifest.folder / manifest.shards[0].name
    replace(first, before[first.name][:-10])
    assert extract(pictures, encoder) == manifest and contents(manifest) == before
    assert f"{first}: not a whole Arrow file" in capsys.readouterr().err


def test_another_number_of_shards_encodes_nothing(pictures):
    before = extract(pictures, Counting())
    after = extract(pictures.model_copy(update={"cache": pictures.cache.model_copy(update={"shards": 5})}), Counting())
    records = [read_record(after.folder / shard.name)[1] for shard in after.shards if shard not in before.shards]
    assert len(records) >= 4 and all(record["encoded"] == 0 for record in records)


def test_back_to_an_earlier_encoder_costs_nothing(pictures):
    first, second = Counting("one"), Counting("two")
    before = extract(pictures, first)
    extract(pictures, second)
    assert first.pictures == second.pictures == 20
    assert extract(pictures, first) == before
    assert first.pictures == 20


def test_a_changed_caption_makes_its_shard_alone(tiny_params, tiny_llm):
    path = Run.of(tiny_params).manifest("captions")
    table = read_pictures(tiny_params, "captions")
    manifest_table.write(table, path)
    before = extract_captions(tiny_params, "captions", *tiny_llm, lambda n: None)
    kept = {shard.name: (before.folder / shard.name).stat().st_mtime_ns for shard in before.shards}
    captions = table["captions"].to_pylist()
    captions[3][0] = "something else altogether"
    manifest_table.write(
        table.set_column(table.column_names.index("captions"), table.field("captions"), [captions]), path
    )
    after = extract_captions(tiny_params, "captions", *tiny_llm, lambda n: None)
    assert len({shard.name for shard in after.shards} - set(kept)) == 1
    assert sum((after.folder / name).stat().st_mtime_ns == time for name, time in kept.items()) == 3
    incremental = contents(after)
    shutil.rmtree(STORE)
    assert contents(extract_captions(tiny_params, "captions", *tiny_llm, lambda n: None)) == incremental


@pytest.fixture
def tiny_llm(tiny_params):
    from pipeline.llms.load import load_embedding, load_tokenizer

    return load_tokenizer(tiny_params.llm), load_embedding(tiny_params.llm)


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["store", *arguments])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return " ".join(result.output.split())


@pytest.fixture
def active(pictures: Params, monkeypatch) -> tuple[Counting, Manifest]:
    """The pictures as the active profile, extracted with a counting encoder that the commands get, too."""
    encoder = Counting()
    monkeypatch.setattr("pipeline.encoders.vision.load_vision_encoder", lambda *_: encoder)
    Path("params.yaml").write_text(yaml.safe_dump(pictures.model_dump(mode="json")))
    manifest = extract(pictures, encoder)
    encoder.seen.clear()
    return encoder, manifest


def replace(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def damage(path: Path, how: str, other: Path, foreign: bytes) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        replace(path, content[:-100])
    elif how == "damaged":
        flip(path, len(content) // 2)
    elif how == "foreign: holds":
        replace(path, other.read_bytes())
    else:
        replace(path, foreign)


@pytest.mark.parametrize("how", ["missing", "truncated", "damaged", "foreign: holds", "foreign: made by another"])
def test_verify_names_the_damage_and_mends_it(active, pictures, how):
    encoder, manifest = active
    before = contents(manifest)
    foreign = extract_images(pictures, "classes", Counting("another"), lambda n: None)
    assert "3 files of profile tiny are what its manifests name" in run("verify")
    victim, other, *_ = (manifest.folder / shard.name for shard in manifest.shards)
    damage(victim, how, other, (foreign.folder / victim.name).read_bytes())
    output = run("verify", code=1)
    assert f"{victim}: {how}" in output and other.name not in output.replace(f"content of {other.name}", "")
    output = run("verify", "--repair")
    assert "3 files of profile tiny" in output
    assert contents(manifest) == before
    assert encoder.pictures == manifest.shards[0].rows, "the other shards are not extracted again"
    assert "made anew" not in run("verify")


def test_a_stray_file_is_foreign_and_an_older_shard_is_not(active, pictures):
    encoder, before = active
    edit("pictures/class1/07.png")
    prepare(pictures)
    manifest = extract(pictures, encoder)
    run("verify")  # the older shard is whole and waits for its pictures to come back
    stray = manifest.folder / f"{'0' * 24}.arrow"
    stray.write_bytes((manifest.folder / manifest.shards[0].name).read_bytes())
    assert f"{stray}: foreign: no manifest names it" in run("verify", code=1)
    run("verify", "--repair")
    assert not stray.exists() and all((manifest.folder / shard.name).exists() for shard in before.shards)


def test_any_flipped_bit_is_found(active):
    """Wherever it is: in the numbers, Arrow's metadata, the ids, or the padding between."""
    _, manifest = active
    path = manifest.folder / manifest.shards[1].name
    content = path.read_bytes()
    generator = np.random.default_rng(1)
    spots = [*range(0, 2000, 97), *(len(content) - 1 - n for n in range(0, 2000, 97))]
    for at in [*spots, *generator.integers(0, len(content), 20).tolist()]:
        flip(path, at, 1 << int(generator.integers(8)))
        [fault] = verify("tiny")
        assert fault.path == path and fault.what.startswith(("damaged", "foreign"))
        replace(path, content)


def test_a_repair_that_gives_other_bits_says_so(active, monkeypatch):
    encoder, manifest = active
    (manifest.folder / manifest.shards[0].name).unlink()
    monkeypatch.setattr(encoder, "encode", lambda pixels: Counting.encode(encoder, pixels) * 1.5)
    assert "has other bits than the manifest names" in run("verify", "--repair", code=2)


def test_a_repair_under_other_parameters_says_so(active, monkeypatch):
    encoder, manifest = active
    (manifest.folder / manifest.shards[0].name).unlink()
    monkeypatch.setattr(encoder, "identity", {"encoder": "another"})
    assert "its manifest is of other parameters or pictures" in run("verify", "--repair", code=2)
    assert encoder.pictures == 0


def test_readers_refuse_another_schema(active):
    _, manifest = active
    path = manifest.folder / manifest.shards[0].name
    table = pa.ipc.open_file(path).read_all()
    for other, message in [
        (table.drop_columns("sha256"), "of another schema"),
        (table.cast(table.schema.set(0, pa.field("id", pa.large_string()))), "of another schema"),
        (table.replace_schema_metadata({**table.schema.metadata, b"dtype": b"float32"}), "of another schema"),
        (table.replace_schema_metadata({**table.schema.metadata, b"format": b"terraalign/1"}), "format terraalign/1"),
    ]:
        with pa.ipc.new_file(path.with_suffix(".new"), other.schema) as writer:
            writer.write_table(other)
        path.with_suffix(".new").replace(path)
        with pytest.raises(UserError, match=message):
            ImageTokens.open(RUN, "classes")


def test_ls_and_stats_say_what_is_there(active, pictures):
    encoder, manifest = active
    extract_images(pictures, "classes", Counting("another"), lambda n: None)
    used, other = sorted(folders(), key=lambda folder: folder.unused)
    assert (used.fingerprint, used.files, used.rows, used.unused) == (manifest.fingerprint, 3, 20, 0)
    assert used.uses == ["tiny: classes"] and used.bytes == sum(map(len, contents(manifest).values()))
    assert (other.files, other.rows, other.unused, other.uses) == (3, 20, 3, [])
    assert "used by nobody" in run("ls") and "used by tiny: classes" in run("ls")
    edit("pictures/class1/07.png")
    prepare(pictures)
    extract(pictures, encoder)
    took = timings("images", manifest.fingerprint)
    assert took["encoded"] == 21 and took["copied"] > 0
    assert 0 < took["encode"] + took["write"] + took["copy"] < took["all"]
    assert min(took["read"], took["decode"]) > 0
    assert "21 encoded at" in run("stats")


def test_prune_removes_what_no_manifest_names(active, pictures):
    encoder, before = active
    edit("pictures/class1/07.png")
    prepare(pictures)
    manifest = extract(pictures, encoder)
    extract_images(pictures, "classes", Counting("another"), lambda n: None)
    (manifest.folder / ".half.arrow.123").write_bytes(b"x")
    [old] = {s.name for s in before.shards} - {s.name for s in manifest.shards}
    output = run("prune")
    assert "9 files" in output and "prune --yes" in output  # 3 + 1 shards with their records, 1 temporary file
    assert (manifest.folder / old).exists()
    run("prune", "--yes")
    assert {path.name for path in manifest.folder.glob("*.arrow")} == {shard.name for shard in manifest.shards}
    assert len(list((STORE / "images").iterdir())) == 1 and len(list(manifest.folder.iterdir())) == 6
    assert "nothing to remove" in run("prune", "--yes")
    assert "3 files of profile tiny" in run("verify")


def test_prune_waits_for_extractions_and_warns_of_interrupted_ones(active):
    with in_use():
        assert "an extraction is at work" in run("prune", "--yes", code=2)
    RUN.features("images", "classes").unlink()
    assert "note: images of classes, profile tiny, has no manifest" in run("prune")


URLS = ["file", "memory", "s3"]


@pytest.fixture(params=URLS)
def url(request, tmp_path, monkeypatch):
    """A place to push to: a folder, fsspec's memory, and S3 as a local server gives it."""
    if request.param != "s3":
        yield f"file://{tmp_path}/else where" if request.param == "file" else f"memory://{tmp_path.name}"
        return
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for key, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket/features"
    server.stop()


def test_push_and_pull(active, url):
    _, manifest = active
    before = contents(manifest)
    assert "3 files pushed, 0 were there" in run("push", url)
    assert "0 files pushed, 3 were there" in run("push", url)
    there, root = fsspec.core.url_to_fs(url)
    names = [path.rpartition("/")[2] for path in there.find(root)]
    assert sorted(names) == sorted(before), "nothing but shards under their own names"
    first, second, _ = (manifest.folder / shard.name for shard in manifest.shards)
    first.unlink()
    flip(second, -1000)
    assert "2 files pulled, 1 were there" in run("pull", url)
    assert contents(manifest) == before and first.stat().st_mode & 0o222 == 0
    shutil.rmtree(STORE)
    assert "3 files pulled" in run("pull", url)
    assert contents(manifest) == before
    assert "3 files of profile tiny" in run("verify")
    target = f"{root}/images/{manifest.fingerprint}/{first.name}"
    there.pipe_file(target, there.cat_file(target)[:-1])
    assert "1 files pushed, 2 were there" in run("push", url), "half a file is sent again"
    there.pipe_file(target, there.cat_file(target)[:-1] + b"x")
    first.unlink()
    assert "not what the manifest names" in run("pull", url, code=2)
    assert not first.exists() and not list(manifest.folder.glob(".*"))
    there.rm(target)
    assert "push it first" in run("pull", url, code=2)


def test_transfers_refuse_what_cannot_be_right(active):
    _, manifest = active
    flip(manifest.folder / manifest.shards[0].name, -1000)
    assert "not what its manifest names" in run("push", "memory://damaged", code=2)
    assert "nosuch" in run("push", "nosuch://x", code=2)
    RUN.features("images", "classes").unlink()
    assert "no feature manifest" in run("pull", "memory://damaged", code=2)


def test_killed_processes_leave_whole_shards_and_the_same_bytes_in_the_end():
    script = Path(__file__).parents[1] / "benchmarks" / "kill_extraction.py"
    options = ["--kills", "5", "--encoder", "tiny", "--pictures", "60"]
    done = subprocess.run(
        [sys.executable, script, *options], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(script.parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 kills; 16 shards have the bytes of the uninterrupted run" in done.stdout


def test_the_documented_way_to_read_works(active):
    """The code of docs/store.md, as it stands there apart from the data set's name."""
    page = (Path(__file__).parents[1] / "docs" / "store.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert len(code.strip().splitlines()) <= 12
    found = {}
    code = code.replace("data/demo/images/captions", "data/tiny/images/classes")
    exec(code, {"print": lambda row_id, shape, dtype: found.update({row_id: (shape, dtype.name)})})
    assert found == dict.fromkeys(ImageTokens.open(RUN, "classes").ids, ((64, 3), "float16"))
