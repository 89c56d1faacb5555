"""Extraction by many processes: the bytes of one process, whoever makes the shards and whoever dies meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from pipeline.config import Params
from pipeline.encoders.vision import load_vision_encoder
from pipeline.errors import UserError
from pipeline.extraction import distribute
from pipeline.extraction.images import ImageShards, extract_images
from pipeline.runs import STORE, Run
from pipeline.sources import manifest as manifest_table
from pipeline.sources.prepare import prepare
from pipeline.store import schema
from pipeline.store.dtypes import pack
from pipeline.store.shards import ShardFile, atomically, sha256_of, write_shard
from stages.cli import app

RUN = Run("tiny")

MANIFEST = RUN.features("images", "classes")
SHARDS = 5


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file of weights: random ones would differ from process to process."""
    path = tmp_path_factory.mktemp("weights") / "resnet10t.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t", num_classes=0).state_dict(), path)
    return path


@pytest.fixture
def params(tiny_params: Params, weights: Path) -> Params:
    """Thirty pictures of noise, every other one a JPEG, prepared, in five shards of several batches; the profile."""
    generator = np.random.default_rng(0)
    for i in range(30):
        path = Path(f"pictures/class{i % 2}/{i:02}.{'png' if i % 2 else 'jpg'}")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (24, 24, 3), np.uint8)).resize((64, 64)).save(path)
    values = tiny_params.model_dump(mode="json")
    values["data"]["classes"] |= {"source": "imagefolder", "root": "pictures", "count": None}
    values["vision"] |= {"pretrained": str(weights), "dtype": "float32", "batch": 2}
    values["cache"]["shards"] = SHARDS
    Path("params.yaml").write_text(yaml.safe_dump(values))
    params = Params.model_validate(values)
    manifest_table.write(prepare(params, "classes"), Run.of(params).manifest("classes"))
    return params


def run(*options: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["extract-images", "classes", *options])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return " ".join(result.output.split())


def taken() -> dict[str, bytes]:
    """All that is in the store now, which is then emptied."""
    found = {path.name: path.read_bytes() for path in STORE.glob("images/*/[!.]*") if path.suffix != ".json"}
    shutil.rmtree(STORE)
    return found


@pytest.fixture
def alone(params) -> tuple[dict[str, bytes], str]:
    """The shards and the manifest as one process makes them."""
    run()
    manifest = MANIFEST.read_text()
    MANIFEST.unlink()
    shards = taken()
    assert len(shards) == SHARDS
    return shards, manifest


def test_two_workers_make_what_one_process_makes(alone):
    run("--workers", "2")
    assert (MANIFEST.read_text(), taken()) == (alone[1], alone[0])


def test_ray_makes_what_one_process_makes_though_a_process_of_it_dies(params, alone):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2 * torch.get_num_threads(), include_dashboard=False, log_to_driver=False)
    rows, killed = [], []

    def advance(number: int) -> None:
        rows.append(number)
        for process in psutil.Process().children(recursive=True) if number and not killed else ():
            if not killed and "ray::_build" in " ".join(process.cmdline()):
                process.kill()
                killed.append(process.pid)

    encoder = load_vision_encoder(params.vision)
    try:
        made = extract_images(params, "classes", encoder, advance, make=distribute.with_ray(params, "classes"))
    finally:
        ray.shutdown()
    assert killed and sum(rows) == 30 and len(made.shards) == SHARDS
    assert taken() == alone[0]


def test_ray_that_is_not_there_is_named(params, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UserError, match=r"Ray is not installed; `pip install -e '.\[ray\]'`"):
        distribute.with_ray(params, "classes")


class Killer:
    """A progress bar's end that kills a worker at the first sign of life, and counts."""

    def __init__(self):
        self.rows, self.victim = 0, None

    def __call__(self, rows: int) -> None:
        self.rows += rows
        if self.victim is None and rows > 0:
            self.victim = multiprocessing.active_children()[0].pid
            os.kill(self.victim, signal.SIGKILL)


def test_a_killed_worker_is_named_and_another_makes_its_shard(params, alone, capsys):
    killer, encoder = Killer(), load_vision_encoder(params.vision)
    make = distribute.with_workers(params, "classes", 2)
    extract_images(params, "classes", encoder, killer, make=make)
    assert f"(process {killer.victim}) was killed by SIGKILL while it made" in capsys.readouterr().err
    assert killer.rows == 30, "the rows of the half shard are taken back"
    assert taken() == alone[0]


def test_without_workers_left_extraction_ends_and_goes_on_later(params, alone):
    killer, encoder = Killer(), load_vision_encoder(params.vision)
    make = distribute.with_workers(params, "classes", 1)
    with pytest.raises(UserError, match=r"worker 0 \(process \d+\) was killed by SIGKILL .* run the same command"):
        extract_images(params, "classes", encoder, killer, make=make)
    assert not list(STORE.glob("images/*/.*")), "nothing half written is left"
    extract_images(params, "classes", encoder, lambda n: None)
    assert taken() == alone[0]


def test_what_a_worker_raises_is_raised(params):
    Path("pictures/class1/07.png").write_bytes(b"x")
    encoder = load_vision_encoder(params.vision)
    with pytest.raises(UserError, match=r"07.png: changed since it was prepared"):
        extract_images(params, "classes", encoder, print, make=distribute.with_workers(params, "classes", 1))
    assert not multiprocessing.active_children()


def test_parts_make_up_the_whole_and_the_stage_finds_them(alone):
    assert "part 1/2: 2 of 5 shards are there" in run("--worker", "1/2")
    assert len(list(STORE.glob("images/*/*.arrow"))) == 2
    run("--worker", "1/2")
    assert len(list(STORE.glob("images/*/*.arrow"))) == 2, "a part is the same whatever is there"
    run("--worker", "0/2")
    assert not MANIFEST.exists()
    before = {path: path.stat().st_ino for path in STORE.glob("images/*/*.arrow")}
    run()
    assert {path: path.stat().st_ino for path in STORE.glob("images/*/*.arrow")} == before, "nothing is made again"
    assert (MANIFEST.read_text(), taken()) == (alone[1], alone[0])


@pytest.mark.parametrize("part", ["2/2", "1", "-1/2", "0/0", "a/b"])
def test_parts_that_are_none(params, part):
    assert "expected I/N with I from 0 to N - 1" in run("--worker", part, code=2)


def test_weights_that_each_process_would_draw_are_refused(params):
    values = yaml.safe_load(Path("params.yaml").read_text())
    values["vision"]["pretrained"] = "random"
    Path("params.yaml").write_text(yaml.safe_dump(values))
    for options in (["--workers", "2"], ["--worker", "0/2"]):
        assert "each process would draw its own weights" in run(*options, code=2)


def test_a_process_with_another_encoder_is_refused(params):
    job = distribute.Job(params, "classes", "0" * 24, Path.cwd(), torch.get_num_threads())
    with pytest.raises(UserError, match="a worker has another encoder"):
        job.load()


def test_two_processes_may_make_the_same_shard_at_once(params, alone):
    """Threads here: both are half way when they meet."""
    encoder, meeting = load_vision_encoder(params.vision), threading.Barrier(2)
    work = [ImageShards(params, "classes", encoder) for _ in range(2)]
    path = next(iter(work[0].parts))

    def build(one: ImageShards):
        met = []

        def advance(rows: int) -> None:
            if not met:
                met.append(meeting.wait(20))

        return one.build(path, advance)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(build, work)
    assert first == second
    assert taken() == {path.name: alone[0][path.name]}


def test_workers_share_the_gpus(params, monkeypatch):
    assert distribute.device_of(params, 1) == "auto"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [distribute.device_of(params, worker) for worker in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]


@pytest.mark.parametrize("order", [np.arange(50), np.random.default_rng(0).permutation(50)], ids=["in order", "mixed"])
@pytest.mark.parametrize("dtype", list(schema.STORED))
def test_a_shard_written_row_by_row_has_the_same_bytes(tmp_path, dtype, order):
    columns = pack(torch.randn(50, 7, 5), dtype)
    arrow = schema.image_schema((7, 5), dtype, "x")
    leading = [pa.array([f"id {i}" for i in range(50)]), pa.array([f"{i:064}" for i in range(50)])]
    tensors = [schema.tensor_column(columns[name], arrow.field(name)) for name in arrow.names[2:]]
    whole = write_shard(tmp_path / "whole.arrow", pa.table([*leading, *tensors], arrow))
    with atomically(tmp_path / "rows.arrow") as stream:
        file = ShardFile(stream, arrow, leading)
        for at in np.array_split(order, 9):
            file.put(at.tolist(), {name: column[at] for name, column in columns.items()})
        sha256 = file.finish()
    assert sha256 == whole.sha256 == sha256_of(tmp_path / "whole.arrow")
    assert (tmp_path / "rows.arrow").read_bytes() == (tmp_path / "whole.arrow").read_bytes()
    assert (tmp_path / "rows.arrow").stat().st_mode == (tmp_path / whole.name).stat().st_mode
