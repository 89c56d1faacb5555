"""The tables of the page: a row for each adapter, and a column for each figure that one of them has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from pipeline.metrics.base import Figure
from pipeline.report import convergence
from pipeline.report.figures import interval, labels, learned_from, measure, measures, percent, written
from pipeline.report.results import Results
from pipeline.report.ways import MEASURES, SPEED, is_of_rule, ways


@dataclass(frozen=True)
class Cell:
    """A figure in a table, what stands small below it, and whether it is good or bad news ('yes', 'no' or '')."""

    text: str
    small: str = ""
    mood: str = ""


ABSENT = Cell("–")


@dataclass(frozen=True)
class Table:
    """Headings, that of the rows' names first, in which a line may end; and rows of a name and a cell each."""

    head: list[str]
    rows: list[tuple[str, list[Cell]]]

    @classmethod
    def of(cls, headings: dict[str, str], rows: dict[str, dict[str, Cell]], first: str = "adapter") -> Table:
        """From rows of cells by the keys of `headings`; a column that no row has is left out."""
        keys = [key for key in headings if any(key in cells for cells in rows.values())]
        cells = [(name, [row.get(key, ABSENT) for key in keys]) for name, row in rows.items()]
        return cls([first, *(headings[key] for key in keys)], cells)


def figures_table(results: Results, data: str) -> Table:
    """All that was measured on one data set but baselines and what `ways_table` and `scores_table` have."""
    outcomes = results.of(data)
    rows = {}
    for outcome in outcomes:
        found = {figure.key: figure for figure in outcome.figures}
        cells = {key: Cell(written(figure), interval(figure)) for key, figure in found.items()}
        loss = {} if outcome.val_loss is None else {"val_loss": Cell(f"{outcome.val_loss:.3f}")}
        rows[results.name(outcome)] = cells | loss
    headings = {key: label for key, label in labels(outcomes).items() if not (is_of_rule(key) or key in SCORES)}
    return Table.of(headings | {"val_loss": "validation loss"}, rows)


def ways_table(results: Results, data: str) -> Table:
    """What every way of naming came to."""
    rows = {
        f"{way.adapter}: {way.name}" if way.adapter else way.name: {
            measure: Cell(written(figure), interval(figure)) for measure, figure in way.figures.items()
        }
        | ({"speed": Cell(f"{way.speed:,.0f}" if way.speed >= 100 else f"{way.speed:.2g}")} if way.speed else {})
        for way in ways(results, data)
    }
    return Table.of({**MEASURES, "speed": SPEED}, rows, "way of naming")


SCORES = {
    **{f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)},
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr-D",
    "cider_over_shuffled": "above another\npicture's",
    "cider_over_constant": "above the\nbest constant",
    "cider_over_nearest": "above the\nnearest picture's",
}
SCORED = {"cider_pretrained": "before fine-tuning", "cider_shuffled": "against another picture"}
BLIND = {"cider_constant": "the best constant caption", "cider_nearest": "a caption of the nearest training picture"}


def scores_table(results: Results, data: str) -> Table:
    """Captions against their references, with what CIDEr-D is before fine-tuning and for those that see no picture."""
    rows: dict[str, dict[str, Cell]] = {}
    for outcome in results.of(data):
        found, name = {figure.key: figure for figure in outcome.figures}, results.name(outcome)
        rows[name] = {key: _score(found[key]) for key in SCORES if key in found}
        rows |= {f"{name}, {text}": {"cider": _score(found[key])} for key, text in SCORED.items() if key in found}
    lines = {figure.key: figure for figure in results.baselines(data)}
    rows |= {text: {"cider": _score(lines[key])} for key, text in BLIND.items() if key in lines}
    return Table.of(SCORES, rows, "captions")


def _score(figure: Figure) -> Cell:
    """Of a difference, good news is one whose interval is above 0."""
    news = "" if "_over_" not in figure.key or figure.interval is None else "yes" if figure.interval[0] > 0 else "no"
    return Cell(written(figure), interval(figure), news)


FINETUNING = {
    "steps": "steps",
    "first": "first loss\npre-trained",
    "emd": "final loss\npre-trained",
    "scratch": "final loss\nfrom scratch",
}


def finetuning_table(results: Results, curves: pd.DataFrame) -> Table:
    """The losses that fine-tuning ended on with and without pre-training."""
    rows, compared = {}, "scratch" in set(curves["start"])
    for recipe in dict.fromkeys(curves["recipe"]):
        for name in results.params.run.adapters:
            pretrained = convergence.curve(curves, name, recipe, "emd")
            scratch = convergence.curve(curves, name, recipe, "scratch")
            rows[convergence.name_of(curves, name, recipe)] = {
                "steps": Cell(str(int(pretrained["step"].iloc[-1]))),
                "first": Cell(f"{pretrained['val_loss'].iloc[0]:.3f}"),
                "emd": Cell(f"{pretrained['val_loss'].iloc[-1]:.3f}"),
            }
            if compared:
                last = "not run" if scratch.empty else f"{scratch['val_loss'].iloc[-1]:.3f}"
                rows[convergence.name_of(curves, name, recipe)]["scratch"] = Cell(last)
    return Table.of(FINETUNING, rows)


PRETRAINING = {
    "measure": "measured by",
    "val": "own\npicture",
    "shuffled": "another\npicture",
    "image_gain": "image gain\n(95\u00a0% interval)",
    "const_token": "best constant\ntoken",
    "const_set": "best constant\nset",
    "below": "below the\nbest of these",
    "retrieval": "finds its caption\nraw / debiased",
    "chance": "chance",
    "plain": "image gain in\nplain EMD",
}


def pretraining_table(results: Results) -> Table:
    """What pre-training measured on held-out captions."""
    return Table.of(PRETRAINING, {name: _pretrained(results, name) for name in results.pretrain})


def _pretrained(results: Results, adapter: str) -> dict[str, Cell]:
    found = results.pretrain[adapter]
    distances = ("val", "shuffled", "image_gain", "const_token", "const_set")
    cells = {key: Cell(f"{found[key]:.3f}") for key in distances if key in found}
    if len(measures(results.params)) > 1:
        cells["measure"] = Cell(measure(results.params, adapter))
        cells |= {"plain": Cell(f"{found['plain_gain']:.3f}")} if "plain_gain" in found else {}
    if {"image_gain", "image_gain_low", "image_gain_high"} <= found.keys():
        low, high = found["image_gain_low"], found["image_gain_high"]
        mood = "yes" if low > 0 else "no"
        cells["image_gain"] = Cell(f"{found['image_gain']:.3f}", f"{low:.3f} to {high:.3f}", mood)
    below = below_blind(found)
    if below is not None:
        cells["below"] = Cell(percent(below), mood="yes" if below > 0 else "no")
    if {"r1_raw", "r1_debiased"} <= found.keys() and learned_from(results.params) != ["class names"]:
        cells["retrieval"] = Cell(f"{percent(found['r1_raw'])} / {percent(found['r1_debiased'])}")
        cells["chance"] = Cell(percent(1 / candidates_of(results, adapter)))
    return cells


SETUP = {
    "architecture": "architecture",
    "parameters": "parameters",
    "pretrain": "pre-training:\nbatch, epochs, rate",
}


def setup_table(results: Results) -> Table:
    """What was trained, and how: the adapters, and each recipe's fine-tuning."""
    params, rows = results.params, dict[str, dict[str, Cell]]()
    headings = SETUP | {recipe: f"{recipe}:\nbatch, steps, rates" for recipe in params.run.recipes}
    for name, found in results.pretrain.items():
        own = params.pretrain_for(name)
        said = params.adapter(name).architecture
        kind = params.kind_of(name)
        keys = ", ".join(f"{key} {value}" for key, value in said.items() if key != "kind")
        cells = {"architecture": Cell(keys or "its defaults", "" if kind == name else kind)}
        if "parameters" in found:
            cells["parameters"] = Cell(f"{found['parameters']:,}")
        cells["pretrain"] = Cell(f"{own.batch * own.accumulate}, {own.epochs}, {own.lr:g}", own.objective.name)
        for recipe, tuned in results.tuned[name].items():
            recipe_of = params.finetune_for(name, recipe)
            text = f"{recipe_of.batch * recipe_of.accumulate}, {tuned.get('steps', '?')}, {recipe_of.lr:g}"
            lora = (
                f"LoRA {tuned['parameters_lora']:,}: {tuned['lora_percent']:.4f}\u00a0%"
                if "lora_percent" in tuned
                else ""
            )
            cells[recipe] = Cell(f"{text} (adapter {recipe_of.adapter_lr:g})", lora)
        rows[name] = cells
    return Table.of(headings, rows)


def candidates_of(results: Results, adapter: str) -> int:
    """How many captions retrieval chose from: chance is one in so many."""
    most = results.params.pretrain_for(adapter).candidates
    return min(most, int(results.pretrain[adapter].get("held_out", most)))


def below_blind(found: dict[str, Any]) -> float | None:
    """By which share the held-out EMD is below that of the best image-blind token set; negative when it is above.

    None where there are no image-blind sets to compare with.
    """
    blind = min((float(found[key]) for key in ("const_token", "const_set") if key in found), default=0.0)
    return (blind - float(found["val"])) / blind if blind and "val" in found else None
