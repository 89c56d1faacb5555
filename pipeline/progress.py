"""One progress bar for all long work: done, rate, time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        if not rate:
            return Text("")
        return Text(f"{rate:.1f} {self.unit}/s" if rate >= 0.1 else f"{1 / rate:.0f} s each")


def new_progress(unit: str) -> Progress:
    """Bars on stderr with count, rate in `unit` and time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), speed_estimate_period=60)


@contextmanager
def progress_bar(description: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show one bar while the body runs; it gets a function that advances the bar by n units."""
    with new_progress(unit) as progress:
        task = progress.add_task(description, total=total)
        yield lambda n: progress.update(task, advance=n)
