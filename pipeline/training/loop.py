"""The one training loop, for pre-training and fine-tuning: accumulation, validation, checkpoint, resume."""

from __future__ import annotations

import functools
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.schema import Optimisation
from pipeline.errors import UserError
from pipeline.progress import progress_bar
from pipeline.started import NoPlan, Started
from pipeline.training.checkpoint import Checkpoint

CHECKPOINT_SECONDS = 120.0
History = list[dict[str, float]]


@dataclass
class Trainer:
    """A run: what to train, on which batches, with which loss, and when to validate.

    `groups` are AdamW's parameter groups; `loss` starts on the number of a batch, draws all that is random, and gives
    the scalar as its result; `validate` gives a row of the history; `extras` is state that `validate` may fill and
    that survives an interruption. `in_flight`: how many of a step's `accumulate` losses are under way at a time; it
    does not change the result. `max_seconds` of training end it too, and the learning rate then falls by the time.
    Seconds of training are, on a CPU, processor time by thread: what else the machine does makes nothing dearer.
    """

    name: str
    model: nn.Module
    groups: list[dict[str, Any]]
    settings: Optimisation
    examples: int
    seed: int
    loss: Callable[[int], Started]
    validate: Callable[[int], Mapping[str, float]]
    validate_at: set[int]
    checkpoint: Checkpoint
    extras: dict[str, Any] = field(default_factory=dict)
    history: History = field(default_factory=list)
    in_flight: int = 1
    max_seconds: float | None = None
    _seconds: float = field(default=0.0, init=False)  # of training so far

    def run(self) -> History:
        """Train to the end, leave the model in eval mode and return the history.

        Goes on where an interrupted run of the same key stopped.

        An interrupted and resumed run takes the same batches and ends with the same weights as an uninterrupted one.
        """
        total = total_steps(self.settings, self.examples)
        optimizer = torch.optim.AdamW(
            self.groups, lr=self.settings.lr, weight_decay=self.settings.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._rate(step, total))
        torch.manual_seed(self.seed)
        step, losses, seconds = self._resume(optimizer, schedule)
        self._seconds = seconds
        if step == 0 and not self.history:
            self._validate(0, math.nan, 0.0)
        began, saved = self._clock(), time.monotonic()
        timed = self.max_seconds is not None
        with progress_bar(self.name, int(self.max_seconds or total), "seconds" if timed else "steps") as advance:
            advance(int(seconds) if timed else step)
            while step < total and not self._out_of_time():
                losses.append(self._step(step, optimizer))
                before, self._seconds = self._seconds, seconds + self._clock() - began
                now = self._seconds
                schedule.step()
                step += 1
                advance(int(now) - int(before) if timed else 1)
                if step in self.validate_at or step == total or self._out_of_time():
                    self._validate(step, sum(losses) / len(losses), now)
                    losses.clear()
                    began, seconds = self._clock(), now  # validation is not training time
                if not losses or time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self._save(step, losses, now, optimizer, schedule)
                    saved = time.monotonic()
        self.model.eval()
        return self.history

    def _step(self, step: int, optimizer: torch.optim.Optimizer) -> float:
        self.model.train()
        accumulate, ahead = self.settings.accumulate, self.in_flight - 1
        started: deque[Started] = deque()
        losses: list[Tensor] = []
        for micro in range(accumulate + ahead):
            try:
                if micro < accumulate:
                    started.append(self.loss(step * accumulate + micro))
                if micro < ahead:
                    continue
                loss = started.popleft().result() / accumulate
            except NoPlan as error:
                raise UserError(self.name, f"step {step}: {error}", "lower lr") from None
            loss.backward()
            losses.append(loss.detach())
        total = sum(loss.item() for loss in losses)  # a GPU is waited for only here
        if not math.isfinite(total):
            raise UserError(self.name, f"the loss is {total} at step {step}", "lower lr")
        parameters = [parameter for group in self.groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    def _validate(self, step: int, train_loss: float, seconds: float) -> None:
        self.model.eval()
        with torch.no_grad():
            row = self.validate(step)
        self.history.append({"step": step, "seconds": round(seconds, 2), "train_loss": train_loss, **row})

    def _clock(self) -> float:
        on_gpu = any(parameter.is_cuda for parameter in self._trained())
        return time.monotonic() if on_gpu else time.process_time() / torch.get_num_threads()

    def _out_of_time(self) -> bool:
        return self.max_seconds is not None and self._seconds >= self.max_seconds

    def _rate(self, step: int, total: int) -> float:
        """Linear warm-up, then cosine decay to zero; by steps, or by the time where it is further on."""
        done = step if self.max_seconds is None else max(step, total * min(1, self._seconds / self.max_seconds))
        warmup = max(1, round(self.settings.warmup * total))
        if done < warmup:
            return min(1, (done + 1) / warmup)
        return 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1, total - warmup)))

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for group in self.groups for parameter in group["params"]]

    def _save(self, step: int, losses: list[float], seconds: float, optimizer: Any, schedule: Any) -> None:
        state = {"step": step, "losses": losses, "seconds": seconds, "history": self.history, "extras": self.extras}
        state |= {"weights": [p.detach() for p in self._trained()], "random": torch.get_rng_state()}
        state["random_cuda"] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        state |= {"optimizer": optimizer.state_dict(), "schedule": {"last_epoch": schedule.last_epoch}}
        self.checkpoint.save(state)

    @torch.no_grad()
    def _resume(self, optimizer: Any, schedule: Any) -> tuple[int, list[float], float]:
        state = self.checkpoint.load()
        if state is None:
            return 0, [], 0.0
        for parameter, saved in zip(self._trained(), state["weights"], strict=True):
            parameter.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        schedule.last_epoch = state["schedule"]["last_epoch"]
        torch.set_rng_state(state["random"])
        if state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])
        self.history[:] = state["history"]
        self.extras.update(state["extras"])
        print(f"{self.name}: goes on after step {state['step']}", file=sys.stderr)
        return state["step"], state["losses"], state["seconds"]


def steps_per_epoch(settings: Optimisation, examples: int) -> int:
    """Optimiser steps in an epoch; the last batch of an epoch may be small."""
    return math.ceil(math.ceil(examples / settings.batch) / settings.accumulate)


def total_steps(settings: Optimisation, examples: int) -> int:
    """Optimiser steps of a run."""
    most = sys.maxsize if settings.max_steps is None else settings.max_steps
    return min(settings.epochs * steps_per_epoch(settings, examples), most)


def points(total: int, count: int) -> set[int]:
    """The steps after which a run of so many is validated, so many times, at the end the last."""
    return {max(1, round(total * i / count)) for i in range(1, count + 1)}


def batch_at(number: int, size: int, examples: int, seed: int) -> list[int]:
    """The indices of the number-th batch of a run: a function of the seed alone, so a resumed run sees the same.

    Each epoch is a fresh permutation.
    """
    epoch, place = divmod(number, math.ceil(examples / size))
    return _order(epoch, examples, seed)[place * size : (place + 1) * size].tolist()


@functools.lru_cache(2)
def _order(epoch: int, examples: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(examples, generator=generator)


def write_history(path: Path, history: History) -> None:
    """The history as CSV, one row per validation.

    Without the seconds: a timing differs on every run and would make the stages after it stale.
    """
    import pandas as pd

    pd.DataFrame(history).drop(columns="seconds").to_csv(path, index=False, float_format="%.6g")
