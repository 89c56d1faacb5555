"""Pre-training: align an adapter with the LLM's embedding space by EMD, from cached tensors, without any LLM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.adapters.adapters import Adapter, build_adapter
from pipeline.config import Params
from pipeline.config.components import sources_of
from pipeline.config.schema import Pretrain
from pipeline.devices import fast_products, keep_freed_memory
from pipeline.errors import UserError
from pipeline.objectives.emd import EMDSettings
from pipeline.objectives.objective import Pairs, start_loss
from pipeline.origin import Origin, Words
from pipeline.runs import EXTRACTED_BY, Kind, Run
from pipeline.started import Started
from pipeline.store.shards import Manifest
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.loop import Trainer, batch_at, steps_per_epoch, total_steps, write_history

SAMPLE, PART = 512, 128  # images that a constant set is fitted on, and how many at a time
NEARNESS = 0.2  # of its start to words: the share of the way from their mean
SETTLED = 2e-4  # a fit ends when its EMD falls by less than this share
PLAIN = EMDSettings.model_validate({"cost": "euclidean", "word_weights": "uniform", "start": "random"})


def fit_constant_set(pairs: Pairs, count: int, seed: int) -> Tensor:
    """The best image-blind set of `count` tokens on (a sample of) the training captions, [count, D].

    A free-support barycentre (Cuturi & Doucet 2014): exact plans and the tokens that are best for them take turns,
    until the EMD falls by less than SETTLED. It starts near the mean word, a little towards `count` frequent words: a
    token that is a word would stay there (Kuhn 1973).
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.bincount(torch.tensor([r for i in pairs.train for c in pairs.rows[i] for r in c])).float()
    weight = weight * pairs.word_weights[: len(weight)]
    start = torch.multinomial(weight, count, replacement=count > int((weight > 0).sum()), generator=generator)
    order = torch.randperm(len(pairs.train), generator=generator)[:SAMPLE].tolist()
    parts = [[pairs.train[i] for i in order[at : at + PART]] for at in range(0, len(order), PART)]
    mean = weight.to(pairs.device) @ pairs.table[: len(weight)] / weight.sum()
    best, tokens = float("inf"), torch.lerp(mean, pairs.table[start.to(pairs.device)], NEARNESS)
    while True:
        values, sums, weights = zip(*(pairs.better_set(tokens, part) for part in parts), strict=True)
        if sum(values) > (1 - SETTLED) * best:
            return tokens
        best, mass = sum(values), torch.stack(weights).sum(0)
        tokens = torch.where(mass > 0, torch.stack(sums).sum(0) / mass, tokens)


def retrieval(pairs: Pairs, adapter: Adapter, positions: list[int], seed: int) -> dict[str, float]:
    """Share of images whose own caption is the nearest, or among the five nearest, by EMD; raw and debiased.

    One seeded caption per image. Debiased: each caption's mean distance over all images is subtracted.
    """
    rng = np.random.default_rng(seed)
    captions = [pairs.rows[position][rng.integers(len(pairs.rows[position]))] for position in positions]
    rows = []
    for start in range(0, len(positions), 16):
        tokens = adapter(pairs.tokens(positions[start : start + 16]))
        rows.append(pairs.distance(tokens, captions, None).view(len(tokens), -1))
    raw = torch.cat(rows).cpu()
    own = torch.arange(len(positions))[:, None]
    found: dict[str, float] = {}
    for kind, scores in (("raw", raw), ("debiased", raw - raw.mean(0))):
        hits = scores.argsort(dim=1, stable=True) == own
        found |= {f"r{k}_{kind}": hits[:, :k].any(1).double().mean().item() for k in (1, 5)}
    return found


@torch.no_grad()
def nearest_words(pairs: Pairs, adapter: Adapter, seed: int) -> dict[str, float]:
    """Share of held-out images' tokens whose nearest word is in a caption of the image, and of another image.

    Nearest by Euclidean distance in plain space, of all words of all captions.
    """
    partner = _partners(pairs.val, seed)
    hits: dict[str, list[bool]] = {"nearest_in_caption": [], "nearest_in_shuffled": []}
    for start in range(0, len(pairs.val), 8):
        positions = pairs.val[start : start + 8]
        nearest = torch.cdist(adapter(pairs.tokens(positions)), pairs.table).argmin(2).tolist()
        for position, rows in zip(positions, nearest, strict=True):
            for key, whose in zip(hits, (position, partner[position]), strict=True):
                words = {row for caption in pairs.rows[whose] for row in caption}
                hits[key] += [row in words for row in rows]
    return {key: sum(values) / len(values) for key, values in hits.items()}


def _partners(positions: list[int], seed: int) -> dict[int, int]:
    """Another image for each: a cyclic shift of a random order leaves none at its place."""
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed)).tolist()
    return {positions[i]: positions[j] for i, j in zip(order, [*order[1:], order[0]], strict=True)}


@dataclass
class HeldOut:
    """Per-image EMD on held-out images: matched, and with the images permuted, [V] each."""

    matched: Tensor
    shuffled: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, pairs: Pairs, adapter: Adapter, seed: int) -> HeldOut:
        partner = _partners(pairs.val, seed)
        matched, shuffled = [], []
        for start in range(0, len(pairs.val), 32):
            positions = pairs.val[start : start + 32]
            matched.append(pairs.per_image(adapter(pairs.tokens(positions)), positions))
            others = adapter(pairs.tokens([partner[i] for i in positions]))
            shuffled.append(pairs.per_image(others, positions))
        return cls(torch.cat(matched).cpu(), torch.cat(shuffled).cpu())

    def gain(self, seed: int) -> tuple[float, float, float]:
        """Image gain, and its 95 % interval by a paired bootstrap over images (Efron 1979)."""
        difference = (self.shuffled - self.matched).double().numpy()
        draws = np.random.default_rng(seed).integers(len(difference), size=(10_000, len(difference)))
        low, high = np.quantile(difference[draws].mean(1), [0.025, 0.975])
        return float(difference.mean()), float(low), float(high)


def pretrain(params: Params, name: str) -> None:
    """Pre-train an adapter and write its weights of the first and last epoch, history and metrics."""
    keep_freed_memory()
    fast_products()
    settings = params.pretrain_for(name)
    pairs = Pairs(params, settings)
    run = Run.of(params)
    out = run.pretrained(name)
    for kind in EXTRACTED_BY:
        _check_of_one_kind(run, kind, settings.data)
    if pairs.device.type == "cuda":
        torch.set_num_threads(1)  # for the small sums left to the CPU, many threads would wait for one another
    torch.manual_seed(params.seed)
    section = params.adapter(name)
    adapter = build_adapter(params.kind_of(name), pairs.d_in, pairs.table.shape[1], **section.architecture).to(
        pairs.device
    )
    count = adapter(pairs.tokens(pairs.val[:1])).shape[1]
    blind = _blind_baselines(params, pairs, count)
    if pairs.objective.start == "constant_set":
        adapter.eval().start_at(blind.constant_set, pairs.tokens(pairs.train[: settings.batch]))
    trainer = _trainer(params, name, pairs, adapter, blind.metrics)
    history = trainer.run()
    last = {key: value for key, value in history[-1].items() if key not in ("step", "epoch", "seconds", "train_loss")}
    metrics = last | held_out_figures(pairs, adapter, params.seed)
    metrics["parameters"] = sum(p.numel() for p in adapter.parameters())
    adapter.save(out, "last")
    adapter.load_state_dict(trainer.extras["first"])
    adapter.save(out, "first")
    write_history(out / "history.csv", history)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    Origin.of(run, settings.data[0], Words.of(pairs.text.token_ids.tolist(), pairs.text.embeddings)).write(out)
    trainer.checkpoint.remove()


def _check_of_one_kind(run: Run, kind: Kind, sets: list[str]) -> None:
    """UserError where the features of some data sets are of different models."""
    prints = {Manifest.read(run.features(kind, data)).fingerprint for data in sets}
    if len(prints) > 1:
        stage, model = EXTRACTED_BY[kind], "encoders" if kind == "images" else "LLMs"
        raise UserError(
            f"{run.base / kind}: the features of {' and '.join(sets)} are of different {model}; run `dvc repro {stage}`"
        )


def held_out_figures(pairs: Pairs, adapter: Adapter, seed: int) -> dict[str, float]:
    """What is measured once, at the end: image gains with their intervals, and the nearest words.

    Gains are in the objective's own measure, and as plain_* in the plain one (Euclidean, all words alike), which is the
    same for every objective; there also relative to the matched EMD.
    """
    gain, low, high = HeldOut.of(pairs, adapter, seed).gain(seed)
    figures = {"image_gain": gain, "image_gain_low": low, "image_gain_high": high, "held_out": len(pairs.val)}
    plain = HeldOut.of(pairs.measured_by(PLAIN), adapter, seed)
    gain, low, high = plain.gain(seed)
    matched = plain.matched.mean().item()
    figures |= {"plain_val": matched, "plain_shuffled": plain.shuffled.mean().item()}
    figures |= {"plain_gain": gain, "plain_gain_low": low, "plain_gain_high": high}
    return figures | {"plain_gain_relative": gain / matched} | nearest_words(pairs, adapter, seed)


@dataclass
class Blind:
    """The image-blind baselines: the sets, and their EMD on held-out images."""

    constant_set: Tensor
    metrics: dict[str, float]


def _blind_baselines(params: Params, pairs: Pairs, count: int) -> Blind:
    token, constant_set = _constant_set(params, pairs, 1), _constant_set(params, pairs, count)

    @torch.no_grad()
    def value(tokens: Tensor) -> float:
        parts = [pairs.val[i : i + 32] for i in range(0, len(pairs.val), 32)]
        return torch.cat([pairs.per_image(tokens[None], p) for p in parts]).mean().item()

    return Blind(constant_set, {"const_token": value(token), "const_set": value(constant_set)})


def _constant_set(params: Params, pairs: Pairs, count: int) -> Tensor:
    """The best set of `count` tokens, fitted once: adapters that give equally many share it."""
    settings = pairs.settings
    decides = [
        params.seed,
        settings.data,
        settings.objective.model_dump(exclude={"start", "solver", "contrast", "temperature"}),
    ]
    kept = _checkpoint(params, f"constant-set-{count}", settings, decides, None)
    state = kept.load()
    if state is None:
        state = {"tokens": fit_constant_set(pairs, count, params.seed)}
        kept.save(state)
    return state["tokens"].to(pairs.device)


def _checkpoint(
    params: Params, name: str, settings: Pretrain, decides: Sequence[object], kind: str | None
) -> Checkpoint:
    """A checkpoint that holds as long as these values, the cached data and the code are the same.

    `kind` is the adapter's, where there is one.
    """
    run = Run.of(params)
    files = [run.features(features, data) for features in EXTRACTED_BY for data in settings.data]
    files += [run.manifest(data) for data in settings.data]
    parts = [("objective", settings.objective.name), *([("adapter", kind)] if kind else [])]
    return Checkpoint.of(run, name, [*decides, parts], [*files, *sources_of(parts)], __name__)


def _trainer(params: Params, name: str, pairs: Pairs, adapter: Adapter, blind: dict[str, float]) -> Trainer:
    settings = pairs.settings
    epoch, total = steps_per_epoch(settings, len(pairs.train)), total_steps(settings, len(pairs.train))
    rng = np.random.default_rng(params.seed)
    candidates = rng.permutation(pairs.val)[: settings.candidates].tolist()
    extras: dict[str, dict[str, Tensor]] = {}

    def loss(number: int) -> Started:
        positions = [pairs.train[i] for i in batch_at(number, settings.batch, len(pairs.train), params.seed)]
        return start_loss(pairs, adapter(pairs.tokens(positions)), positions)

    def validate(step: int) -> dict[str, float]:
        if "first" not in extras and step >= min(epoch, total):
            extras["first"] = {key: value.clone() for key, value in adapter.state_dict().items()}
        held_out = HeldOut.of(pairs, adapter, params.seed)
        values = {"val": held_out.matched.mean().item(), "shuffled": held_out.shuffled.mean().item()}
        return {"epoch": step / epoch, **values, **blind, **retrieval(pairs, adapter, candidates, params.seed)}

    section = params.adapter(name)
    decides = [params.seed, settings.model_dump(), section.architecture]
    return Trainer(
        name=f"pretrain {name}", model=adapter, groups=[{"params": list(adapter.parameters())}], settings=settings,
        examples=len(pairs.train), seed=params.seed, loss=loss, validate=validate,
        validate_at=set(range(epoch, total + 1, epoch)),
        checkpoint=_checkpoint(params, f"pretrain@{name}", settings, decides, params.kind_of(name)), extras=extras,
        in_flight=pairs.in_flight,
    )  # fmt: skip
