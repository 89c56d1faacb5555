"""Extraction by many processes: workers on this machine, or tasks of a Ray cluster.

Each loads the encoder itself and makes one shard after the other by ImageShards.build, as a single process would, with
the same bytes. Shards are handed out one at a time, so a slow process holds nobody up.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Params
from pipeline.devices import pick_device
from pipeline.encoders.base import RANDOM
from pipeline.encoders.vision import load_vision_encoder
from pipeline.errors import UserError
from pipeline.extraction.images import ImageShards
from pipeline.extraction.work import Advance, Make
from pipeline.store.shards import Shard, remove_temporary

AGAIN = "run the same command again: it goes on where it stopped"


@dataclass(frozen=True)
class Job:
    """What a process has to know to make shards of image tokens; on a CPU `threads` forward passes run side by side."""

    params: Params
    data: str
    fingerprint: str
    folder: Path
    threads: int

    def load(self) -> ImageShards:
        """Load the encoder in a process of its own.

        Raises UserError when it is not the one of the process that gave the job.
        """
        os.chdir(self.folder)
        torch.set_num_threads(self.threads)
        work = ImageShards(self.params, self.data, load_vision_encoder(self.params.vision, self.params.runtime.device))
        if work.fingerprint != self.fingerprint:
            raise UserError(
                "",
                "a worker has another encoder, number type or pictures than the process that started it",
                "give all the same weights, pictures and vision.dtype",
            )
        return work


def check_named_weights(params: Params) -> None:
    """UserError when each process would draw weights of its own."""
    if params.vision.pretrained == RANDOM:
        raise UserError(f"vision.pretrained {RANDOM}", "each process would draw its own weights", "name a weights file")


def with_workers(params: Params, data: str, count: int) -> Make:
    """A way to make shards by `count` processes on this machine, which share its cores and GPUs.

    A worker that dies is named on stderr, and the others make its shard. Raises UserError when none is left; what a
    worker raises is raised here.
    """
    check_named_weights(params)

    def make(paths: list[Path], advance: Advance) -> dict[Path, Shard]:
        if not paths:
            return {}
        number = min(count, len(paths))
        runtime = {"decode_threads": max(1, params.runtime.decode_threads // number)}
        job = Job(params, data, paths[0].parent.name, Path.cwd(), max(1, torch.get_num_threads() // number))
        workers = [_Worker(i, _adapted(job, device=device_of(params, i), **runtime)) for i in range(number)]
        try:
            return _hand_out(paths, workers, advance)
        finally:
            for worker in workers:
                worker.end(paths[0].parent)

    return make


def _adapted(job: Job, **runtime: Any) -> Job:
    values = job.params.runtime.model_copy(update=runtime)
    return replace(job, params=job.params.model_copy(update={"runtime": values}))


def device_of(params: Params, worker: int) -> str:
    """GPUs in turn, where there are several and params.yaml names none."""
    device, count = params.runtime.device, torch.cuda.device_count()
    return f"cuda:{worker % count}" if device in ("auto", "cuda") and count > 1 else device


class _Worker:
    """A process that makes the shards it is given, as the one that started it sees it."""

    def __init__(self, number: int, job: Job):
        context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads half, and CUDA not at all
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, job), daemon=True)
        self.process.start()
        theirs.close()  # else its end would not be noticed
        self.number, self.path, self.rows = number, Path(), 0
        self.idle = self.alive = True

    def give(self, path: Path) -> None:
        self.path, self.rows, self.idle = path, 0, False
        with contextlib.suppress(BrokenPipeError):  # it died: `hear` notices
            self.connection.send(path)

    def hear(self) -> int | Shard | None:
        """Rows done, a whole shard, or None when the process died; raises what it raised."""
        try:
            message: int | Shard | Exception = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            self.alive, self.idle = False, False
            return None
        if isinstance(message, Exception):
            raise message
        if isinstance(message, int):
            self.rows += message
        else:
            self.idle = True
        return message

    def fate(self) -> str:
        code = self.process.exitcode or 0
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"worker {self.number} (process {self.process.pid}) {end} while it made {self.path.name}"

    def end(self, folder: Path) -> None:
        self.process.kill()
        self.process.join()
        remove_temporary(folder, self.process.pid or 0)


def _hand_out(paths: list[Path], workers: list[_Worker], advance: Advance) -> dict[Path, Shard]:
    waiting, made = deque(paths), dict[Path, Shard]()
    while len(made) < len(paths):
        for worker in workers:
            if worker.idle and waiting:
                worker.give(waiting.popleft())
        busy = [worker for worker in workers if worker.alive and not worker.idle]
        if not busy:
            raise UserError("", f"{workers[-1].fate()}, and no other is left", AGAIN)
        speaking = wait([worker.connection for worker in busy])
        for worker in busy:
            if worker.connection not in speaking:
                continue
            message = worker.hear()
            if isinstance(message, Shard):
                made[worker.path] = message
            elif message is not None:
                advance(message)
            else:
                print(f"{worker.fate()}; others make it now", file=sys.stderr)
                advance(-worker.rows)
                waiting.append(worker.path)
    return made


def _serve(connection: Connection, job: Job) -> None:
    """A worker's life: sends how many rows it has done, each shard it made, or what it raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the process that started this one, which ends it
    try:
        work = job.load()
        while True:
            connection.send(work.build(connection.recv(), connection.send))
    except (EOFError, BrokenPipeError):
        return  # the process that started this one is gone
    except Exception as fault:
        fault.add_note(traceback.format_exc())
        connection.send(fault)


def with_ray(params: Params, data: str) -> Make:
    """A way to make shards by tasks of a Ray cluster: RAY_ADDRESS, or one that is started on this machine.

    All nodes see the project folder under the same path. A task takes as many cores as torch has threads here, or
    all of the largest node if that has fewer, and a GPU where runtime.device finds one. Tasks whose process or node
    dies are tried again, three times.
    """
    check_named_weights(params)
    try:
        import ray
    except ImportError:
        raise UserError("runtime.engine ray", "Ray is not installed", "`pip install -e '.[ray]'`") from None

    def make(paths: list[Path], advance: Advance) -> dict[Path, Shard]:
        if not paths:
            return {}
        if not ray.is_initialized():
            ray.init()
        largest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        cores = min(torch.get_num_threads(), largest)
        job = Job(params, data, paths[0].parent.name, Path.cwd(), max(1, cores))
        gpus = int(pick_device(params.runtime.device).type == "cuda")
        task = ray.remote(num_cpus=cores, num_gpus=gpus, max_retries=3)(_build)
        pending = {task.remote(job, path): path for path in paths}
        made = dict[Path, Shard]()
        while pending:
            [done], _ = ray.wait(list(pending))
            path = pending.pop(done)
            try:
                made[path] = ray.get(done)
            except ray.exceptions.RayTaskError as fault:
                raise fault.cause from None
            except ray.exceptions.RayError as fault:
                raise UserError(path.name, " ".join(str(fault).split()), AGAIN) from None
            advance(made[path].rows)
        return made

    return make


_loaded: list[tuple[Job, ImageShards]] = []


def _build(job: Job, path: Path) -> Shard:
    """A Ray task. Ray keeps its processes, and so they keep the encoder."""
    if not _loaded or _loaded[0][0] != job:
        _loaded[:] = [(job, job.load())]
    return _loaded[0][1].build(path, lambda n: None)
