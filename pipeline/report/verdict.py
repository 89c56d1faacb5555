"""What the figures of a run come to, in words: whether answers depend on their pictures, and what they are worth.

Only what 95 % intervals tell apart is called better or worse; what nothing was measured against gets no verdict.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import pyarrow.parquet as pq

from pipeline.metrics.base import Figure
from pipeline.report.cautions import caution
from pipeline.report.figures import learned_from, terminal_table, written
from pipeline.report.results import Outcome, Results

MANY = 1000  # training pictures, from which more of them are not the first thing to try


@dataclass(frozen=True)
class Verdict:
    """A sentence or more, and whether it is good or bad news ('yes', 'no' or '')."""

    text: str
    mood: str


def tell(results: Results) -> None:
    """Print the verdicts, what makes them promise too much, and the table of the main figures."""
    from rich.console import Console

    console = Console()
    for verdict in verdicts(results):
        style = {"yes": "green", "no": "bold red"}.get(verdict.mood)
        console.print(verdict.text, style=style, markup=False, highlight=False)
    for data in results.measured:
        if said := caution(results.params, data):
            console.print(f"{data}: {said}", style="bold red", markup=False, highlight=False)
    console.print(terminal_table(results))


def verdicts(results: Results) -> list[Verdict]:
    """One for each data set with something to compare; the data set's name comes first where there are several."""
    found = []
    for data in results.measured:
        of = {"caption": _captions, "classify": _names}.get(results.params.data[data].task)
        verdict = of(results, results.best(data)) if of else None
        if verdict:
            several = len(results.measured) > 1
            found.append(replace(verdict, text=f"{data}: {verdict.text}") if several else verdict)
    return found


def _captions(results: Results, best: Outcome) -> Verdict | None:
    """Whether captions fit their own picture, and whether they beat the caption of a similar one."""
    said, apart = [], False
    f1, others = best.figure("f1"), best.figure("f1_shuffled")
    if f1 and others and f1.interval and others.interval:
        said.append(f"things named, F1 {written(f1)} against {written(others)}")
        apart = f1.interval[0] > others.interval[1]
    cider, shuffled, over = map(best.figure, ("cider", "cider_shuffled", "cider_over_shuffled"))
    if cider and shuffled and over and over.interval:
        said.append(f"CIDEr-D {written(cider)} against {written(shuffled)}")
        apart = apart or over.interval[0] > 0
    if not said:
        return None
    count = best.figure("captioned")
    of = f", {written(count)} test pictures" if count else ""
    compared = f"({'; '.join(said)}{of})"
    if apart:
        near, mood = _nearest(results, best)
        return Verdict(f"The captions fit their own pictures better than others {compared}{near}.", mood)
    text = f"The captions are not shown to be any better than those of another picture {compared}."
    return Verdict(text + _nor_pretraining(results, best) + _instead(results, best) + _advice(results, best), "no")


def _nearest(results: Results, best: Outcome) -> tuple[str, str]:
    """How captions compare with those of the most similar training pictures, and what news that is."""
    over = best.figure("cider_over_nearest")
    if over is None or over.interval is None:
        return "", "yes"
    if over.interval[0] > 0:
        return ", and better than the caption of the most similar training picture does", "yes"
    near = next((f" ({written(one)})" for one in results.baselines(best.data) if one.key == "cider_nearest"), "")
    if over.interval[1] < 0:
        return f", but worse than the caption of the most similar training picture does{near}", "no"
    return f", but not shown better than the caption of the most similar training picture does{near}", ""


def _nor_pretraining(results: Results, best: Outcome) -> str:
    low = results.pretrain[best.adapter].get("image_gain_low")
    if low is None or low > 0 or learned_from(results.params) != ["captions"]:
        return ""
    return " Nor is pre-training shown to have learned anything about pictures."


def _instead(results: Results, best: Outcome) -> str:
    over = best.figure("cider_over_nearest")
    near = next((one for one in results.baselines(best.data) if one.key == "cider_nearest"), None)
    if over is None or near is None or over.value >= 0:
        return ""
    return f" The caption of the most similar training picture scores higher here (CIDEr-D {written(near)})."


def _names(results: Results, best: Outcome) -> Verdict | None:
    """Whether names are better than guessed, and how the ways of naming compare."""
    lines = {figure.key: figure for figure in results.baselines(best.data)}
    chance, probe, classes = map(lines.get, ("chance", "probe", "classes"))
    alone = results.best_without_llm(best.data)
    unaided = next((figure for figure in alone.figures if figure.key == "acc/namer"), None) if alone else None
    aided = best.figure("acc")
    shown = unaided or aided
    if not (shown and shown.interval and chance) or (classes and classes.value < 2):
        return None
    how = "without the language model" if unaided else "by the language model"
    of = f"{written(shown)} of {written(lines['test_images'])}" if "test_images" in lines else written(shown)
    text = f"{of} test pictures are named rightly {how}"
    if shown.interval[0] <= chance.value:
        advice = _advice(results, best)
        return Verdict(f"{text}, which is not shown to be better than guessing ({written(chance)}).{advice}", "no")
    text, mood = f"{text} (guessing: {written(chance)})", "yes"
    others = []
    if probe and probe.interval:
        how, mood = _told(shown, probe)
        others.append((how, f"a linear probe of the same tokens ({written(probe)})"))
    if unaided and aided and aided.interval:
        others.append((_told(unaided, aided)[0], f"the language model's names ({written(aided)})"))
    than = defaultdict[str, list[str]](list)
    for how, other in others:
        than[how].append(other)
    told = " and ".join(f"{how} {' or '.join(names)}" for how, names in than.items())
    return Verdict(f"{text}, which is {told}." if told else f"{text}.", mood)


def _told(own: Figure, other: Figure) -> tuple[str, str]:
    """How a figure compares with another, by their intervals, and what news that is."""
    assert own.interval and other.interval
    if own.interval[0] > other.interval[1]:
        return "better than", "yes"
    if own.interval[1] < other.interval[0]:
        return "worse than", "no"
    return "not shown to be better or worse than", "yes"


def _advice(results: Results, best: Outcome) -> str:
    """What to do first, by how many pictures there were to learn from; nothing where their list is not here."""
    path = results.run.manifest(best.data)
    if not path.is_file():
        return ""
    rows = pq.read_table(path, columns=["split", "quarantine"]).to_pylist()
    count = sum(row["split"] == "train" and row["quarantine"] is None for row in rows)
    if getattr(results.params.data[best.data], "count", None) is not None:
        return f" Raise data.{best.data}.count ({count:,} pictures for training)."
    if count < MANY:
        return f" Add photos ({count:,} for training)."
    return f" Raise finetune.recipes.{best.recipe}.max_steps ({count:,} pictures for training)."
