"""Which options of pretrain.objective help? Pre-trains one adapter with each of them, on the features of a project.

    python benchmarks/objective.py --project FOLDER --out runs.csv [--adapter mlp] [--seeds 3] [--folds 5]
        [--epochs 4] [--batch 32] [--data captions] [--only plain base] [--finetune] [--table]

FOLDER is a project whose pictures and captions are extracted; nothing but data/models is written there. Without --folds
its own split counts; with it, the hash of a picture's id puts it into one of five folds, and each of the first --folds
ones is held out in turn while the other four train; its number is added to the seed.
--finetune: each run is also fine-tuned by the recipes captions and classes with the project's own settings, the same
for every objective, and evaluated on the test pictures. Other --data, --epochs, --batch, and --finetune want another
CSV. Every finished run adds a row to the CSV, and a run that has its row is not repeated, so a killed script goes on.
In the end (with --table at once) the means and standard deviations over seeds and folds are printed.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import torch
import yaml

from pipeline.config import Params
from pipeline.metrics.base import read_figures
from pipeline.runs import EXTRACTED_BY, MODELS, STORE, Run
from stages.evaluate import evaluate
from stages.finetune import finetune
from stages.pretrain import pretrain

PLAIN = {"cost": "euclidean", "word_weights": "uniform", "start": "random"}
BASE = {"cost": "euclidean", "word_weights": "idf_squared", "start": "constant_set"}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "constant_set": PLAIN | {"start": "constant_set"},
    "idf": PLAIN | {"word_weights": "idf"},
    "idf_squared": PLAIN | {"word_weights": "idf_squared"},
    "base": BASE,
    "base, positions": BASE,  # of the architecture, see `changed`
    "base, contrast": BASE | {"contrast": 0.3},
    "base, sqeuclidean": BASE | {"cost": "sqeuclidean"},
    "base, cosine": BASE | {"cost": "cosine"},
    "base, whitened": BASE | {"space": "whitened"},
    "base, unmatched": BASE | {"unmatched": 0.2},
    "base, contrast 1": BASE | {"contrast": 1.0},
    "base, contrast 1, unmatched": BASE | {"contrast": 1.0, "unmatched": 0.2},
    "base, contrast, unmatched": BASE | {"contrast": 0.3, "unmatched": 0.2},
    "base, contrast at 0.2, unmatched": BASE | {"contrast": 0.3, "temperature": 0.2, "unmatched": 0.2},
    "base, contrast at 0.5, unmatched": BASE | {"contrast": 0.3, "temperature": 0.5, "unmatched": 0.2},
    "base, contrast 1 at 0.5, unmatched": BASE | {"contrast": 1.0, "temperature": 0.5, "unmatched": 0.2},
}
KEY = ["data", "adapter", "variant", "seed", "fold"]
FIGURES = {  # of the metrics: a column of the table, and its unit
    "plain_gain_relative": ("plain image gain, %", 100),
    "over_base": ("less base's", 100),
    "plain_val": ("plain EMD", 1),
    "below_blind": ("below blind, %", 100),
    "r1_debiased": ("R@1, %", 100),
    "r5_debiased": ("R@5, %", 100),
    "r1_raw": ("R@1 raw, %", 100),
    "nearest_in_caption": ("word in caption, %", 100),
    "nearest_in_shuffled": ("shuffled, %", 100),
    "loss_start": ("caption loss before fine-tuning", 1),
    "loss_captions": ("and after it", 1),
    "f1_pretrained": ("F1 of captions before, %", 100),
    "f1": ("and after, %", 100),
    "repeats": ("repeats, %", 100),
    "loss_classes": ("class loss", 1),
    "acc": ("class accuracy, %", 100),
}


def main() -> None:
    arguments = _arguments()
    values = yaml.safe_load((arguments.project / "params.yaml").read_text())
    folds = range(arguments.folds) if arguments.folds else [-1]
    runs = [(seed, fold, variant) for seed in range(arguments.seeds) for fold in folds for variant in arguments.only]
    done = _done(arguments.out)
    todo = [run for run in runs if (values["profile"], arguments.adapter, run[2], *run[:2]) not in done]
    began, number = time.monotonic(), 0
    for (seed, fold), group in itertools.groupby([] if arguments.table else todo, key=lambda run: run[:2]):
        with linked(arguments.project, values["profile"], fold):
            for *_, variant in group:
                params = changed(values, arguments, variant, seed + max(fold, 0))
                figures = run_once(params, arguments.adapter, arguments.finetune)
                row = dict(zip(KEY, (values["profile"], arguments.adapter, variant, seed, fold), strict=True)) | figures
                pd.DataFrame([row]).to_csv(arguments.out, mode="a", index=False, header=not arguments.out.exists())
                number += 1
                left = (time.monotonic() - began) / number * (len(todo) - number) / 60
                gain = f"{100 * figures['plain_gain_relative']:.1f} % plain gain in {figures['seconds']:.0f} s"
                print(
                    f"{number}/{len(todo)} {variant}, seed {seed}, fold {fold}: {gain}, {left:.0f} min left", flush=True
                )
    print(table(pd.read_csv(arguments.out)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=lambda text: Path(text).resolve(), required=True)
    parser.add_argument("--out", type=lambda text: Path(text).resolve(), required=True)
    parser.add_argument("--adapter", default="mlp")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--data", nargs="+", choices=["captions", "classes"], default=["captions"])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--finetune", action="store_true", help="fine-tune and evaluate every run")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    arguments = parser.parse_args()
    if arguments.folds and (arguments.finetune or arguments.data != ["captions"]):
        parser.error("folds split captions alone, and leave no test pictures: without --data and --finetune")
    return arguments


def changed(values: dict[str, Any], arguments: argparse.Namespace, variant: str, seed: int) -> Params:
    """The project's parameters with a variant's objective, on one thread."""
    values = json.loads(json.dumps(values))
    section = values["adapters"][arguments.adapter]
    values["pretrain"] |= section["pretrain"] | {"data": arguments.data, "objective": VARIANTS[variant]}
    for key in ("epochs", "batch"):
        values["pretrain"][key] = getattr(arguments, key) or values["pretrain"][key]
    section["pretrain"] = {}
    if variant.endswith("positions"):
        section["architecture"]["positions"] = section["architecture"]["pool"] ** 2
    values |= {"seed": seed, "runtime": {"emd_threads": 1}}
    return Params.model_validate(values)


@contextlib.contextmanager
def linked(project: Path, profile: str, fold: int) -> Iterator[None]:
    """Work in a new folder of links to the project's features, where the fold is the held-out split."""
    base = Run(profile).base
    source = project / base
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        (base / "prepare").mkdir(parents=True)
        for shared in (MODELS, STORE):
            shared.symlink_to(project / shared)
        for kind in EXTRACTED_BY:
            (base / kind).symlink_to(source / kind)
        for path in (source / "prepare").glob("*.parquet"):
            rows = pq.read_table(path).to_pandas()
            if fold >= 0 and path.stem == "captions":
                rows["split"] = ["val" if fold_of(i) == fold else "train" for i in rows["id"]]
            rows.to_parquet(base / "prepare" / path.name)
        yield


def run_once(params: Params, adapter: Any, finetuned: bool) -> dict[str, float]:
    """Pre-train, and perhaps fine-tune, in the current folder; the metrics.

    Runs of equal measure and seed share the constant sets.
    """
    Path("params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json", exclude_unset=True)))
    run = Run.of(params)
    began = time.perf_counter()
    pretrain(adapter)
    metrics = _metrics(run.pretrained(adapter))
    metrics |= {"below_blind": 1 - metrics["val"] / min(metrics["const_token"], metrics["const_set"])}
    metrics["seconds"] = time.perf_counter() - began
    if finetuned:
        for recipe in ("captions", "classes"):
            finetune(adapter, recipe)
            evaluate(adapter, recipe)
            metrics[f"loss_{recipe}"] = _metrics(run.finetuned(adapter, recipe))["val_loss"]
            for data in params.finetune.recipes[recipe].data:
                metrics |= {figure.key: figure.value for figure in read_figures(run.evaluated(adapter, recipe), data)}
        history = pd.read_csv(run.finetuned(adapter, "captions") / "history.csv")
        metrics["loss_start"] = history["val_loss"].iloc[0]
    return metrics


def _metrics(folder: Path) -> dict[str, float]:
    figures: dict[str, float] = json.loads((folder / "metrics.json").read_text())
    return figures


def fold_of(row_id: str) -> int:
    """One of five."""
    return int(hashlib.sha256(row_id.encode()).hexdigest(), 16) % 5


def _done(path: Path) -> set[tuple[Any, ...]]:
    return set(pd.read_csv(path)[KEY].itertuples(index=False, name=None)) if path.exists() else set()


def table(runs: pd.DataFrame) -> str:
    """Mean and standard deviation of each figure over seeds and folds, in Markdown.

    The gain less that of `base` is a difference between runs of equal seed and fold.
    """
    paired = [key for key in KEY if key != "variant"]
    base = runs[runs["variant"] == "base"].set_index(paired)["plain_gain_relative"]
    columns = {key: FIGURES[key] for key in FIGURES if key == "over_base" or key in runs}
    lines = [" | ".join(["| data, adapter", "objective", "runs", *(name for name, _ in columns.values())]) + " |"]
    lines.append("|" + "---|" * (3 + len(columns)))
    for (data, adapter, variant), group in runs.groupby(KEY[:3], sort=False):
        figures = group.set_index(paired)
        figures["over_base"] = figures["plain_gain_relative"] - base
        cells = [f"| {data}, {adapter}", variant, str(len(group))]
        for key, (_, unit) in columns.items():
            digits = 1 if unit == 100 else 2
            mean, spread = figures[key].mean() * unit, figures[key].std() * unit
            cells.append(f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(group) > 1 else ""))
        lines.append(" | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
