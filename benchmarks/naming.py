"""Ways of naming side by side: accuracies of several runs, and how far each is from a linear probe.

    python benchmarks/naming.py FOLDER... [--adapter mlp] [--data classes] [--recipe classes]

Each FOLDER is a project, of another seed, in which `dvc repro evaluate@mlp-classes` has run. Prints mean and spread
over the runs, and the mean difference to the probe with its 95 % interval: a bootstrap over test pictures, paired, each
drawn with its answers in all runs (Efron 1979).
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.config import load_params
from pipeline.naming.classes import labelled
from pipeline.naming.rules import LLM_RULES, RULES
from pipeline.naming.table import Named
from pipeline.runs import Run
from pipeline.store.reader import ImageTokens
from pipeline.tasks.naming import Naming

DRAWS = 10_000


def probe(images: ImageTokens) -> np.ndarray:
    """Which test pictures a logistic regression on mean tokens names right, [n], as metrics/probe.py fits it."""
    labels, train, test = images.rows["label"].to_numpy(), labelled(images, "train", "val"), labelled(images, "test")

    def pooled(at: list[int]) -> np.ndarray:
        return torch.cat([images.tokens(at[i : i + 256]).mean(1) for i in range(0, len(at), 256)]).numpy()

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(pooled(train), labels[train])
    return np.asarray(model.predict(pooled(test)) == labels[test])


def right(adapter: str, data: str, recipe: str) -> dict[str, np.ndarray]:
    """By each way of naming, which test pictures of the project in the current folder are named right, [n]."""
    params = load_params()
    run = Run.of(params)
    images, named = ImageTokens.open(run, data), Named.read(run, adapter, data)
    test = labelled(images, "test")
    own = torch.tensor([named.names.index(label) for label in images.rows["label"].iloc[test]])
    ids = [images.ids[i] for i in test]
    found = {"linear probe": probe(images)}
    for rule in RULES:
        found[rule] = (named.log_probabilities(rule, ids).argmax(1) == own).numpy()
    folder = run.evaluated(adapter, recipe) / data
    if (folder / "predictions.csv").exists():
        said = Naming.read(folder).set_index("id").loc[ids]
        found["generated, the name in the answer"] = said["correct"].to_numpy()
        found["generated, the name alone"] = said["strict"].to_numpy()
        found |= {rule: (said[rule] == said["label"]).to_numpy() for rule in LLM_RULES if rule in said}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--adapter", default="mlp")
    parser.add_argument("--data", default="classes")
    parser.add_argument("--recipe", default="classes")
    arguments = parser.parse_args()
    here, runs = Path.cwd(), []
    for folder in arguments.folders:
        os.chdir(here / folder)
        runs.append(right(arguments.adapter, arguments.data, arguments.recipe))
    count = len(runs[0]["linear probe"])
    draws = np.random.default_rng(0).integers(count, size=(DRAWS, count))
    print(f"{count} test pictures, {len(runs)} runs\n")
    print("| way | accuracy, % | less the probe's | 95 % |\n|---|---|---|---|")
    for way in runs[0]:
        hits = np.stack([run[way] for run in runs]).astype(float)  # [runs, n]
        gap = (hits - np.stack([run["linear probe"] for run in runs])).mean(0)
        low, high = 100 * np.quantile(gap[draws].mean(1), [0.025, 0.975])
        each = 100 * hits.mean(1)
        spread = each.std(ddof=1) if len(each) > 1 else 0.0
        print(f"| {way} | {each.mean():.1f} ± {spread:.1f} | {100 * gap.mean():+.1f} | {low:+.1f} to {high:+.1f} |")


if __name__ == "__main__":
    main()
