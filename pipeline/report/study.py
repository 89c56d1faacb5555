"""What a study's trainings came to: a table of all (study.csv), and one page (study.html) of means over the seeds."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from pipeline.config import Params
from pipeline.config.study import Cell, Study
from pipeline.errors import UserError
from pipeline.files import atomically
from pipeline.media.plots import canvas, save_png
from pipeline.metrics.base import FIGURES, Figure, read_figures, read_pictures
from pipeline.report.convergence import read_history
from pipeline.report.page import render
from pipeline.report.paired import OVER, Column, Scores, compared, over_controls
from pipeline.report.tables import Cell as Shown
from pipeline.report.tables import Table
from pipeline.report.ways import is_detail
from pipeline.runs import Run

# Okabe and Ito's eight, each with every style of line before one comes again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8c8c8c")
LINES, MARKERS = ("-", "--", ":"), "os^Dv"
PANEL = (6.4, 5.2)
GAINED = ("/val_loss", "/cider", "/f1", "/acc", "/acc/namer", "/acc/emd")  # what is drawn against its cost
BEFORE = "cider_pretrained"
UNSEEN, COUNTED = "_unseen", "/captioned_unseen"  # of things never captioned in training: a table of their own
GIB = 2**30
# Of the cells: what a column is called, in which unit, and how many digits it has.
COST = {
    "training": ("pre-training\ns", 1.0, 0),
    "per_picture": ("a picture\nms", 1e3, 1),
    "peak": ("memory\nGiB", 1 / GIB, 1),
}
LEARNED = {
    "plain_gain_relative": ("EMD gain\n%", 100.0, 1),
    "plain_r1_debiased": ("right caption\nby EMD, %", 100.0, 0),
}


def write_study(params: Params, study: Study) -> Path:
    """Write study.csv and study.html of the trainings that were run; returns the page's path.

    Raises UserError when there is none.
    """
    run = Run.of(params)
    found = [row for cell in study.cells() for row in _rows(params, cell, study.recipes)]
    if not found:
        raise UserError(run.base, "no training of the study has been run", "run `terraalign study`")
    table = pd.DataFrame(found)
    with atomically(run.base / "study.csv") as file:
        file.write(table.to_csv(index=False, float_format="%.6g").encode())
    page = run.base / "study.html"
    with atomically(page) as file:
        file.write(render(_context(params, study, table), "study.html.jinja").encode())
    return page


def _rows(params: Params, cell: Cell, recipes: Iterable[str]) -> Iterator[dict[str, Any]]:
    """A row of what a training came to, none before it was pre-trained; what is not there yet is left out."""
    run = Run.of(params)
    learned = _json(run.pretrained(cell.name) / "metrics.json")
    if learned is None:
        return
    spent = _json(run.seconds(f"pretrain@{cell.name}")) or {}
    steps = int(read_history(run.pretrained(cell.name), ["step"])["step"].iloc[-1])
    settings = params.pretrain_for(cell.name)
    row: dict[str, Any] = {
        "adapter": cell.adapter,
        "method": cell.method,
        "seed": cell.seed,
        "seconds": cell.seconds,
        "steps": steps,
    }
    row |= {"training": spent.get("training"), "peak": spent.get("peak_gpu_bytes") or spent.get("peak_bytes")}
    pictures = steps * settings.batch * settings.accumulate
    if pictures and "training" in spent:
        row["per_picture"] = spent["training"] / pictures
    row |= {key: value for key, value in learned.items() if isinstance(value, int | float)}
    for data in params.run.data:
        row |= {f"{data}/{f.key}": f.value for f in _figures(run.named(cell.name), data)}
    for recipe in recipes:
        tuned = _json(run.finetuned(cell.name, recipe) / "metrics.json") or {}
        row |= {f"{recipe}/{key}": value for key, value in tuned.items() if key.startswith("val_loss")}
        for data in params.finetune.recipes[recipe].data:
            found = _figures(run.evaluated(cell.name, recipe), data)
            row |= {f"{data}/{recipe}/{f.key}": f.value for f in found if not f.baseline}
    yield row


def _scores(params: Params, study: Study) -> Scores:
    """What was measured of each picture, of the trainings that got so far."""
    run, found = Run.of(params), {}
    for cell in study.cells():
        parts = [(f"{data}/", run.named(cell.name), data) for data in params.run.data]
        for recipe in study.recipes:
            parts += [
                (f"{data}/{recipe}/", run.evaluated(cell.name, recipe), data)
                for data in params.finetune.recipes[recipe].data
            ]
        tables = [read_pictures(folder, data).add_prefix(prefix) for prefix, folder, data in parts]
        if any(len(table) for table in tables):
            found[cell] = pd.concat([table for table in tables if len(table)], axis=1)
    return found


def _figures(folder: Path, data: str) -> list[Figure]:
    return read_figures(folder, data) if (folder / data / FIGURES).exists() else []


def _json(path: Path) -> dict[str, Any] | None:
    """The values of a file; None where it is not there."""
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(path, "not valid JSON", "remove it, and run `terraalign study` again") from None
    return values if isinstance(values, dict) else None


def _context(params: Params, study: Study, table: pd.DataFrame) -> dict[str, Any]:
    measured = _columns(params, study)
    unseen = {key: column for key, column in measured.items() if key.endswith(UNSEEN)}
    columns = {key: column for key, column in measured.items() if key not in unseen}
    at_once = table["steps"] == 0  # belongs to both
    parts = {}
    if study.seconds:
        parts[f"After {study.seconds} seconds of pre-training"] = table[table["seconds"].notna() | at_once]
    if study.steps:
        parts[f"After {study.steps} steps of pre-training"] = table[table["seconds"].isna()]
    return {
        "profile": params.profile, "seeds": study.seeds, "adapters": study.adapters, "sections": [],
        "encoder": params.vision.model or params.vision.encoder, "llm": params.llm.model,
        "done": len(table), "all": len(study.cells()),
        "methods": {name: json.dumps(_said(method)) for name, method in study.methods.items()},
        "tables": {title: means(part, columns) for title, part in parts.items() if len(part)},
        "unseen": {title: means(part, unseen) for title, part in parts.items() if len(part) and unseen},
        "unseen_pictures": {
            key.partition("/")[0]: f"{table[key].max():.0f}" for key in table if key.endswith(COUNTED)
        },
        "winners": [
            line
            for title, part in parts.items()
            for key in columns
            if key.endswith(GAINED) and key in part
            for line in winners(part, key, columns[key], title)
        ],
        "baselines": _baselines(params, study),
        "paired": _paired(params, study, columns),
        "curves": [_uri(path) for path in _draw_curves(params, study)],
        "cost": [_uri(path) for path in _draw_cost(params, table, columns)],
    }  # fmt: skip


def _paired(params: Params, study: Study, columns: dict[str, Column]) -> dict[str, Table]:
    """Differences picture by picture: after equal seconds, after equal steps, and over controls."""
    scores, cells, reference = _scores(params, study), study.cells(), next(iter(study.methods))
    shown = {key: column for key, column in columns.items() if key.endswith(GAINED) or OVER in key}
    tables = {}
    for seconds in dict.fromkeys((study.seconds, None if study.steps else study.seconds)):
        of = [cell for cell in cells if cell.seconds == seconds or params.pretrain_for(cell.name).max_steps == 0]
        after = f"{seconds} seconds" if seconds else f"{study.steps} steps"
        tables[f"By how much {reference} is ahead of each, after {after}"] = compared(scores, of, reference, shown)
        tables[f"Each over its controls, after {after}"] = over_controls(scores, of, shown)
    return {title: table for title, table in tables.items() if table.rows}


def _said(method: Any) -> dict[str, Any]:
    return {key: value for key, value in method.model_dump().items() if value}


def _columns(params: Params, study: Study) -> dict[str, Column]:
    """What the tables show: heading, factor and digits by a column of the cells."""
    columns = COST | LEARNED
    run = Run.of(params)
    for recipe in study.recipes:
        columns[f"{recipe}/val_loss"] = (f"loss on\n{recipe}", 1.0, 3)
    for cell, data in product(study.cells(), params.run.data):
        known = {f"{data}/{f.key}": f for f in _figures(run.named(cell.name), data)}
        for recipe in study.recipes:
            known |= {f"{data}/{recipe}/{f.key}": f for f in _figures(run.evaluated(cell.name, recipe), data)}
        for key, figure in known.items():
            shown = figure.key == BEFORE or not is_detail(figure)
            if not figure.baseline and shown and figure.kind != "count":
                share = figure.kind == "share"
                columns.setdefault(
                    key, (figure.label + (", %" if share else ""), 100.0 if share else 1.0, 1 if share else 3)
                )
    return columns


def means(table: pd.DataFrame, columns: dict[str, Column]) -> Table:
    """Means ± standard deviations over the seeds: a row for each adapter and method, a column for each figure."""
    rows: dict[str, dict[str, Shown]] = {}
    for (adapter, method), runs in table.groupby(["adapter", "method"], sort=False):
        cells = {"runs": Shown(str(len(runs)))}
        for key, (_, factor, digits) in columns.items():
            values = factor * runs[key].dropna() if key in runs else pd.Series(dtype=float)
            if len(values):
                spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
                fewer = f"of {len(values)}" if len(values) < len(runs) else ""
                cells[key] = Shown(f"{values.mean():.{digits}f}{spread}", fewer)
        rows[f"{adapter}: {method}"] = cells
    headings = {"runs": "seeds"} | {key: heading for key, (heading, _, _) in columns.items()}
    return Table.of(headings, rows, "adapter: method")


def winners(table: pd.DataFrame, key: str, column: Column, title: str) -> Iterator[str]:
    """A line for each adapter: the method with the best mean, of a loss the lowest; what is next, by how many seeds."""
    heading, factor, digits = column
    sign = 1 if key.endswith("val_loss") else -1
    for adapter, runs in table.dropna(subset=[key]).groupby("adapter", sort=False):
        by_seed = runs.pivot(index="seed", columns="method", values=key).dropna(axis=1, thresh=1).dropna(axis=0)
        if by_seed.empty or by_seed.shape[1] < 2:
            continue
        first, second = (sign * by_seed.mean()).nsmallest(2).index
        if by_seed[first].equals(by_seed[second]):
            continue  # no adapter decides it
        means_of = {method: f"{factor * by_seed[method].mean():.{digits}f}" for method in (first, second)}
        worse = (sign * by_seed[second] > sign * by_seed[first]).sum()
        yield (
            f"{title}: {adapter} has the {'lowest' if sign > 0 else 'highest'} {' '.join(heading.split())} by {first}, "
            f"{means_of[first]}; next is {second}, {means_of[second]}, worse with {worse} of {len(by_seed)} seeds"
        )


def _baselines(params: Params, study: Study) -> list[str]:
    """What sees no adapter, once for each data set."""
    run, found = Run.of(params), dict[str, Figure]()
    for cell, recipe in product(study.cells(), study.recipes):
        for data in params.finetune.recipes[recipe].data:
            for figure in _figures(run.evaluated(cell.name, recipe), data):
                if figure.baseline and not is_detail(figure) and figure.kind != "count":
                    found.setdefault(f"{data}: {figure.label}", figure)
    return [
        f"{name} {f'{100 * f.value:.1f} %' if f.kind == 'share' else f'{f.value:.3f}'}" for name, f in found.items()
    ]


def _styles(names: list[str]) -> dict[str, tuple[str, str]]:
    """A colour and a line for each method, the same on all pictures."""
    return dict(zip(names, cycle((colour, line) for line in LINES for colour in COLOURS), strict=False))


def _draw_curves(params: Params, study: Study) -> Iterator[Path]:
    """Validation loss while fine-tuning, a panel for each adapter, recipe and budget, a band over the seeds."""
    run, styles, cells = Run.of(params), _styles(list(study.methods)), study.cells()
    budgets = dict.fromkeys(cell.seconds for cell in cells)
    for recipe, adapter, seconds in product(study.recipes, study.adapters, budgets):
        lines = dict[str, pd.DataFrame]()
        for cell in cells:
            folder = run.finetuned(cell.name, recipe)
            budget = seconds if params.pretrain_for(cell.name).max_steps == 0 else cell.seconds
            if (cell.adapter, budget) == (adapter, seconds) and (folder / "history.csv").exists():
                lines[cell.method] = pd.concat([lines.get(cell.method), read_history(folder, ["step", "val_loss"])])
        if not lines:
            continue
        after = f"{seconds} s" if seconds else f"{study.steps} steps"
        title = f"{adapter}, fine-tuned on {recipe}\nafter {after} of pre-training"
        figure, axes = canvas(title, "optimiser steps", "validation loss", PANEL)
        for method, rows in lines.items():
            _band(axes, rows, method, styles[method])
        figure.legend(loc="outside lower left", ncols=3, fontsize=10, frameon=False)
        path = run.base / "study" / f"curves-{adapter}-{recipe}{f'-{seconds}s' if seconds else ''}.png"
        path.parent.mkdir(exist_ok=True)
        save_png(figure, path)
        yield path


def _band(axes: Axes, rows: pd.DataFrame, label: str, style: tuple[str, str]) -> None:
    by_step = rows.groupby("step")["val_loss"]
    mean, low, high = by_step.mean(), by_step.min(), by_step.max()
    axes.fill_between(mean.index, low, high, color=style[0], alpha=0.12, linewidth=0)
    axes.plot(mean.index, mean, style[1], color=style[0], linewidth=2, label=label)


def _draw_cost(params: Params, table: pd.DataFrame, columns: dict[str, Column]) -> Iterator[Path]:
    """What there is to gain against the seconds of pre-training: a point for each adapter, method and budget."""
    run, styles = Run.of(params), _styles(list(dict.fromkeys(table["method"])))
    markers = dict(zip(dict.fromkeys(table["adapter"]), cycle(MARKERS), strict=False))
    for key in [key for key in columns if key in table and key.endswith(GAINED)]:
        heading, factor, _ = columns[key]
        title = f"{' '.join(heading.split())} ({key.partition('/')[0]})\nagainst the cost of pre-training"
        figure, axes = canvas(title, "seconds of pre-training + 1", " ".join(heading.split()), PANEL)
        by = ["adapter", "method", table["seconds"].fillna(0)]
        for (adapter, method, _), point in table.groupby(by, sort=False)[["training", key]].mean().dropna().iterrows():
            colour = styles[method][0]
            axes.scatter(1 + point["training"], factor * point[key], marker=markers[adapter], color=colour, s=46)
        axes.set_xscale("log")
        for adapter, marker in markers.items():
            axes.scatter([], [], marker=marker, color="#8c8c8c", label=adapter)
        for method, (colour, _) in styles.items():
            axes.plot([], [], color=colour, linewidth=5, label=method)
        figure.legend(loc="outside lower left", ncols=3, fontsize=10, frameon=False)
        path = run.base / "study" / f"cost-{key.replace('/', '-')}.png"
        path.parent.mkdir(exist_ok=True)
        save_png(figure, path)
        yield path


def _uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
