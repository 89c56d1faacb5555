"""One page for people (report/index.html): what it says, and the files beside it."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.config import components
from pipeline.config.schema import DataSettings
from pipeline.metrics.base import Figure, share_of
from pipeline.report import convergence
from pipeline.report.cautions import caution
from pipeline.report.figures import (
    compared,
    duration,
    flat_metrics,
    gain_of,
    interval,
    learned_from,
    measures,
    percent,
    total_time,
    written,
)
from pipeline.report.results import Results
from pipeline.report.sections import sections
from pipeline.report.tables import candidates_of, finetuning_table, pretraining_table, setup_table
from pipeline.report.verdict import verdicts
from pipeline.runs import require

PCA_PICTURES = {
    "epoch1": "After one epoch of pre-training: where image tokens (blue) and text tokens (red) lie.",
    "last": "After the last epoch: the closer the two crosses, the smaller the modality gap.",
    "zoom": "The same, closer: the crowded middle of the picture before.",
    "vocabulary": "The same tokens among the words the language model knows (grey).",
    "finetuned": "After fine-tuning with the language model, which is free to move them again.",
    "explained": "How many directions the tokens really use: the curve's crossing of the 80 % line.",
}
FEWEST = 30  # pictures among which each looks for its caption: of fewer the share is no headline
STATES = {"epoch1": "after one epoch", "last": "after the last", "finetuned": "after fine-tuning"}
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "POT", "scikit-learn", "numpy", "pyarrow", "dvc")


@dataclass(frozen=True)
class Tile:
    """A figure of the page's head."""

    value: str
    label: str
    note: str
    caution: str = ""  # why the figure promises too much


def write_report(results: Results) -> Path:
    """Write metrics.json, report/convergence.csv, the curves and report/index.html; returns the page's path.

    Raises UserError naming the first input that is missing and the stage that writes it.
    """
    params, run = results.params, results.run
    table = convergence.collect(params)
    context = _context(results, table)
    run.report.mkdir(parents=True, exist_ok=True)
    convergence.write_curves(table, run.report)
    context["finetuning_plots"] = [_png(path) for path in convergence.draw_finetuning(table, run.report)]
    context["pretraining_plots"] = [_png(path) for path in convergence.draw_pretraining(params, run.report)]
    run.metrics.write_text(json.dumps(flat_metrics(results), indent=1) + "\n", encoding="utf-8")
    page = run.report / "index.html"
    page.write_text(render(context), encoding="utf-8")
    return page


def render(context: dict[str, Any], template: str = "report.html.jinja") -> str:
    """A page; every text in it is escaped, and a text the template wants but does not get is an error."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=FileSystemLoader(Path(__file__).parent),
    )  # fmt: skip
    environment.filters |= {"percent": percent, "duration": duration, "written": written, "interval": interval}
    return environment.get_template(template).render(context)


def _context(results: Results, table: pd.DataFrame) -> dict[str, Any]:
    """Everything the template shows but the curves."""
    params = results.params
    known = [seconds for seconds in results.seconds.values() if seconds is not None]
    sources = {data: params.data[data].source for data in params.run.data}
    looked_at = params.pca.data
    return {
        "profile": params.profile,
        "seed": params.seed,
        "adapters": params.run.adapters,
        "measure": listed(measures(params)),
        "several": len(measures(params)) > 1,
        "origins": listed([f"{data} from {_origin(params.data[data])}" for data in params.run.data]),
        "texts": listed(learned_from(params)),
        "gain": gain_of(params),
        "verdicts": verdicts(results),
        "tiles": tiles(results, table),
        "sections": sections(results),
        "recipes": listed(list(dict.fromkeys(table["recipe"]))),
        "compared": "scratch" in set(table["start"]),
        "finetuning": finetuning_table(results, table),
        "pretraining": pretraining_table(results),
        "blind": any({"const_token", "const_set"} & found.keys() for found in results.pretrain.values()),
        "first": results.best(looked_at).adapter if looked_at in results.measured else params.run.adapters[0],
        "pca": {name: _pca_pictures(results, name) for name in params.run.adapters},
        "components": {name: _components(found) for name, found in results.pca.items()},
        "parameters": yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        "encoder": params.vision.model or params.vision.encoder,
        "llm": params.llm.model,
        "versions": {name: _version(name) for name in PACKAGES},
        "seconds": results.seconds,
        "memory": results.memory,
        "setup": setup_table(results),
        "slowest": max(known, default=1.0) or 1.0,
        "total": total_time(results),
        "made_of": listed([f"{source} ({data})" for data, source in sources.items()]),
        "openmoji": any(source.startswith("openmoji") for source in sources.values()),
        "others": listed([name for name in dict.fromkeys(sources.values()) if not name.startswith("openmoji")]),
    }


def _origin(settings: DataSettings) -> str:
    """A data set's folder by its name, not where on a disk it lies; its source where it has none."""
    name = Path(getattr(settings, "root", "")).name
    return f"the folder {name}" if name else settings.source


def listed(texts: list[str]) -> str:
    """'a, b and c'."""
    return " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))


def tiles(results: Results, table: pd.DataFrame) -> list[Tile]:
    """The figures of the page's head, as far as they were measured."""
    named = [_naming_tile(results, data) for data in results.measured]
    captioned = [_caption_tile(results, data) for data in results.measured]
    found = [*named, _retrieval_tile(results), _convergence_tile(results, table), *captioned]
    return [tile for tile in found if tile]


def _naming_tile(results: Results, data: str) -> Tile | None:
    """What `terraalign classify` answers by: the namer or, where there is none, the LLM."""
    best, alone = results.best(data), results.best_without_llm(data)
    said, classes = best.figure("acc"), best.figure("classes")
    unaided = next((figure for figure in alone.figures if figure.key == "acc/namer"), None) if alone else None
    accuracy = unaided or said
    if accuracy is None:
        return None
    warned = caution(results.params, data)
    label = f"of {'test' if warned else 'unseen'} pictures named"
    label += f", out of {written(classes)} names" if classes else ""
    who = f"{alone.adapter}, no language model" if alone and unaided else results.name(best)
    spread = "" if accuracy.interval is None else f"; {_spread(accuracy)}"
    others = [replace(said, label=f"the language model ({results.name(best)})")] if said and unaided else []
    others += [figure for figure in compared(results, data) if figure.kind == "share"]
    listing = "".join(f", {figure.label} {written(figure)}" for figure in others)
    return Tile(percent(accuracy.value, 0), label, f"{data}: {who}{spread}{listing}", warned)


def _spread(figure: Figure) -> str:
    return " to ".join(percent(end, 0) for end in figure.interval or ()) + " with 95\u00a0% confidence"


def _caption_tile(results: Results, data: str) -> Tile | None:
    best = results.best(data)
    f1, before, others, repeats = map(best.figure, ("f1", "f1_pretrained", "f1_shuffled", "repeats"))
    if f1 is None:
        return None
    note = f"{data}: {results.name(best)} after fine-tuning"
    note += f"; {percent(before.value, 0)} before it" if before else ""
    note += f", {percent(others.value, 0)} with pictures shuffled" if others else ""
    note += f"; {percent(repeats.value, 0)} repeat themselves" if repeats else ""
    count = best.figure("captioned")
    note += f"; {written(count)} captions" if count else ""
    label = "F1 of the things that captions name and that are in the picture"
    return Tile(percent(f1.value, 0), label, note, caution(results.params, data))


def _retrieval_tile(results: Results) -> Tile | None:
    shares = {name: found["r1_debiased"] for name, found in results.pretrain.items() if "r1_debiased" in found}
    texts = learned_from(results.params)
    if not shares or texts == ["class names"]:  # which many pictures share: none of them is one's own
        return None
    name = max(shares, key=lambda adapter: float(shares[adapter]))
    candidates, raw = candidates_of(results, name), results.pretrain[name].get("r1_raw")
    if candidates < FEWEST:
        return None
    found = share_of("r1_debiased", [at < round(shares[name] * candidates) for at in range(candidates)], "")
    note = f"{name} after pre-training, debiased; {_spread(found)}; chance {percent(1 / candidates)}"
    note += "" if raw is None else f", raw {percent(raw, 0)}"
    asks = components.find("objective", results.params.pretrain_for(name).objective.name).needs_llm
    own = " or ".join(kind.removesuffix("s") for kind in texts)
    label = f"of pictures find their own {own} among {candidates}, with {'the' if asks else 'no'} language model"
    return Tile(percent(shares[name], 0), label, note)


def _convergence_tile(results: Results, table: pd.DataFrame) -> Tile | None:
    """What pre-training saves in fine-tuning, for the adapter and recipe that show it most, and what it costs."""
    run = results.params.run
    if not (run.scratch and run.scratch_recipes):
        return None
    matches = {
        (adapter, recipe): convergence.steps_to_match(table, adapter, recipe)
        for adapter in run.scratch
        for recipe in run.scratch_recipes
    }
    shares = {pair: (m[0] / m[1] if m and m[0] is not None and m[1] else math.inf) for pair, m in matches.items()}
    adapter, recipe = pair = min(shares, key=lambda key: shares[key])
    last = {s: convergence.curve(table, adapter, recipe, s)["val_loss"].iloc[-1] for s in ("emd", "scratch")}
    note = f"{convergence.name_of(table, adapter, recipe)}: "
    note += f"validation loss {last['emd']:.2f} with it, {last['scratch']:.2f} without"
    cost = results.seconds.get(f"pretrain@{adapter}")
    note += "" if cost is None else f"; pre-training itself took {duration(cost)}"
    match = matches[pair]
    if match is None or match[0] is None:
        return Tile("no gain", "from pre-training in fine-tuning steps", note)
    return Tile(f"{match[0]} of {match[1]}", "fine-tuning steps suffice after pre-training", note)


def _pca_pictures(results: Results, adapter: str) -> list[tuple[str, str]]:
    """(data URI, what it shows) of every picture of a stage pca."""
    folder = results.run.pca(adapter)
    return [(_png(require(folder / f"{name}.png")), text) for name, text in PCA_PICTURES.items()]


def _components(states: dict[str, dict[str, Any]]) -> str:
    """The figures of a stage pca in words."""
    gaps = [f"{states[s]['gap']:.2f} {text}" for s, text in STATES.items() if "gap" in states.get(s, {})]
    counts = [str(states[s]["k80"]) for s in STATES if "k80" in states.get(s, {})]
    texts = [f"Modality gap (distance of the centroids) {', '.join(gaps)}"] if gaps else []
    planes = [percent(sum(states[s]["explained"][:2]), 0) for s in STATES if "explained" in states.get(s, {})]
    alone = f"; of the text tokens alone {states['text']['k80']}" if "k80" in states.get("text", {}) else ""
    texts += [f"components for 80\u00a0% of the variance: {', '.join(counts)}{alone}"] if counts else []
    texts += [f"the first two hold {', '.join(planes)}"] if planes else []
    return "; ".join(texts) + "." if texts else ""


def _png(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
