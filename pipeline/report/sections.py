"""The page's section of each data set, by its task: a gallery of captions, an accuracy chart, or a table of answers."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from pipeline.config import components
from pipeline.media.pictures import decode, read
from pipeline.metrics.things import Judged, Things
from pipeline.report.cautions import caution
from pipeline.report.figures import compared, with_interval
from pipeline.report.results import Outcome, Results
from pipeline.report.tables import Table, figures_table, scores_table, ways_table
from pipeline.report.ways import Way, ways
from pipeline.tasks.base import Task
from pipeline.tasks.captioning import Captioning
from pipeline.tasks.naming import Naming, confusions, per_class

GALLERY, EXAMPLES, CONFUSED = 24, 6, 8
CLASSES = 120  # of which a picture is shown
THUMBNAIL, TILE = 240, 96  # pixels of the longer side


@dataclass(frozen=True)
class Tab:
    """A choice among outcomes: its id, its name, and whether it is shown first."""

    key: str
    name: str
    best: bool


@dataclass(frozen=True)
class Section:
    """What the page shows of a data set; `template` says how, and its texts are `body`."""

    template: str
    data: str
    prompt: str
    best: str
    tabs: list[Tab]
    table: Table
    baselines: list[str]
    caution: str  # why its figures promise too much
    body: dict[str, Any]


@dataclass(frozen=True)
class Shot:
    """A picture of the gallery and what is said of it, by the key of a tab; `judged` by the same, where measured."""

    picture: str | None
    reference: str
    captions: dict[str, dict[str, Any]]
    judged: dict[str, Judged]


@dataclass(frozen=True)
class Example:
    """A picture, its name, and the answer."""

    picture: str | None
    label: str
    answer: str


@dataclass(frozen=True)
class Tile:
    """A class: a test picture of it, and how many were named right."""

    picture: str | None
    label: str
    right: int
    images: int


@dataclass(frozen=True)
class Confusion:
    """Two classes taken for one another, how often, and a test picture of each."""

    label: str
    predicted: str
    count: int
    pictures: list[str | None]


def sections(results: Results) -> list[Section]:
    """A section for each data set that was measured. Raises UserError naming answers that are missing."""
    return [_section(results, data) for data in results.measured]


def _section(results: Results, data: str) -> Section:
    name, best = results.params.data[data].task, results.best(data)
    task = Task.of(name, results.params.evaluate)
    template, body = _kind_of(task)
    return Section(
        template,
        data,
        task.prompt,
        results.name(best),
        [Tab(key_of(outcome), results.name(outcome), outcome is best) for outcome in results.of(data)],
        figures_table(results, data),
        [f"{figure.label} {with_interval(figure)}" for figure in compared(results, data)],
        caution(results.params, data),
        body(results, data),
    )


def _kind_of(task: Task) -> tuple[str, Callable[[Results, str], dict[str, Any]]]:
    """The template of a task's section, and what fills it."""
    if isinstance(task, Captioning):
        return "gallery.html.jinja", partial(_gallery, prefix=task.settings.pretrained_prefix)
    if isinstance(task, Naming):
        return "naming.html.jinja", _naming
    return "answers.html.jinja", _answers


def key_of(outcome: Outcome) -> str:
    """A name for the page's own use: neither part has a hyphen."""
    return f"{outcome.adapter}-{outcome.recipe}"


def answers_of(results: Results, outcome: Outcome) -> pd.DataFrame:
    """The answers to test pictures, as their task wrote them."""
    task: type[Task] = components.find("task", results.params.data[outcome.data].task)
    return task.read(results.run.evaluated(outcome.adapter, outcome.recipe) / outcome.data)


# Captions


def _gallery(results: Results, data: str, prefix: str) -> dict[str, Any]:
    """The first test pictures that were captioned, in order of id and so not picked, with everyone's captions."""
    best = results.best(data)
    tables = {key_of(outcome): answers_of(results, outcome) for outcome in results.of(data)}
    said = {key: {row["id"]: row for row in table.to_dict("records")} for key, table in tables.items()}
    things = _things(results, data) if best.figure("f1") else None
    shots = []
    for row in tables[key_of(best)].head(GALLERY).to_dict("records"):
        captions = {key: rows[row["id"]] for key, rows in said.items() if row["id"] in rows}
        judged = {
            key: things.judge(found["finetuned"], found["references"]) for key, found in captions.items() if things
        }
        shots.append(Shot(thumbnail(row["image"]), next(iter(row["references"]), ""), captions, judged))
    scores = scores_table(results, data)
    return {"shots": shots, "captioned": len(tables[key_of(best)]), "prefix": prefix, "scores": scores}


def _things(results: Results, data: str) -> Things:
    """As the metric had them: from the captions of all pictures of the data set."""
    from pipeline.store.reader import usable_rows  # torch

    return Things([list(texts) for texts in usable_rows(results.run, data)["captions"]])


# Names


def _naming(results: Results, data: str) -> dict[str, Any]:
    """Accuracies as bars, and answers of the best."""
    best = results.best(data)
    rows = answers_of(results, best)
    lines = {figure.key: figure for figure in results.baselines(data)}
    counts = {key: figure for key, figure in lines.items() if figure.kind == "count"}
    return {
        "chart": chart(results, data),
        "ways": ways_table(results, data),
        "unaided": unaided.adapter if (unaided := results.best_without_llm(data)) else None,
        "images": int(counts["test_images"].value) if "test_images" in counts else None,
        "classes": int(counts["classes"].value) if "classes" in counts else None,
        "classifiers": [lines[key].label for key in ("probe", "probe_attention", "discriminant") if key in lines],
        "right": _examples(rows[rows["correct"]]),
        "wrong": _examples(rows[~rows["correct"]]),
        "confused": _confused(rows),
        "tiles": _tiles(rows),
    }


def chart(results: Results, data: str) -> dict[str, list[Way]]:
    """The rows of the accuracy chart below the heads of their groups; none where no accuracy was measured."""
    groups: dict[str, list[Way]] = {}
    for way in ways(results, data):
        groups.setdefault(way.adapter or "for comparison", []).append(way)
    return groups


def _examples(rows: pd.DataFrame) -> list[Example]:
    """Some answers, each of another class."""
    kept = rows.drop_duplicates("label").head(EXAMPLES)
    columns = (kept["image"], kept["label"], kept["output"])
    return [Example(thumbnail(image), label, output.strip()) for image, label, output in zip(*columns, strict=True)]


def _tiles(rows: pd.DataFrame) -> list[Tile]:
    """Every class, the worst named first; of more than CLASSES the worst."""
    counts = per_class(rows).sort_values(["accuracy", "label"]).head(CLASSES)
    pictures = dict(rows.drop_duplicates("label")[["label", "image"]].itertuples(index=False))
    return [
        Tile(thumbnail(pictures[label], TILE), label, int(right), int(images))
        for label, images, right in counts[["label", "images", "correct"]].itertuples(index=False)
    ]


def _confused(rows: pd.DataFrame) -> list[Confusion]:
    """The pairs taken for one another most often."""
    pictures = dict(rows.drop_duplicates("label")[["label", "image"]].itertuples(index=False))
    return [
        Confusion(
            label,
            predicted,
            int(count),
            [thumbnail(pictures[name]) if name in pictures else None for name in (label, predicted)],
        )
        for label, predicted, count in confusions(rows).head(CONFUSED).itertuples(index=False)
    ]


# Answers of any other task


def _answers(results: Results, data: str) -> dict[str, Any]:
    """The best one's first answers as they were kept, with their pictures."""
    rows = answers_of(results, results.best(data)).head(GALLERY)
    columns = [column for column in rows if column not in ("id", "image")]
    pictures = [thumbnail(path) for path in rows["image"]] if "image" in rows else [None] * len(rows)
    texts = [[_text(row[column]) for column in columns] for row in rows.to_dict("records")]
    return {"columns": columns, "answers": list(zip(pictures, texts, strict=True))}


def _text(value: object) -> str:
    return " / ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def thumbnail(path: str, side: int = THUMBNAIL) -> str | None:
    """A picture as a small JPEG in a data URI; None when its file is gone or cannot be read."""
    try:
        picture = decode(read(path))
    except (OSError, ValueError):
        return None
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
