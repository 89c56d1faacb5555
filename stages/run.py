"""`terraalign run`: the graph, several stages side by side."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from pipeline.errors import UserError, UserErrors
from pipeline.progress import new_progress

# What DVC says of itself around what a stage says; and while another of its processes writes, for moments.
AROUND = re.compile(
    r"\s*$|Running stage |> terraalign |Updating lock file|Use `dvc push`|ERROR: failed to reproduce"
    r"|To track the changes with git, run:$|\tgit add .*dvc\.lock"
    r"|To enable auto staging, run:$|\tdvc config core\.autostage"
)
BUSY = re.compile("Unable to acquire lock|is busy, it is being blocked")
PATIENCE = 60.0  # seconds
DEFAULTS = "pipeline/config/defaults.yaml"  # which dvc.yaml reads beside params.yaml


def run(
    jobs: Annotated[int, typer.Option(min=1, help="Stages side by side; each gets its share of the cores.")] = 2,
) -> None:
    """Run the graph as `dvc repro` does, but stages side by side where none waits for the other.

    Half of a short stage is spent on one core, so two at a time on a core each are done sooner than one after the other
    on both; one that all others wait for has all cores. On a GPU, whose memory they would share, take --jobs 1. What is
    up to date is skipped. What fails is shown; stages that are at work end, no other is begun, and the same command
    goes on from there.
    """
    stages = stages_of_graph()
    to_the_end = lengths(stages)
    # First what most waits for, or the last long chain runs alone in the end.
    faults = run_stages(stages, jobs, to_the_end.__getitem__)
    if faults:
        raise UserErrors([*faults, UserError("", "run the same command again to go on")])


def run_stages(
    stages: dict[str, list[str]], jobs: int, urgency: Callable[[str], int], go_on: bool = False,
    threads: int | None = None,
) -> list[UserError]:  # fmt: skip
    """Run stages side by side, given with those that each depends on; returns what failed, with its output.

    The most urgent of those that wait is next; of equals one whose kind is not being run already: two of a kind may
    prepare the same thing, such as an LLM's weights, at the same time. After a failure none is begun any more, or with
    `go_on` none that depends on it. Each has so many `threads`; default: its share of the cores.
    """
    sorter = TopologicalSorter(stages)
    sorter.prepare()
    waiting: list[str] = []
    running: dict[Future[str], str] = {}
    faults: list[UserError] = []
    with ThreadPoolExecutor(jobs) as pool, new_progress("stages") as progress:
        task = progress.add_task("stages", total=len(stages))
        while sorter.is_active():
            waiting += sorter.get_ready()
            while waiting and len(running) < jobs and (go_on or not faults):
                kinds = {_kind(other) for other in running.values()}
                stage = max(waiting, key=lambda stage: (urgency(stage), _kind(stage) not in kinds))
                waiting.remove(stage)
                # One that nothing else can run beside has all cores: none becomes ready before it is done.
                share = (os.cpu_count() or 1) // (jobs if running or waiting else 1)
                running[pool.submit(_repro, stage, threads or max(1, share))] = stage
            if not running:
                break  # all that is left depends on what failed
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                stage = running.pop(future)
                try:
                    progress.console.print(future.result(), markup=False, highlight=False, soft_wrap=True)
                    sorter.done(stage)
                    progress.advance(task)
                except UserError as fault:
                    faults.append(fault)
    return faults


def _kind(stage: str) -> str:
    return stage.partition("@")[0]


def lengths(stages: dict[str, list[str]]) -> dict[str, int]:
    """How many stages, one after the other, wait for each."""
    found = dict.fromkeys(stages, 0)
    for stage in reversed(list(TopologicalSorter(stages).static_order())):
        for before in stages[stage]:
            found[before] = max(found[before], found[stage] + 1)
    return found


def stages_of_graph() -> dict[str, list[str]]:
    """The stages of dvc.yaml by name, with those that each depends on; UserError when DVC cannot read it."""
    return _asked(lambda repo: {})[0]


def stale_stages() -> tuple[dict[str, list[str]], set[str]]:
    """The same, and those of them that DVC would run, or that follow one of these."""
    graph, status = _asked(lambda repo: repo.status())
    stale = set(status)
    for stage in TopologicalSorter(graph).static_order():
        if stale.intersection(graph[stage]):
            stale.add(stage)
    return graph, stale


def stages_with(params: str) -> dict[str, list[str]]:
    """The stages that dvc.yaml has with other parameters, given as the text of params.yaml; nothing here is touched."""
    with TemporaryDirectory() as folder:
        for file in ("dvc.yaml", DEFAULTS):
            (Path(folder) / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, Path(folder) / file)
        (Path(folder) / "params.yaml").write_text(params, encoding="utf-8")
        return _asked(lambda repo: {}, folder)[0]


def _asked(
    question: Callable[[Any], dict[str, Any]], folder: str | None = None
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """The graph, and what DVC's repository answers, of this folder or one that is none; UserError when it can't."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(folder, uninitialized=folder is not None) as repo:
            graph = repo.index.graph
            # A stage's address has the file before its name where that is in another folder.
            names = {stage: stage.addressing.rpartition(":")[2] for stage in graph}
            found = {name: [names[other] for other in graph.successors(stage)] for stage, name in names.items()}
            return found, question(repo)
    except DvcException as error:
        raise UserError("dvc.yaml", " ".join(str(error).split()), "run `dvc repro` to see more") from None


def _repro(stage: str, threads: int) -> str:
    """Have DVC run a single stage; returns what there is to say of it. Raises UserError with its output on failure."""
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    command = [sys.executable, "-P", str(Path(__file__).with_name("repro.py")), stage]
    began = time.monotonic()
    while True:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            check=False,
        )  # fmt: skip
        if done.returncode == 0 or not BUSY.search(done.stdout) or time.monotonic() - began > PATIENCE:
            break
        time.sleep(1)
    said = "\n".join(f"  {line}" for line in done.stdout.splitlines() if not AROUND.match(line))
    if done.returncode:
        raise UserError("", f"{stage} failed:\n{said}")
    if "didn't change, skipping" in done.stdout:
        return f"{stage}: up to date"
    return f"{stage}: {time.monotonic() - began:.0f} s" + (f"\n{said}" if said else "")
