"""Does pre-training without the LLM speed up fine-tuning with it? Histories in one table, and their curves."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.media.plots import BLUE, GREEN, GREY, RED, canvas, save_png
from pipeline.report.figures import learned_from, measure
from pipeline.runs import Run, remedy, require

COLUMNS = ["adapter", "recipe", "start", "step", "val_loss"]
WITH, WITHOUT = "with pre-training", "without pre-training"
PANEL = (6.4, 4.6)
EPOCHS = (
    ("shuffled", "^--", RED, "to another picture"),
    ("const_set", ":", GREY, "to the best constant set (no picture)"),
    ("val", "o-", BLUE, "to its own picture"),
)


def collect(params: Params) -> pd.DataFrame:
    """Validation loss over fine-tuning, columns COLUMNS; start is emd (pre-trained) or scratch.

    Of the recipes that are run from scratch too, or else of all, with all adapters. Raises UserError naming a history
    that is missing or has no validation loss.
    """
    run, parts = params.run, []
    for recipe in (run.scratch and run.scratch_recipes) or run.recipes:
        parts += [_history(params, name, recipe, "emd") for name in run.adapters]
        parts += [_history(params, name, recipe, "scratch") for name in run.scratch]
    return pd.concat(parts, ignore_index=True)


def _history(params: Params, adapter: str, recipe: str, start: str) -> pd.DataFrame:
    folder = Run.of(params).finetuned(adapter, recipe, scratch=start == "scratch")
    rows = read_history(folder, ["step", "val_loss"]).dropna(subset=["val_loss"])
    if rows.empty:
        raise UserError(folder / "history.csv", "no validation loss in it", remedy(folder, force=True))
    return rows.assign(adapter=adapter, recipe=recipe, start=start)[COLUMNS]


def read_history(folder: Path, columns: list[str]) -> pd.DataFrame:
    """A stage's history.csv, which has these columns; else a UserError naming the file and its stage."""
    path = require(folder / "history.csv")
    try:
        rows = pd.read_csv(path)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError):
        raise UserError(path, "not a CSV table", remedy(folder, force=True)) from None
    missing = [column for column in columns if column not in rows]
    if missing:
        raise UserError(path, f"no column {', '.join(missing)}", remedy(folder, force=True))
    return rows


def write_curves(table: pd.DataFrame, folder: Path) -> None:
    """All runs in convergence.csv; in curves.csv, for `dvc plots`, those of the first adapter, that has both starts if
    any has."""
    table.to_csv(folder / "convergence.csv", index=False)
    first = table.sort_values("start", ascending=False, kind="stable").iloc[0]
    both = table[(table["adapter"] == first["adapter"]) & (table["recipe"] == first["recipe"])]
    wide = both.pivot(index="step", columns="start", values="val_loss").reindex(columns=["emd", "scratch"])
    wide.rename(columns={"emd": "with_pretraining", "scratch": "without_pretraining"}).to_csv(folder / "curves.csv")


def curve(table: pd.DataFrame, adapter: str, recipe: str, start: str) -> pd.DataFrame:
    """Rows of one fine-tuning run by step; empty if there was none."""
    rows = table[(table["adapter"] == adapter) & (table["recipe"] == recipe) & (table["start"] == start)]
    return rows.sort_values("step", ignore_index=True)


def steps_to_match(table: pd.DataFrame, adapter: str, recipe: str) -> tuple[int | None, int] | None:
    """(steps with pre-training to reach the final loss without it, steps without it); None without both runs.

    The first is None when the pre-trained run never gets there. Known at validated steps only.
    """
    pretrained, scratch = (curve(table, adapter, recipe, start) for start in ("emd", "scratch"))
    if pretrained.empty or scratch.empty:
        return None
    reached = pretrained[pretrained["val_loss"] <= scratch["val_loss"].iloc[-1]]
    return (None if reached.empty else int(reached["step"].iloc[0])), int(scratch["step"].iloc[-1])


def below_everywhere(table: pd.DataFrame, adapter: str, recipe: str) -> bool:
    """Whether the run with pre-training has the lower validation loss at every validated step."""
    pretrained, scratch = (curve(table, adapter, recipe, start) for start in ("emd", "scratch"))
    both = pretrained.merge(scratch, on="step", suffixes=("_emd", "_scratch"))
    return bool((both["val_loss_emd"] < both["val_loss_scratch"]).all())


def name_of(table: pd.DataFrame, adapter: str, recipe: str) -> str:
    """What tells a fine-tuning from the others: the adapter, and the recipe where there are more."""
    return adapter if table["recipe"].nunique() == 1 else f"{adapter} on {recipe}"


def draw_finetuning(table: pd.DataFrame, folder: Path) -> list[Path]:
    """A panel for each adapter and recipe with both starts, and one of each recipe's others.

    None of what was validated at its start and its end alone: two points are no curve, and stand in the table.
    """
    paths = []
    for recipe in dict.fromkeys(table["recipe"]):
        steps = table[table["recipe"] == recipe].groupby("adapter", sort=False)["step"].nunique()
        names = list(steps[steps > 2].index)
        both = [name for name in names if not curve(table, name, recipe, "scratch").empty]
        paths += [_draw_both(table, name, recipe, folder / f"convergence-{name}-{recipe}.png") for name in both]
        others = [name for name in names if name not in both]
        if others:
            paths.append(_draw_others(table, others, recipe, folder / f"convergence-others-{recipe}.png"))
    return paths


def _draw_both(table: pd.DataFrame, adapter: str, recipe: str, path: Path) -> Path:
    name = name_of(table, adapter, recipe)
    between = " " if name == adapter else "\n"  # a longer name has a line of its own
    title = f"{name}:{between}{_verdict(table, adapter, recipe)}"
    figure, axes = canvas(title, "optimiser steps", "validation loss", PANEL)
    pretrained, scratch = (curve(table, adapter, recipe, start) for start in ("emd", "scratch"))
    axes.axhline(scratch["val_loss"].iloc[-1], color=GREY, linewidth=1, linestyle=":")
    axes.plot(scratch["step"], scratch["val_loss"], "^--", color=RED, linewidth=2.2, label=WITHOUT)
    axes.plot(pretrained["step"], pretrained["val_loss"], "o-", color=BLUE, linewidth=2.2, label=WITH)
    _finish(figure, axes)
    save_png(figure, path)
    return path


def _verdict(table: pd.DataFrame, adapter: str, recipe: str) -> str:
    """What the two curves show, whichever way it went."""
    found = steps_to_match(table, adapter, recipe)
    if found is None or found[0] is None:
        return "the pre-trained start never reaches\nthe loss the other ends on"
    where = "lower at every point" if below_everywhere(table, adapter, recipe) else "not lower at every point"
    return f"the loss of {found[1]} steps without pre-training\nis reached in {found[0]} with it; {where}"


def _draw_others(table: pd.DataFrame, adapters: list[str], recipe: str, path: Path) -> Path:
    names = name_of(table, ", ".join(adapters), recipe)
    title = f"{names}:\nwith pre-training only (no run from scratch)"
    figure, axes = canvas(title, "optimiser steps", "validation loss", PANEL)
    styles = cycle(zip((BLUE, RED, GREEN, GREY), ("o-", "^--", "s-.", "D:"), strict=True))
    for name, (colour, style) in zip(adapters, styles, strict=False):
        rows = curve(table, name, recipe, "emd")
        axes.plot(rows["step"], rows["val_loss"], style, color=colour, linewidth=2.2, label=name)
    _finish(figure, axes)
    save_png(figure, path)
    return path


def draw_pretraining(params: Params, folder: Path) -> list[Path]:
    """pretraining-<adapter>.png per adapter: held-out distance per epoch, and that of image-blind controls if any."""
    paths = []
    for name in params.run.adapters:
        rows = read_history(Run.of(params).pretrained(name), ["epoch", "val"]).dropna(subset=["val"])
        texts, path = " and ".join(learned_from(params)), folder / f"pretraining-{name}.png"
        paths.append(_draw_epochs(rows, name, measure(params, name), texts, path))
    return paths


def _draw_epochs(rows: pd.DataFrame, adapter: str, distance: str, texts: str, path: Path) -> Path:
    title = f"{adapter}: distance of held-out {texts}\n(lower is better)"
    figure, axes = canvas(title, "epoch", distance, PANEL)
    for column, style, colour, label in EPOCHS:
        if column in rows:
            axes.plot(rows["epoch"], rows[column], style, color=colour, linewidth=2.2, label=label)
    _finish(figure, axes)
    save_png(figure, path)
    return path


def _finish(figure: Figure, axes: Axes) -> None:
    """Whole steps below, and the legend below them, where no curve can run through it."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower left", ncols=2, fontsize=11, frameon=False)
