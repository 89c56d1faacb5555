"""The ways of naming pictures side by side: who named how, and what it came to."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.metrics.base import Figure
from pipeline.report.results import Outcome, Results, WithoutLLM

# What a rule is called, by what stands behind the measure in the key of a figure (acc/emd).
WITHOUT_LLM = {"emd": "EMD alone", "namer": "the namer"}
WITH_LLM = {
    "": "said by the LLM",
    "ranked": "ranked by the LLM",
    "calibrated": "ranked, calibrated",
    "combined": "all three together",
    "state": "read off its last state",
}
MEASURES = {
    "acc": "accuracy",
    "top5": "among the\nfirst five",
    "macro": "mean over\nthe classes",
    "ece": "calibration\nerror",
}
SPEED = "images/s"
# Measures of captions that say less than their neighbours: BLEU-4, and what CIDEr-D is more than these.
LESSER = {"bleu_1", "bleu_2", "bleu_3", "cider_pretrained", "cider_shuffled"}


@dataclass(frozen=True)
class Way:
    """A way of naming: whose (an adapter's, or nobody's), how, and its figures by MEASURES."""

    adapter: str
    name: str
    kind: str  # how its bar looks
    figures: dict[str, Figure]
    speed: float | None = None  # images per second, where it was measured here


def is_of_rule(key: str) -> bool:
    """Whether a figure's key is that of a measure and a rule by which all names are scored."""
    measure, _, rule = key.partition("/")
    return measure in MEASURES and rule in {*WITHOUT_LLM, *WITH_LLM, "discriminant"} - {""}


def is_detail(figure: Figure) -> bool:
    """Whether a figure stands in a table of its own alone: what a rule has but its accuracy, and LESSER."""
    return figure.key in LESSER or (is_of_rule(figure.key) and not figure.key.startswith("acc/"))


def ways(results: Results, data: str) -> list[Way]:
    """Every way that was measured on a data set, adapter by adapter; then what they are compared with, best first."""
    found = [way for adapter in results.params.run.adapters for way in _of_adapter(results, data, adapter)]
    lines = {figure.key: figure for figure in results.baselines(data)}
    shares = [figure for figure in lines.values() if figure.kind == "share" and not is_detail(figure)]
    speeds = [one.speeds for one in results.without_llm_on(data)]
    for figure in sorted(shares, key=lambda figure: -figure.value):
        more = {measure: lines[key] for measure in MEASURES if (key := f"{measure}/{figure.key}") in lines}
        speed = max((known[figure.key] for known in speeds if figure.key in known), default=None)
        found.append(Way("", figure.label, "baseline", {"acc": figure, **more}, speed))
    return found if any(way.adapter for way in found) else []


def _of_adapter(results: Results, data: str, adapter: str) -> list[Way]:
    outcomes = results.of(data)
    several = len({outcome.recipe for outcome in outcomes}) > 1
    measured: list[tuple[str, dict[str, str], Outcome | WithoutLLM, str]] = [
        ("unaided", WITHOUT_LLM, one, "") for one in results.without_llm_on(data)
    ]
    measured += [("adapter", WITH_LLM, one, f", {one.recipe}" if several else "") for one in outcomes]
    return [
        Way(adapter, name + recipe, kind, found, one.speeds.get(rule))
        for kind, rules, one, recipe in measured
        if one.adapter == adapter
        for rule, name in rules.items()
        if "acc" in (found := _of_rule(one.figures, rule))
    ]


def _of_rule(figures: list[Figure], rule: str) -> dict[str, Figure]:
    """The figures of one rule by MEASURES."""
    keys = {f"{measure}/{rule}" if rule else measure: measure for measure in MEASURES}
    return {keys[figure.key]: figure for figure in figures if figure.key in keys}
