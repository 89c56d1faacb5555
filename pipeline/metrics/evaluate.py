"""The figures of a fine-tuned adapter, by the tasks and metrics that the parameters name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.config import LLM, Params, components
from pipeline.llms.load import LanguageModel, load_llm
from pipeline.metrics.base import Metric, Tested, write_figures
from pipeline.metrics.choice import Chooser
from pipeline.metrics.speeds import keep_speeds
from pipeline.naming.table import Named
from pipeline.origin import check_results
from pipeline.runs import Run
from pipeline.store.reader import ImageTokens
from pipeline.tasks.base import SPEEDS, Task
from pipeline.vlm import VLM, tuned


@dataclass(frozen=True)
class Candidate:
    """A fine-tuned adapter and the pre-trained one that it came from, in one LLM that is loaded once."""

    llm: LanguageModel
    run: Run
    adapter: str
    recipe: str
    hints: int = 0
    classes: str | None = None  # the data set that is asked of, where it has classes

    def named(self) -> Named | None:
        return Named.read(self.run, self.adapter, self.classes) if self.classes else None

    @contextmanager
    def pretrained(self) -> Iterator[VLM]:
        with tuned(self.llm, self.run.pretrained(self.adapter), "last") as model:
            yield model

    @contextmanager
    def finetuned(self) -> Iterator[VLM]:
        with tuned(self.llm, self.run.finetuned(self.adapter, self.recipe), "adapter") as model:
            yield model


def evaluate(params: Params, adapter: str, recipe: str) -> None:
    """Answers to the test pictures of each data set of a recipe, and their figures, into evaluate/<adapter>-<recipe>.

    Raises UserError when an adapter is not there, or is of other models or weights than those of now.
    """
    run, sets = Run.of(params), params.finetune.recipes[recipe].data
    images = {data: ImageTokens.open(run, data) for data in sets}
    check_results(run, adapter, params.llm, {recipe: sets})
    llm, hints = load_llm(params.llm, params.runtime.device), params.finetune_for(adapter, recipe).hints
    speeds: dict[str, dict[str, float]] = {}
    for data in sets:
        name = params.data[data].task
        candidate = Candidate(llm, run, adapter, recipe, hints, data if name == "classify" else None)
        task, folder = Task.of(name, params.evaluate), run.evaluated(adapter, recipe) / data
        folder.mkdir(parents=True, exist_ok=True)
        predictions = task.predict(candidate, images[data], params.evaluate.batch, params.seed)
        task.write(predictions, folder)
        if predictions.attrs.get(SPEEDS):
            speeds[data] = predictions.attrs[SPEEDS]
        tested = Tested(params, data, images[data], predictions, chooser_of(params, llm))
        figures = [figure for metric in metrics_of(params, name) for figure in metric.figures(tested)]
        write_figures(run.evaluated(adapter, recipe), data, figures, list(predictions["id"]))
    keep_speeds(run, f"evaluate@{adapter}-{recipe}", speeds)


def chooser_of(params: Params, llm: LanguageModel) -> Callable[[LLM | None], Chooser]:
    """What `Tested.chooser` is; `llm` is the run's own, which is not loaded a second time."""

    def chooser(wanted: LLM | None) -> Chooser:
        wanted = wanted or params.llm
        asked = llm if wanted == params.llm else load_llm(wanted, params.runtime.device)
        return Chooser(asked, params.evaluate.batch)

    return chooser


def metrics_of(params: Params, task: str) -> list[Metric]:
    """The metrics of evaluate.metrics that measure a task, in their order."""
    chosen = [(components.find("metric", settings.metric), settings) for settings in params.evaluate.metrics]
    return [metric(settings) for metric, settings in chosen if task in metric.tasks]
