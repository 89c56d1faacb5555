"""The results of a profile as figures for machines (metrics.json) and as one page for people (report/index.html)."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jinja2 import Environment, StrictUndefined

from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.media.pictures import decode, read
from pipeline.media.plots import require
from pipeline.report import convergence
from pipeline.runs import Run

PRETRAIN_KEYS = (
    *("val", "shuffled", "const_token", "const_set", "r1_raw", "r1_debiased"),
    *("image_gain", "image_gain_low", "image_gain_high", "held_out"),
)
EVALUATE_KEYS = (
    *("acc", "acc_strict", "valid_name", "probe", "chance", "test_images", "classes"),
    *("captions_right", "captions_right_pretrained", "captions_right_shuffled", "captioned"),
)
STATES = ("epoch1", "last", "finetuned")
PCA_PICTURES = {
    "epoch1": "After one epoch of pre-training: where image tokens (blue) and caption tokens (red) lie.",
    "last": "After the last epoch: the closer the two crosses, the smaller the modality gap.",
    "zoom": "The same, closer: the crowded middle of the picture before.",
    "vocabulary": "The same tokens among the words the language model knows (grey).",
    "finetuned": "After fine-tuning with the language model, which is free to move them again.",
    "explained": "How many directions the tokens really use: the curve's crossing of the 80 % line.",
}
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "POT", "scikit-learn", "numpy", "pyarrow", "dvc")
GALLERY, EXAMPLES, CONFUSED = 24, 6, 8
THUMBNAIL = 240  # pixels of the longer side


@dataclass(frozen=True)
class Results:
    """Everything the stages measured, by adapter."""

    params: Params
    base: Path
    pretrain: dict[str, dict[str, Any]]
    evaluate: dict[str, dict[str, Any]]
    pca: dict[str, dict[str, Any]]
    finetune: dict[str, dict[str, Any]]
    classes: dict[str, dict[str, Any]]
    scratch: dict[str, dict[str, Any]]
    seconds: dict[str, float | None]  # None: the stage was restored from DVC's cache and never ran here

    @property
    def best(self) -> str:
        """The adapter with the lowest validation loss on classes: the test part has no say in the choice."""
        return min(self.classes, key=lambda name: float(self.classes[name]["val_loss"]))


@dataclass(frozen=True)
class Tile:
    """A figure of the page's head."""

    value: str
    label: str
    note: str


@dataclass(frozen=True)
class Bar:
    """A row of the accuracy chart; low and high are its 95 % interval, where it has one."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    strict: float | None = None
    kind: str = "adapter"


@dataclass(frozen=True)
class Shot:
    """A picture of the gallery and what each adapter says of it."""

    picture: str | None
    reference: str
    captions: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """A food picture, its name, and the answer."""

    picture: str | None
    label: str
    answer: str


def write_report(params: Params) -> Path:
    """Write metrics.json, report/convergence.csv, the curves and report/index.html; returns the page's path.

    Raises UserError naming the first input that is missing and the stage that writes it.
    """
    results = read_results(params)
    table = convergence.collect(params)
    context = _context(results, table)
    folder = results.base / "report"
    folder.mkdir(parents=True, exist_ok=True)
    convergence.write_curves(table, folder)
    context["finetuning_plots"] = [_png(path) for path in convergence.draw_finetuning(table, folder)]
    context["pretraining_plots"] = [_png(path) for path in convergence.draw_pretraining(params, folder)]
    (results.base / "metrics.json").write_text(json.dumps(flat_metrics(results), indent=1) + "\n", encoding="utf-8")
    page = folder / "index.html"
    page.write_text(render(context), encoding="utf-8")
    return page


def render(context: dict[str, Any]) -> str:
    """The page; every text in it is escaped, and a figure the template wants but does not get is an error."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "duration": duration}
    template = resources.files("pipeline.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(context)


# Reading


def read_results(params: Params) -> Results:
    """The metrics of every stage of a profile."""
    run = Run.of(params)
    names, scratch = params.run.adapters, params.run.scratch
    return Results(
        params,
        base,
        {n: _json(base / "pretrain" / n / "metrics.json", f"pretrain@{n}", PRETRAIN_KEYS) for n in names},
        {n: _json(base / "evaluate" / n / "metrics.json", f"evaluate@{n}", EVALUATE_KEYS) for n in names},
        {n: _json(base / "pca" / n / "metrics.json", f"pca@{n}", STATES) for n in names},
        {n: _finetuned(base / "finetune" / f"{n}-captions", f"finetune@{n}-captions") for n in names},
        {n: _finetuned(base / "finetune" / f"{n}-classes", f"finetune@{n}-classes") for n in names},
        {n: _finetuned(base / "finetune_scratch" / n, f"finetune_scratch@{n}") for n in scratch},
        {stage: _seconds(base / "seconds" / f"{stage}.json") for stage in stage_names(params)},
    )


def stage_names(params: Params) -> list[str]:
    """The stages of dvc.yaml before the report, as DVC names them."""
    adapters, scratch = params.run.adapters, params.run.scratch
    names = [f"{stage}@{data}" for stage in ("prepare", "extract_images", "extract_captions") for data in DATASETS]
    names += [f"pretrain@{name}" for name in adapters]
    names += [f"finetune@{name}-{data}" for name in adapters for data in DATASETS]
    names += [f"finetune_scratch@{name}" for name in scratch]
    return names + [f"{stage}@{name}" for stage in ("evaluate", "pca") for name in adapters]


def _json(path: Path, stage: str, keys: Iterable[str] = ()) -> Any:
    try:
        values = json.loads(require(path, stage).read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: not valid JSON; run `dvc repro --force {stage}`") from None
    missing = [key for key in keys if key not in values]
    if missing:
        raise UserError(f"{path}: no {', '.join(missing)} in it; run `dvc repro --force {stage}`")
    return values


def _finetuned(folder: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = _json(folder / "metrics.json", stage, ("val_loss", "steps"))
    return found


def _seconds(path: Path) -> float | None:
    """A stage's seconds; None when it did not run here or its file is not readable: a timing is worth no failure."""
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _table(path: Path, stage: str, columns: Sequence[str]) -> pd.DataFrame:
    """A CSV of texts in which an empty cell is an empty text, and a dish called NA stays one."""
    try:
        rows = pd.read_csv(require(path, stage), dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError:
        rows = pd.DataFrame()
    missing = [column for column in columns if column not in rows]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)}; run `dvc repro --force {stage}`")
    return rows


# Figures for machines and for the terminal


def flat_metrics(results: Results) -> dict[str, float | None]:
    """The figures of a profile under flat keys, for `dvc metrics diff`; null where a figure is not finite."""
    flat: dict[str, float | None] = {}
    for name in results.params.run.adapters:
        before, after = results.pretrain[name], results.evaluate[name]
        keys = ("val", "shuffled", "const_token", "const_set", "image_gain", "image_gain_low", "image_gain_high")
        flat |= {f"emd/{name}/{key}": before[key] for key in keys}
        flat |= {f"retrieval/{name}/{key}": before[key] for key in ("r1_raw", "r1_debiased")}
        flat |= {f"acc/{name}": after["acc"], f"acc_strict/{name}": after["acc_strict"]}
        flat |= {f"captions_right/{name}": after["captions_right"]}
        flat |= {f"captions_right_shuffled/{name}": after["captions_right_shuffled"]}
        flat |= {f"ft/{name}/emd/val_loss": results.finetune[name]["val_loss"]}
        flat |= {f"pca/{name}/{state}/k80": results.pca[name][state]["k80"] for state in STATES}
    flat |= {f"ft/{name}/scratch/val_loss": found["val_loss"] for name, found in results.scratch.items()}
    flat |= {f"acc/{key}": results.evaluate[results.best][key] for key in ("probe", "chance")}
    flat |= {f"seconds/{stage}": seconds for stage, seconds in results.seconds.items() if seconds is not None}
    return {key: value if value is not None and math.isfinite(value) else None for key, value in flat.items()}


def main_figures(params: Params) -> list[tuple[str, str]]:
    """The main figures as (what, value) for a table in the terminal."""
    results = read_results(params)
    rows = []
    for bar in accuracy_bars(results):
        interval = "" if bar.low is None else f" ({percent(bar.low)} to {percent(bar.high)})"
        rows.append((f"food accuracy, {bar.name}", percent(bar.value) + interval))
    for name, found in results.pretrain.items():
        interval = f"{found['image_gain_low']:.3f} to {found['image_gain_high']:.3f}"
        rows.append((f"image gain of pre-training, {name}", f"{found['image_gain']:.3f} EMD ({interval})"))
    for name, found in results.finetune.items():
        rows.append((f"caption loss, {name}, pre-trained", f"{found['val_loss']:.3f}"))
        if name in results.scratch:
            rows.append((f"caption loss, {name}, from scratch", f"{results.scratch[name]['val_loss']:.3f}"))
    return [*rows, ("time of all stages, added up", _total(results))]


def _total(results: Results) -> str:
    known = [seconds for seconds in results.seconds.values() if seconds is not None]
    missing = len(results.seconds) - len(known)
    noun = "1 stage" if missing == 1 else f"{missing} stages"
    return duration(sum(known)) + (f", without {noun} restored from DVC's cache" if missing else "")


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share seen in `count` trials (Wilson's score: sound near 0 and 1 too)."""
    if not count:
        return 0.0, 1.0
    z = 1.959964
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def percent(share: float | None, digits: int = 1) -> str:
    """0.8351 -> '83.5 %', with a no-break space."""
    return "?" if share is None else f"{100 * share:.{digits}f}\u00a0%"


def duration(seconds: float) -> str:
    """75.2 -> '1 min 15 s'."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}\u00a0s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}\u00a0h {minutes}\u00a0min" if hours else f"{minutes}\u00a0min {whole % 60}\u00a0s"


# The page


def _context(results: Results, table: pd.DataFrame) -> dict[str, Any]:
    """Everything the template shows but the curves."""
    params, best = results.params, results.best
    sources = (params.data.captions.source, params.data.classes.source)
    right, wrong = food_examples(results)
    return {
        "profile": params.profile,
        "seed": params.seed,
        "adapters": params.run.adapters,
        "best": best,
        "tiles": tiles(results, table),
        "shots": gallery(results),
        "captioned": results.evaluate[best]["captioned"],
        "prefix": params.evaluate.pretrained_prefix,
        "caption_shares": {name: _caption_share(found) for name, found in results.evaluate.items()},
        "bars": accuracy_bars(results),
        "tested": results.evaluate[best],
        "right": right,
        "wrong": wrong,
        "confused": confused(results),
        "pretrained": results.pretrain,
        "candidates": {name: candidates_of(results, name) for name in params.run.adapters},
        "below_blind": {name: below_blind(found) for name, found in results.pretrain.items()},
        "finetuned": results.finetune,
        "scratch": results.scratch,
        "pca": {name: _pca_pictures(results, name) for name in params.run.adapters},
        "components": results.pca,
        "parameters": yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        "encoder": params.vision.model or params.vision.encoder,
        "llm": params.llm.model,
        "versions": {name: _version(name) for name in PACKAGES},
        "seconds": results.seconds,
        "slowest": max((value for value in results.seconds.values() if value is not None), default=1.0) or 1.0,
        "total": _total(results),
        "openmoji": any(source.startswith("openmoji") for source in sources),
        "sources": sources,
    }


def tiles(results: Results, table: pd.DataFrame) -> list[Tile]:
    """The four figures of the page's head."""
    best = results.best
    found = results.evaluate[best]
    low, high = wilson(found["acc"], found["test_images"])
    retrieval = max(results.pretrain, key=lambda name: float(results.pretrain[name]["r1_debiased"]))
    candidates = candidates_of(results, retrieval)
    return [
        Tile(
            percent(found["acc"], 0),
            f"of unseen food pictures named, out of {found['classes']} names",
            f"{best}; {percent(low, 0)} to {percent(high, 0)} with 95 % confidence, chance {percent(found['chance'])}, "
            f"linear probe {percent(found['probe'], 0)}",
        ),
        Tile(
            percent(results.pretrain[retrieval]["r1_debiased"], 0),
            f"of pictures find their own caption among {candidates}, with no language model",
            f"{retrieval} after pre-training, debiased; chance {percent(1 / candidates)}, "
            f"raw {percent(results.pretrain[retrieval]['r1_raw'], 0)}",
        ),
        _convergence_tile(results, table),
        Tile(
            percent(found["captions_right"], 0),
            "of captions name a thing that is in the picture",
            f"{best} after fine-tuning; {percent(found['captions_right_pretrained'], 0)} before it, "
            f"{percent(found['captions_right_shuffled'], 0)} of other pictures' things; {found['captioned']} captions",
        ),
    ]


def candidates_of(results: Results, adapter: str) -> int:
    """How many captions retrieval chose from: chance is one in so many."""
    return min(results.params.pretrain_for(adapter).candidates, int(results.pretrain[adapter]["held_out"]))


def below_blind(found: dict[str, Any]) -> float:
    """By which share the held-out EMD is below that of the best image-blind token set; negative when it is above."""
    blind = min(float(found["const_token"]), float(found["const_set"]))
    return (blind - float(found["val"])) / blind if blind else 0.0


def _convergence_tile(results: Results, table: pd.DataFrame) -> Tile:
    """What pre-training saves in fine-tuning, for the adapter that shows it most, and what it costs."""
    matches = {name: convergence.steps_to_match(table, name) for name in results.scratch}
    shares = {name: (m[0] / m[1] if m and m[0] is not None and m[1] else math.inf) for name, m in matches.items()}
    name = min(shares, key=lambda key: shares[key])
    match = matches[name]
    losses = f"validation loss {results.finetune[name]['val_loss']:.2f} with it, "
    losses += f"{results.scratch[name]['val_loss']:.2f} without"
    cost = results.seconds.get(f"pretrain@{name}")
    losses += "" if cost is None else f"; pre-training itself took {duration(cost)}"
    if match is None or match[0] is None:
        return Tile("no gain", "from pre-training in fine-tuning steps", f"{name}: {losses}")
    return Tile(f"{match[0]} of {match[1]}", "fine-tuning steps suffice after pre-training", f"{name}: {losses}")


def accuracy_bars(results: Results) -> list[Bar]:
    """Adapters, then the linear probe and chance."""
    tested = results.evaluate[results.best]
    bars = []
    for name, found in results.evaluate.items():
        low, high = wilson(found["acc"], found["test_images"])
        bars.append(Bar(name, found["acc"], low, high, found["acc_strict"]))
    low, high = wilson(tested["probe"], tested["test_images"])
    probe = Bar("linear probe", tested["probe"], low, high, kind="baseline")
    return [*bars, probe, Bar("chance", tested["chance"], kind="baseline")]


def _caption_share(found: dict[str, Any]) -> str:
    low, high = wilson(found["captions_right"], found["captioned"])
    share, before = percent(found["captions_right"], 0), percent(found["captions_right_pretrained"], 0)
    return f"{share} ({percent(low, 0)} to {percent(high, 0)}), {before} before fine-tuning"


def gallery(results: Results) -> list[Shot]:
    """The first test pictures that were captioned, in order of id and so not picked, with every adapter's captions."""
    said: dict[str, dict[str, dict[str, Any]]] = {}
    for name in results.params.run.adapters:
        rows = _json(results.base / "evaluate" / name / "captions.json", f"evaluate@{name}")
        said[name] = {row["id"]: row for row in rows}
    shown = list(said[results.best].values())[:GALLERY]
    return [
        Shot(
            thumbnail(row["image"]),
            row["references"][0] if row["references"] else "",
            {name: rows[row["id"]] for name, rows in said.items() if row["id"] in rows},
        )
        for row in shown
    ]


def food_examples(results: Results) -> tuple[list[Example], list[Example]]:
    """Some right and some wrong answers of the best adapter, each of another dish."""
    rows = _predictions(results)
    correct = rows["correct"].str.lower().isin(("true", "1"))
    return _examples(rows[correct]), _examples(rows[~correct])


def _predictions(results: Results) -> pd.DataFrame:
    path = results.base / "evaluate" / results.best / "predictions.csv"
    return _table(path, f"evaluate@{results.best}", ("image", "label", "output", "predicted", "correct"))


def _examples(rows: pd.DataFrame) -> list[Example]:
    kept = rows.drop_duplicates("label").head(EXAMPLES)
    columns = (kept["image"], kept["label"], kept["output"])
    return [Example(thumbnail(image), label, output.strip()) for image, label, output in zip(*columns, strict=True)]


def confused(results: Results) -> list[dict[str, Any]]:
    """The pairs of dishes taken for one another most often, with a test picture of each."""
    path = results.base / "evaluate" / results.best / "confusions.csv"
    rows = _table(path, f"evaluate@{results.best}", ("label", "predicted", "count")).head(CONFUSED)
    pictures = dict(_predictions(results).drop_duplicates("label")[["label", "image"]].itertuples(index=False))
    return [
        {
            "label": label,
            "predicted": predicted,
            "count": int(count),
            "pictures": [thumbnail(pictures[name]) if name in pictures else None for name in (label, predicted)],
        }
        for label, predicted, count in rows[["label", "predicted", "count"]].itertuples(index=False)
    ]


def _pca_pictures(results: Results, adapter: str) -> list[tuple[str, str]]:
    """(data URI, what it shows) of every picture of a stage pca."""
    folder = results.base / "pca" / adapter
    return [(_png(require(folder / f"{name}.png", f"pca@{adapter}")), text) for name, text in PCA_PICTURES.items()]


def thumbnail(path: str) -> str | None:
    """A picture as a small JPEG in a data URI; None when its file is gone or cannot be read."""
    try:
        picture = decode(read(path))
    except (OSError, ValueError):
        return None
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _png(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
