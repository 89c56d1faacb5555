"""Fitting a namer for each data set of classes, and naming all its pictures by it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.adapters.module import load_adapter
from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.extraction.near import series_of
from pipeline.naming.classes import class_names, labelled, numbers
from pipeline.naming.discriminant import Discriminant, as_good_as, choose_shrinkage, cross_fitted, deal, pooled
from pipeline.naming.namer import Namer, Scales, by_rule
from pipeline.naming.nearest import Nearest, adapted_by, many
from pipeline.naming.rules import RULES
from pipeline.naming.table import Named
from pipeline.naming.weigh import fit_weights, sure_weights
from pipeline.objectives.base import Means
from pipeline.objectives.emd import EMD, EMDSettings
from pipeline.objectives.pairs import Pairs
from pipeline.origin import Origin, check_tokens, weights_of
from pipeline.runs import Run
from pipeline.store.reader import ImageTokens

KEPT = 10  # names of each picture, the likeliest first
FOLDS = 4  # parts of the training pictures, each named by what was fitted on the others
REFERENCE = 512  # training pictures that distances are debiased by
PLAIN = EMDSettings.model_validate({"cost": "euclidean", "word_weights": "uniform", "start": "random"})


def fit_namer(params: Params, adapter: str, data: str) -> Named:
    """Fit the namer of a pre-trained adapter for a data set, save it, and name all its labelled pictures.

    Both parts learn from training pictures; how they are weighed, and the discriminant's shrinkage, from validation
    pictures, after which the discriminant is fitted on both; it learns from all views of a picture. Raises UserError
    when features or adapter are missing or do not fit together, or validation or training pictures with a name are
    missing.
    """
    run = Run.of(params)
    folder = run.named(adapter) / data
    check_tokens(run.pretrained(adapter), run, data)
    images = ImageTokens.open(run, data)
    names = class_names(images)
    train, val, test = (labelled(images, split) for split in ("train", "val", "test"))
    if not train or not val:
        raise UserError(data, f"{len(train)} train and {len(val)} val pictures with a name", "both are needed")
    classes, right = numbers(images, train, names), numbers(images, val, names)
    known, more = (pooled(images, some, images.views) for some in (train, val))
    held_out, of_known, of_more = more[: len(val)], classes * images.views, right * images.views
    shrinkage = choose_shrinkage(known, of_known, held_out, right, len(names))
    early = Discriminant.fit(known, of_known, len(names), shrinkage)
    adapted = adapted_by(load_adapter(run.pretrained(adapter), "last"), images.tokens)
    nearest = _nearest(params, adapter, data, images, names, adapted)
    distances = many(nearest.scores, adapted, [*val, *test])
    first = early.of_features(torch.from_numpy(held_out))
    scales = _scales(distances[: len(val)], first, right)
    whole = Discriminant.fit(np.concatenate([known, more]), [*of_known, *of_more], len(names), shrinkage)
    told = by_rule(distances[: len(val)], first, scales)["namer"]
    loss = -told.gather(1, torch.tensor(right)[:, None]).mean().item()
    Namer(names, nearest, whole, scales, loss).save(folder)
    origin, weights = Origin.read(run.pretrained(adapter)), run.pretrained(adapter) / "last.safetensors"
    replace(origin, start=weights_of(weights)).write(folder)
    last = whole.of_features(torch.from_numpy(pooled(images, test))) if test else first[:0]
    rules = by_rule(distances, torch.cat([first, last]), scales)
    series = series_of(images)
    apart, mixed = (
        cross_fitted(known, classes, deal(classes, groups, FOLDS), len(names), shrinkage)
        for groups in ([series[i] for i in train], [images.ids[i] for i in train])
    )
    goal = (told.argmax(1) == torch.tensor(right)).double().mean().item()
    crossed = (scales.discriminant * as_good_as(goal, apart, mixed, classes, params.seed)).log_softmax(1)
    named = Named(names, _rows(images, names, train, crossed, [*val, *test], rules))
    named.write(folder)
    return named


def _scales(emd: Tensor, discriminant: Tensor, right: list[int]) -> Scales:
    """From the scores of validation pictures [V, C] and their classes."""
    both = sure_weights({"emd": emd, "discriminant": discriminant}, right)
    return Scales(
        fit_weights({"emd": emd}, right)["emd"],
        fit_weights({"discriminant": discriminant}, right)["discriminant"],
        (both["emd"], both["discriminant"]),
    )


def fit_nearest(params: Params, adapter: str, data: str) -> tuple[list[str], Nearest, float]:
    """What there is of a namer right after pre-training: names, EMD to them, and its scale for probabilities.

    The scale is fitted on validation pictures. Raises UserError as `fit_namer`.
    """
    run = Run.of(params)
    check_tokens(run.pretrained(adapter), run, data)
    images = ImageTokens.open(run, data)
    names, val = class_names(images), labelled(images, "val")
    if not val or not labelled(images, "train"):
        raise UserError(data, "no train or no val pictures with a name", "both are needed")
    adapted = adapted_by(load_adapter(run.pretrained(adapter), "last"), images.tokens)
    nearest = _nearest(params, adapter, data, images, names, adapted)
    scores = many(nearest.scores, adapted, val)
    return names, nearest, fit_weights({"emd": scores}, numbers(images, val, names))["emd"]


def _nearest(
    params: Params, adapter: str, data: str, images: ImageTokens, names: list[str],
    adapted: Callable[[list[int]], Tensor],
) -> Nearest:  # fmt: skip
    """The names as the adapter's objective measures them: words, their weights and their space are pre-training's.

    Debiased by training pictures.
    """
    settings = params.pretrain_for(adapter)
    if data not in settings.data:
        settings = settings.model_copy(update={"data": [*settings.data, data]})
    pairs = Pairs.open(params, settings)
    own = settings.objective if isinstance(settings.objective, EMDSettings) else PLAIN
    start = pairs.starts[settings.data.index(data)]
    label_at = {label: i for i, label in enumerate(images.rows["label"])}
    objective = EMD(own, pairs, Means(params.seed, params.runtime.emd_threads))
    train = labelled(images, "train")
    found = Nearest.of(objective, [pairs.captions[start + label_at[name]][0] for name in names])
    return found.debiased(adapted, train[:: -(-len(train) // REFERENCE)])


def _rows(
    images: ImageTokens, names: list[str], train: list[int], crossed: Tensor, rest: list[int], rules: dict[str, Tensor]
) -> pd.DataFrame:
    """The table of `Named`."""
    rows = images.rows.iloc[[*train, *rest]][["id", "split", "label"]].set_index("id")
    scores = torch.cat([crossed, rules["namer"]])
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :KEPT]
    rows["candidates"] = [[names[i] for i in row] for row in best.tolist()]
    rows["probabilities"] = scores.gather(1, best).exp().tolist()
    for rule in RULES:
        rows[rule] = [*[None] * len(train), *rules[rule].numpy()]
    return rows


def name_all(params: Params, adapter: str) -> dict[str, Named]:
    """Fit and apply the namers of an adapter, one for each data set of classes; what they get is said on stderr."""
    found = {}
    for data in params.run.data:
        if params.data[data].task == "classify":
            found[data] = fit_namer(params, adapter, data)
            print(f"{adapter} on {data}: {_of_val(found[data])}", file=sys.stderr)
    return found


def _of_val(named: Named) -> str:
    rows = named.rows[named.rows["split"] == "val"]
    right = {
        rule: np.mean([named.names[int(np.argmax(p))] == own for p, own in zip(rows[rule], rows["label"], strict=True)])
        for rule in RULES
    }
    return ", ".join(f"{rule} {100 * share:.1f} %" for rule, share in right.items()) + " of the validation pictures"
