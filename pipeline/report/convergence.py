"""Does pre-training without the LLM speed up fine-tuning with it? Histories in one table, and their curves."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.media.plots import BLUE, GREEN, GREY, RED, canvas, require, save_png
from pipeline.runs import Run

COLUMNS = ["adapter", "start", "step", "val_loss"]
WITH, WITHOUT = "with pre-training", "without pre-training"
PANEL = (6.4, 4.6)


def collect(params: Params) -> pd.DataFrame:
    """Validation loss over fine-tuning on captions, columns COLUMNS; start is emd (pre-trained) or scratch.

    Raises UserError naming a history that is missing or has no validation loss.
    """
    run = Run.of(params)
    parts = [
        _history(base / "finetune" / f"{name}-captions", f"finetune@{name}-captions", name, "emd")
        for name in params.run.adapters
    ]
    parts += [
        _history(base / "finetune_scratch" / name, f"finetune_scratch@{name}", name, "scratch")
        for name in params.run.scratch
    ]
    return pd.concat(parts, ignore_index=True)


def _history(folder: Path, stage: str, adapter: str, start: str) -> pd.DataFrame:
    rows = read_history(folder / "history.csv", stage, ["step", "val_loss"]).dropna(subset=["val_loss"])
    if rows.empty:
        raise UserError(f"{folder / 'history.csv'}: no validation loss in it; run `dvc repro --force {stage}`")
    return rows.assign(adapter=adapter, start=start)[COLUMNS]


def read_history(path: Path, stage: str, columns: list[str]) -> pd.DataFrame:
    """A history.csv that has these columns; else a UserError naming the file and its stage."""
    try:
        rows = pd.read_csv(require(path, stage))
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError):
        raise UserError(f"{path}: not a CSV table; run `dvc repro --force {stage}`") from None
    missing = [column for column in columns if column not in rows]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)}; run `dvc repro --force {stage}`")
    return rows


def write_curves(table: pd.DataFrame, folder: Path) -> None:
    """All runs in convergence.csv; in curves.csv, for `dvc plots`, those of the first adapter that has both starts."""
    table.to_csv(folder / "convergence.csv", index=False)
    adapter = table.loc[table["start"] == "scratch", "adapter"].iloc[0]
    wide = table[table["adapter"] == adapter].pivot(index="step", columns="start", values="val_loss")
    wide.rename(columns={"emd": "with_pretraining", "scratch": "without_pretraining"}).to_csv(folder / "curves.csv")


def curve(table: pd.DataFrame, adapter: str, start: str) -> pd.DataFrame:
    """Rows of one fine-tuning run by step; empty if there was none."""
    rows = table[(table["adapter"] == adapter) & (table["start"] == start)]
    return rows.sort_values("step", ignore_index=True)


def steps_to_match(table: pd.DataFrame, adapter: str) -> tuple[int | None, int] | None:
    """(steps with pre-training to reach the final loss without it, steps without it); None without both runs.

    The first is None when the pre-trained run never gets there. Known at validated steps only.
    """
    pretrained, scratch = curve(table, adapter, "emd"), curve(table, adapter, "scratch")
    if pretrained.empty or scratch.empty:
        return None
    reached = pretrained[pretrained["val_loss"] <= scratch["val_loss"].iloc[-1]]
    return (None if reached.empty else int(reached["step"].iloc[0])), int(scratch["step"].iloc[-1])


def below_everywhere(table: pd.DataFrame, adapter: str) -> bool:
    """Whether the run with pre-training has the lower validation loss at every validated step."""
    both = curve(table, adapter, "emd").merge(
        curve(table, adapter, "scratch"), on="step", suffixes=("_emd", "_scratch")
    )
    return bool((both["val_loss_emd"] < both["val_loss_scratch"]).all())


def draw_finetuning(table: pd.DataFrame, folder: Path) -> list[Path]:
    """One panel per adapter with both starts (convergence-<adapter>.png), the others in convergence-others.png."""
    names = list(dict.fromkeys(table["adapter"]))
    both = [name for name in names if not curve(table, name, "scratch").empty]
    paths = [_draw_both(table, name, folder / f"convergence-{name}.png") for name in both]
    others = [name for name in names if name not in both]
    if others:
        paths.append(_draw_others(table, others, folder / "convergence-others.png"))
    return paths


def _draw_both(table: pd.DataFrame, adapter: str, path: Path) -> Path:
    figure, axes = canvas(f"{adapter}: {_verdict(table, adapter)}", "optimiser steps", "validation loss", PANEL)
    scratch, pretrained = curve(table, adapter, "scratch"), curve(table, adapter, "emd")
    axes.axhline(scratch["val_loss"].iloc[-1], color=GREY, linewidth=1, linestyle=":")
    axes.plot(scratch["step"], scratch["val_loss"], "^--", color=RED, linewidth=2.2, label=WITHOUT)
    axes.plot(pretrained["step"], pretrained["val_loss"], "o-", color=BLUE, linewidth=2.2, label=WITH)
    _finish(figure, axes)
    save_png(figure, path)
    return path


def _verdict(table: pd.DataFrame, adapter: str) -> str:
    """What the two curves show, whichever way it went."""
    found = steps_to_match(table, adapter)
    if found is None or found[0] is None:
        return "the pre-trained start never reaches\nthe loss the other ends on"
    where = "lower at every point" if below_everywhere(table, adapter) else "not lower at every point"
    return f"the loss of {found[1]} steps without pre-training\nis reached in {found[0]} with it; {where}"


def _draw_others(table: pd.DataFrame, adapters: list[str], path: Path) -> Path:
    title = "with pre-training only (no run from scratch)"
    figure, axes = canvas(f"{', '.join(adapters)}:\n{title}", "optimiser steps", "validation loss", PANEL)
    styles = zip(adapters, (BLUE, RED, GREEN, GREY), ("o-", "^--", "s-.", "D:"), strict=False)
    for name, colour, style in styles:
        rows = curve(table, name, "emd")
        axes.plot(rows["step"], rows["val_loss"], style, color=colour, linewidth=2.2, label=name)
    _finish(figure, axes)
    save_png(figure, path)
    return path


def draw_pretraining(params: Params, folder: Path) -> list[Path]:
    """pretraining-<adapter>.png per adapter: held-out EMD per epoch against its image-blind controls."""
    run = Run.of(params)
    paths = []
    for name in params.run.adapters:
        path, columns = base / "pretrain" / name / "history.csv", ["epoch", "val", "shuffled", "const_set"]
        rows = read_history(path, f"pretrain@{name}", columns).dropna(subset=["val"])
        paths.append(_draw_epochs(rows, name, folder / f"pretraining-{name}.png"))
    return paths


def _draw_epochs(rows: pd.DataFrame, adapter: str, path: Path) -> Path:
    figure, axes = canvas(f"{adapter}: distance of held-out captions\n(lower is better)", "epoch", "EMD", PANEL)
    axes.plot(rows["epoch"], rows["shuffled"], "^--", color=RED, linewidth=2, label="to another picture")
    axes.plot(
        rows["epoch"], rows["const_set"], ":", color=GREY, linewidth=2.4, label="to the best constant set (no picture)"
    )
    axes.plot(rows["epoch"], rows["val"], "o-", color=BLUE, linewidth=2.4, label="to the caption's own picture")
    _finish(figure, axes)
    save_png(figure, path)
    return path


def _finish(figure: Figure, axes: Axes) -> None:
    """Whole steps below, and the legend below them, where no curve can run through it."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower left", ncols=2, fontsize=11, frameon=False)
