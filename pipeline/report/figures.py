"""Results as figures: for machines under flat keys, for the terminal as a table, and written for people."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.config import Params
from pipeline.metrics.base import Figure
from pipeline.report.results import Outcome, Results
from pipeline.report.ways import is_detail

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = 5  # of figures in a terminal
RETRIEVAL = re.compile(r"r\d+_\w+")  # r1_raw, r5_debiased: of what pre-training measures, the rest are distances


def flat_metrics(results: Results) -> dict[str, float | None]:
    """The figures of a profile under flat keys, for `dvc metrics diff`; null where a figure is not finite.

    emd/<adapter>/<key> (of another objective its name for emd, but for plain_*), retrieval/<adapter>/<key>,
    pca/<adapter>/<state>/k80, <data>/<adapter>/<figure> of names without the LLM, <data>/<adapter>/<recipe>/<figure>,
    <data>/<baseline> and seconds/<stage>.
    """
    flat: dict[str, float | None] = {}
    for name, found in results.pretrain.items():
        own = measure(results.params, name).lower()
        for key, value in found.items():
            kind = "retrieval" if RETRIEVAL.fullmatch(key) else "emd" if key.startswith("plain_") else own
            flat[f"{kind}/{name}/{key}"] = value
    for name, states in results.pca.items():
        flat |= {f"pca/{name}/{state}/k80": values["k80"] for state, values in states.items() if "k80" in values}
    for outcome in results.outcomes:
        at = f"{outcome.data}/{outcome.adapter}/{outcome.recipe}"
        flat |= {f"{at}/{figure.key}": figure.value for figure in outcome.figures if not figure.baseline}
        losses = {"val_loss": outcome.val_loss, "scratch_val_loss": outcome.scratch_val_loss}
        flat |= {f"{at}/{key}": loss for key, loss in losses.items() if loss is not None}
    for named in results.without_llm:
        at = f"{named.data}/{named.adapter}"
        flat |= {f"{at}/{figure.key}": figure.value for figure in named.figures if not figure.baseline}
        flat[f"{at}/val_loss/namer"] = named.val_loss
    for data in results.params.run.data:
        flat |= {f"{data}/{figure.key}": figure.value for figure in results.baselines(data)}
    flat |= {f"seconds/{stage}": seconds for stage, seconds in results.seconds.items() if seconds is not None}
    return {key: value if value is not None and math.isfinite(value) else None for key, value in flat.items()}


def terminal_table(results: Results) -> Table:
    """The main figures with their intervals: a row each, a column for each adapter and recipe, and one for the rest.

    Where columns are too many to be read, each figure of each has a row.
    """
    from rich.table import Column, Table

    params, found = results.params, list(main_figures(results))
    names = ["", *dict.fromkeys(name for *_, name, _ in found if name)]
    if len(names) > COLUMNS:
        found, names = (
            [(f"{label}, {name}" if name else label, data, "", text) for label, data, name, text in found],
            [""],
        )
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for label, data, name, value in found:
        rows.setdefault((data, label), {})[name] = value
    columns = (Column(name, overflow="fold") for name in ("", *names))
    table = Table(*columns, title=f"profile {params.profile}", title_justify="left")
    for data in dict.fromkeys(data for data, _ in rows):
        table.add_section()
        if data and len(results.measured) > 1:
            table.add_row(f"[bold]{data}")
        for (of, label), row in rows.items():
            if of == data:
                table.add_row(label, *(row.get(name, "").replace(" (", "\n(", 1) for name in names))
    table.caption_justify = "left"
    table.caption = "what figures are: docs/measures.md (captions), docs/naming.md (names)"
    if any("image_gain" in found for found in results.pretrain.values()):
        table.caption += f"\nimage gain: {gain_of(params)}"
    return table


def main_figures(results: Results) -> Iterator[tuple[str, str, str, str]]:
    """(what, data set, adapter/recipe, value with its interval); an empty text where it is of none."""
    for data in results.params.run.data:
        yield from _named(results, data)
        outcomes = results.of(data)
        for key, label in labels(outcomes).items():
            for outcome in outcomes:
                if figure := outcome.figure(key):
                    yield label, data, results.name(outcome), with_interval(figure)
        for figure in compared(results, data):
            yield figure.label, data, "", with_interval(figure)
        for outcome in outcomes:
            losses = (("", outcome.val_loss), (" from scratch", outcome.scratch_val_loss))
            for start, loss in losses:
                if loss is not None:
                    yield f"validation loss{start}", data, results.name(outcome), f"{loss:.3f}"
    for name, found in results.pretrain.items():
        if "image_gain" in found:
            ends = (found[key] for key in ("image_gain_low", "image_gain_high") if key in found)
            interval = " to ".join(f"{end:.3f}" for end in ends)
            of = measure(results.params, name)
            value = f"{found['image_gain']:.3f} {of}" + (f" ({interval})" if interval else "")
            yield "image gain of pre-training", results.params.pretrain.data[0], name, value
    yield "time of all stages, added up", "", "", total_time(results)


def _named(results: Results, data: str) -> Iterator[tuple[str, str, str, str]]:
    """The accuracies of names without the LLM, rule by rule."""
    found = [(one.adapter, figure) for one in results.without_llm_on(data) for figure in one.figures]
    shown = [(adapter, figure) for adapter, figure in found if not figure.baseline and not is_detail(figure)]
    for label in dict.fromkeys(figure.label for _, figure in shown):
        yield from ((label, data, adapter, with_interval(f)) for adapter, f in shown if f.label == label)


def compared(results: Results, data: str) -> list[Figure]:
    """What the adapters on a data set are compared with."""
    return [figure for figure in results.baselines(data) if not is_detail(figure)]


def labels(outcomes: list[Outcome]) -> dict[str, str]:
    """The figures of some outcomes that are no baselines or details: key and label, in the order of measuring."""
    figures = [figure for outcome in outcomes for figure in outcome.figures]
    return {figure.key: figure.label for figure in figures if not figure.baseline and not is_detail(figure)}


def measure(params: Params, adapter: str) -> str:
    """What the distance of an adapter's pre-training is called."""
    name = params.pretrain_for(adapter).objective.name
    return "EMD" if name == "emd" else name.rpartition(":")[2]


def measures(params: Params) -> list[str]:
    """Those of all adapters: figures compare across them only where they are plain EMD, or shares."""
    return list(dict.fromkeys(measure(params, name) for name in params.run.adapters))


def learned_from(params: Params) -> list[str]:
    """What the texts of pre-training are: captions, class names, or both."""
    tasks = [params.data[data].task for data in params.pretrain.data]
    return list(dict.fromkeys("class names" if task == "classify" else "captions" for task in tasks))


def gain_of(params: Params) -> str:
    """What the image gain is, for people."""
    text = " or ".join(kind.removesuffix("s") for kind in learned_from(params))
    return f"by how much a {text} is nearer to its own picture than to another; above 0 something was seen"


def total_time(results: Results) -> str:
    """The time of all stages, and how many are not in it."""
    known = [seconds for seconds in results.seconds.values() if seconds is not None]
    missing = len(results.seconds) - len(known)
    noun = "1 stage" if missing == 1 else f"{missing} stages"
    return duration(sum(known)) + (f", without {noun} restored from DVC's cache" if missing else "")


def with_interval(figure: Figure) -> str:
    """'83.5 % (80.1 % to 86.4 %)'; without the brackets where there is no interval."""
    spread = interval(figure)
    return written(figure) + (f" ({spread})" if spread else "")


def written(figure: Figure) -> str:
    """A figure's value for people, by its kind."""
    return _written(figure.value, figure.kind)


def interval(figure: Figure) -> str:
    """'80.1 % to 86.4 %', or an empty text."""
    return "" if figure.interval is None else " to ".join(_written(end, figure.kind) for end in figure.interval)


def _written(value: float, kind: str) -> str:
    if not math.isfinite(value):
        return "not finite"
    return percent(value) if kind == "share" else f"{value:,.0f}" if kind == "count" else f"{value:.3f}"


def percent(share: float, digits: int = 1) -> str:
    """0.8351 -> '83.5 %', with a no-break space."""
    return f"{100 * share:.{digits}f}\u00a0%"


def duration(seconds: float) -> str:
    """75.2 -> '1 min 15 s'."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}\u00a0s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}\u00a0h {minutes}\u00a0min" if hours else f"{minutes}\u00a0min {whole % 60}\u00a0s"
