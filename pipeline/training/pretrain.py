"""Pre-training: align an adapter with the LLM's embedding space, from cached tensors; by EMD without any LLM."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.adapters.module import Adapter, build_adapter
from pipeline.config import Params, components
from pipeline.config.schema import Pretrain
from pipeline.devices import fast_products, keep_freed_memory
from pipeline.objectives.base import Keep, Means, Objective
from pipeline.objectives.emd import EMD, EMDSettings
from pipeline.objectives.pairs import Pairs
from pipeline.origin import Origin, Words, check_of_one_kind
from pipeline.runs import EXTRACTED_BY, Run
from pipeline.started import Started
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.loop import Trainer, batch_at, points, steps_per_epoch, total_steps, write_history

PLAIN = EMDSettings.model_validate({"cost": "euclidean", "word_weights": "uniform", "start": "random"})


def pretrain(params: Params, name: str) -> float:
    """Pre-train an adapter and write its weights of the first and last epoch, history and metrics; returns the seconds.

    These are of training alone.
    """
    keep_freed_memory()
    fast_products()
    settings, run = params.pretrain_for(name), Run.of(params)
    params = params.seeded(settings)
    pairs = Pairs.open(params, settings)
    for kind in EXTRACTED_BY:
        check_of_one_kind(run, kind, settings.data)
    if pairs.device.type == "cuda":
        torch.set_num_threads(1)  # for the small sums left to the CPU, many threads would wait for one another
    objective = _objective(params, settings, pairs)
    sample = pairs.tokens(pairs.train[: settings.batch])
    torch.manual_seed(params.seed)
    architecture = params.adapter(name).architecture
    adapter = build_adapter(params.kind_of(name), sample.shape[2], pairs.table.shape[1], **architecture)
    adapter.to(pairs.device).eval()
    objective.initialise(adapter, sample)
    blind = objective.baselines(adapter(sample[:1]).shape[1])
    trainer = _trainer(params, name, settings, objective, adapter, blind)
    history = trainer.run()
    last = {key: value for key, value in history[-1].items() if key not in ("step", "epoch", "seconds", "train_loss")}
    held_out = HeldOut(**trainer.extras["held_out"])  # of the last validation, so of this adapter
    metrics = last | held_out_figures(objective, adapter, held_out, params.seed)
    # Among as many for every adapter, also where an objective is too dear for so many of its own distances.
    candidates = _candidates(pairs, params.pretrain, params.seed)
    plain = retrieval(_plain(objective), adapter, candidates, params.seed)
    metrics |= {f"plain_{key}": share for key, share in plain.items()}
    metrics["parameters"] = sum(p.numel() for p in adapter.parameters())
    out = run.pretrained(name)
    adapter.save(out, "last")
    if "first" in trainer.extras:  # else it was stopped before the end of an epoch
        adapter.load_state_dict(trainer.extras["first"])
    adapter.save(out, "first")
    write_history(out / "history.csv", history)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    Origin.of(run, settings.data[0], _words(pairs)).write(out)
    trainer.checkpoint.remove()
    return history[-1]["seconds"]


def _objective(params: Params, settings: Pretrain, pairs: Pairs) -> Objective:
    """The objective that the parameters name, with the LLM where it needs one."""
    found: type[Objective] = components.find("objective", settings.objective.name)
    llm = None
    if found.needs_llm:
        from pipeline.llms.load import load_llm

        llm = load_llm(params.llm, params.runtime.device)
    keep = _keep(params, settings)
    return found(settings.objective, pairs, Means(params.seed, params.runtime.emd_threads, keep, llm))


def _keep(params: Params, settings: Pretrain) -> Keep:
    """What adapters share is computed by the first of them, and kept beside the checkpoints."""

    def keep(name: str, decides: Sequence[object], compute: Callable[[], Tensor]) -> Tensor:
        kept = _checkpoint(params, name, settings, [params.seed, settings.data, *decides], None)
        kept.path = kept.path.with_stem(f"{name}-{kept.key[:12]}")  # adapters that differ here keep one each
        state = kept.load()
        if state is None:
            state = {"tokens": compute()}
            kept.save(state)
        found: Tensor = state["tokens"]
        return found

    return keep


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
    found: type[Objective] = components.find(*parts[0])
    llm = [params.llm] if found.needs_llm else []
    return Checkpoint.of(run, name, [*decides, parts, *llm], [*files, *components.sources_of(parts)], __name__)


def _trainer(
    params: Params, name: str, settings: Pretrain, objective: Objective, adapter: Adapter, blind: dict[str, float]
) -> Trainer:
    """The run of an adapter; `blind` are figures that stand in every row of its history."""
    pairs = objective.pairs
    epoch, total = steps_per_epoch(settings, len(pairs.train)), total_steps(settings, len(pairs.train))
    candidates = _candidates(pairs, settings, params.seed)
    extras: dict[str, dict[str, Tensor]] = {}

    def loss(number: int) -> Started:
        positions = [pairs.train[i] for i in batch_at(number, settings.batch, len(pairs.train), params.seed)]
        return objective.start(adapter.trained(pairs.drawn(positions)), positions)

    def validate(step: int) -> dict[str, float]:
        if "first" not in extras and step >= min(epoch, total):
            extras["first"] = {key: value.clone() for key, value in adapter.state_dict().items()}
        held_out = HeldOut.of(objective, adapter, params.seed)
        extras["held_out"] = vars(held_out)
        values = {"val": held_out.matched.mean().item(), "shuffled": held_out.shuffled.mean().item()}
        return {"epoch": step / epoch, **values, **blind, **retrieval(objective, adapter, candidates, params.seed)}

    section, learned = params.adapter(name), nn.ModuleList([adapter, *filter(None, [objective.module])])
    decides = [params.seed, settings.model_dump(), section.architecture]
    return Trainer(
        name=f"pretrain {name}", model=learned, groups=[{"params": list(learned.parameters())}], settings=settings,
        examples=len(pairs.train), seed=params.seed, loss=loss, validate=validate,
        validate_at=points(total, settings.validations) if settings.validations else {*range(epoch, total + 1, epoch)},
        checkpoint=_checkpoint(params, f"pretrain@{name}", settings, decides, params.kind_of(name)), extras=extras,
        in_flight=objective.in_flight, max_seconds=settings.max_seconds,
    )  # fmt: skip


@dataclass
class HeldOut:
    """Distances of held-out images: matched, and with the images permuted, [V] each."""

    matched: Tensor
    shuffled: Tensor

    @classmethod
    def of(cls, objective: Objective, adapter: Adapter, seed: int) -> HeldOut:
        pairs, partner = objective.pairs, _partners(objective.pairs.val, seed)
        matched = objective.held_out(lambda part: adapter(pairs.tokens(part)))
        shuffled = objective.held_out(lambda part: adapter(pairs.tokens([partner[i] for i in part])))
        return cls(matched.cpu(), shuffled.cpu())

    def gain(self, seed: int) -> tuple[float, float, float]:
        """Image gain, and its 95 % interval by a paired bootstrap over images (Efron 1979)."""
        difference = (self.shuffled - self.matched).double().numpy()
        # Not scipy.stats.bootstrap: the same draws, but its quantiles differ in the last digit.
        draws = np.random.default_rng(seed).integers(len(difference), size=(10_000, len(difference)))
        low, high = np.quantile(difference[draws].mean(1), [0.025, 0.975])
        return float(difference.mean()), float(low), float(high)


def _candidates(pairs: Pairs, settings: Pretrain, seed: int) -> list[int]:
    """The held-out pictures that retrieval is among."""
    found: list[int] = np.random.default_rng(seed).permutation(pairs.val)[: settings.candidates].tolist()
    return found


def _plain(objective: Objective) -> EMD:
    """The measure that is the same for every objective: Euclidean EMD, all words alike."""
    return EMD(PLAIN, objective.pairs, objective.means)


def _partners(positions: list[int], seed: int) -> dict[int, int]:
    """Another image for each: a cyclic shift of a random order leaves none at its place."""
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed)).tolist()
    return {positions[i]: positions[j] for i, j in zip(order, [*order[1:], order[0]], strict=True)}


def retrieval(objective: Objective, adapter: Adapter, positions: list[int], seed: int) -> dict[str, float]:
    """Share of images whose own caption is the nearest, or among the five nearest; raw and debiased.

    One seeded caption per image. Debiased: each caption's mean distance over all images is subtracted.
    """
    pairs, rng = objective.pairs, np.random.default_rng(seed)
    captions = [pairs.captions[position][rng.integers(len(pairs.captions[position]))] for position in positions]
    rows = []
    for start in range(0, len(positions), 16):
        tokens = adapter(pairs.tokens(positions[start : start + 16]))
        rows.append(objective.all_distances(tokens, captions))
    raw = torch.cat(rows).cpu()
    own = torch.arange(len(positions))[:, None]
    found: dict[str, float] = {}
    for kind, scores in (("raw", raw), ("debiased", raw - raw.mean(0))):
        hits = scores.argsort(dim=1, stable=True) == own
        found |= {f"r{k}_{kind}": hits[:, :k].any(1).double().mean().item() for k in (1, 5)}
    return found


def held_out_figures(objective: Objective, adapter: Adapter, held_out: HeldOut, seed: int) -> dict[str, float]:
    """What is measured once, at the end: image gains with their intervals, and the nearest words.

    Gains are by `held_out` in the objective's own measure, and as plain_* in the plain one (Euclidean, all words
    alike), which is the same for every objective; there also relative to the matched EMD.
    """
    gain, low, high = held_out.gain(seed)
    figures = {"image_gain": gain, "image_gain_low": low, "image_gain_high": high, "held_out": len(objective.pairs.val)}
    plain = HeldOut.of(_plain(objective), adapter, seed)
    gain, low, high = plain.gain(seed)
    matched = plain.matched.mean().item()
    figures |= {"plain_val": matched, "plain_shuffled": plain.shuffled.mean().item()}
    figures |= {"plain_gain": gain, "plain_gain_low": low, "plain_gain_high": high}
    return figures | {"plain_gain_relative": gain / matched} | nearest_words(objective.pairs, adapter, seed)


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
                words = {row for caption in pairs.captions[whose] for row in caption}
                hits[key] += [row in words for row in rows]
    return {key: sum(values) / len(values) for key, values in hits.items()}


def _words(pairs: Pairs) -> Words:
    """A sample of the words of the first data set."""
    rows = sorted({row for captions in pairs.captions[: pairs.first] for caption in captions for row in caption})
    row_of = {pairs.token_ids[row]: row for row in rows}
    return Words.of(list(row_of), lambda ids: pairs.table[[row_of[token] for token in ids]].cpu())
