"""Pre-training: align an adapter with the LLM's embedding space by EMD, from cached tensors, without any LLM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.adapters import Adapter, build_adapter
from pipeline.backbones.devices import keep_freed_memory, pick_device
from pipeline.emd import emd
from pipeline.errors import UserError
from pipeline.params import AdapterName, Dataset, Objective, Params, Pretrain
from pipeline.store.reader import CaptionTokens, ImageTokens
from pipeline.store.webdataset import open_tars
from pipeline.training import Checkpoint, Trainer, steps_per_epoch, total_steps, write_history

WHITENING_RIDGE = 0.1  # of the mean variance
PLAIN = Objective.model_validate({"cost": "euclidean", "word_weights": "uniform", "start": "random"})
CONTRASTED = 32  # images of a batch at most: the contrast costs their number squared


class Pairs:
    """Cached image tokens and captions of the data sets of pretrain.data, and the objective between them.

    Rows of all sets are numbered through; held-out figures are of `captions` alone.
    """

    def __init__(self, params: Params, settings: Pretrain):
        self.device = pick_device(params.runtime.device)
        self.settings, self.threads = settings, params.runtime.emd_threads
        features = [_features(params, data) for data in settings.data]
        self._images, texts = [images for images, _ in features], [text for _, text in features]
        self.table, row_of = _one_table(texts)
        self.rows: list[list[list[int]]] = []
        self._places: list[tuple[int, int]] = []
        self.train: list[int] = []
        for number, (images, text) in enumerate(zip(self._images, texts, strict=True)):
            self.train += [len(self.rows) + i for i in images.split("train")]
            if settings.data[number] == "captions":
                self.val = [len(self.rows) + i for i in images.split("val")][: settings.validation_images]
            self._places += [(number, i) for i in range(len(images.ids))]
            self.rows += [[[row_of[t] for t in c] for c in text.captions(row_id) if c] for row_id in images.ids]
        if not self.train or not self.val:
            raise UserError(f"captions: {len(self.train)} train and {len(self.val)} val pictures; both are needed")
        self._measure()

    def _measure(self) -> None:
        """What the objective's distance needs: weights of words, the map into its space, the centre of words there."""
        self.word_weights = self._weights_of_words()
        counts = self._document_frequencies(self.train)
        self.words, self.into_space = self.table, None
        if self.settings.objective.space == "whitened":
            into_space = whitening(self.table, counts)
            self.words, self.into_space = self.table @ into_space, into_space.to(self.device)
        self.center = (counts @ self.words / counts.sum()).to(self.device)

    def measured_by(self, objective: Objective) -> Pairs:
        """The same data under another objective."""
        other = copy(self)
        other.settings = self.settings.model_copy(update={"objective": objective})
        other._measure()
        return other

    @property
    def d_in(self) -> int:
        """Width of the image tokens."""
        return self._images[0].shape[1]

    def _weights_of_words(self) -> Tensor:
        """The weight of each word in a caption's marginal, [T]: 1, or the (squared) inverse document frequency.

        Squared, as in a product of two tf-idf vectors (Salton & Buckley 1988), function words weigh next to nothing,
        so no token is spent on them. Frequencies are those of `captions`: class names have no function words.
        """
        kind = self.settings.objective.word_weights
        if kind == "uniform":
            return torch.ones(len(self.table))
        captioned = [i for i in self.train if self.settings.data[self._places[i][0]] == "captions"]
        idf = torch.log((len(captioned) + 1) / (self._document_frequencies(captioned) + 1))
        return idf.square() if kind == "idf_squared" else idf

    def _document_frequencies(self, positions: list[int]) -> Tensor:
        """How many of some images have each word in a caption, [T]."""
        counts = torch.zeros(len(self.table))
        for position in positions:
            counts[list({row for caption in self.rows[position] for row in caption})] += 1
        return counts

    def captions_of(self, positions: list[int]) -> tuple[list[list[int]], list[int]]:
        """All captions of some images as rows of the embedding table, and which image each belongs to."""
        pairs = [(caption, i) for i, position in enumerate(positions) for caption in self.rows[position]]
        return [caption for caption, _ in pairs], [i for _, i in pairs]

    def distance(self, tokens: Tensor, captions: list[list[int]], image_index: list[int]) -> Tensor:
        """EMD in the objective's own cost and marginal, [P]; tokens [B, N, D] on the device."""
        flat = [row for caption in captions for row in caption]
        offsets = np.cumsum([0, *map(len, captions)]).tolist()
        if self.into_space is not None:
            tokens = tokens @ self.into_space
        return emd(
            tokens, self.words[flat].to(tokens.device), offsets, image_index,
            cost=self.settings.objective.cost, word_weights=self._weights(flat, captions),
            center=self.center, unmatched=self.settings.objective.unmatched,
            solver=self.settings.objective.solver, threads=self.threads,
        )  # fmt: skip

    def _weights(self, flat: list[int], captions: list[list[int]]) -> Tensor:
        """Weights of the words of some captions, [T]; a caption of nothing but ubiquitous words keeps equal ones."""
        weights, lengths = self.word_weights[flat], torch.tensor([len(caption) for caption in captions])
        caption_of = torch.repeat_interleave(torch.arange(len(captions)), lengths)
        mass = weights.new_zeros(len(captions)).index_add(0, caption_of, weights)
        return torch.where(mass[caption_of] > 0, weights, 1.0)

    def tokens(self, positions: list[int]) -> Tensor:
        """Image tokens [B, N, D] on the device."""
        tokens = torch.empty(len(positions), *self._images[0].shape)
        for number, images in enumerate(self._images):
            here = [i for i, position in enumerate(positions) if self._places[position][0] == number]
            if here:
                tokens[here] = images.tokens([self._places[positions[i]][1] for i in here])
        return tokens.to(self.device)

    def per_image(self, tokens: Tensor, positions: list[int]) -> Tensor:
        """EMD averaged over the captions of each image, [B].

        tokens [B, N, D] may be of other images, or [1, N, D] the same for all.
        """
        captions, index = self.captions_of(positions)
        distances = self.distance(tokens, captions, index if len(tokens) > 1 else [0] * len(index))
        sums = distances.new_zeros(len(positions)).index_add(0, torch.tensor(index, device=distances.device), distances)
        return sums / torch.bincount(torch.tensor(index)).to(sums)


def _features(params: Params, data: Dataset) -> tuple[ImageTokens, CaptionTokens]:
    if params.cache.reader == "webdataset":
        return open_tars(params, data)
    base = Path("data") / params.profile
    return ImageTokens.open(base, data), CaptionTokens.open(base, data)


def _one_table(texts: list[CaptionTokens]) -> tuple[Tensor, dict[int, int]]:
    """The embedding tables of several data sets as one, and the row of each token id."""
    row_of: dict[int, int] = {}
    rows = []
    for text in texts:
        new = [token for token in text.token_ids.tolist() if token not in row_of]
        row_of |= {token: len(row_of) + i for i, token in enumerate(new)}
        rows.append(text.embeddings(new))
    return torch.cat(rows), row_of


def whitening(table: Tensor, counts: Tensor) -> Tensor:
    """The symmetric map [D, D] after which words spread alike in all directions: ZCA (Bell & Sejnowski 1997).

    table [T, D] are words, counts [T] how often each occurs. A tenth of the mean variance is added in every direction,
    since words may span fewer than D; the map keeps the words' total variance.
    """
    weights = counts / counts.sum()
    spread = (table - weights @ table).double() * weights.double().sqrt()[:, None]
    variances, axes = torch.linalg.eigh(spread.T @ spread)
    scales = (variances + WHITENING_RIDGE * variances.mean()).rsqrt()
    kept = variances.sum() / (variances * scales.square()).sum()
    return ((axes * (scales * kept.sqrt())) @ axes.T).to(table)


def fit_constant_set(pairs: Pairs, count: int, seed: int) -> Tensor:
    """The best image-blind set of `count` tokens on the training captions, [count, D], fitted to convergence.

    Adam on random batches from `count` frequent words; the rate is cut to a third whenever the EMD on a fixed
    part of the training captions has not fallen by 0.1 % for three looks, and fitting ends at 1 % of the first rate.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.bincount(torch.tensor([r for i in pairs.train for c in pairs.rows[i] for r in c])).float()
    weight = weight * pairs.word_weights[: len(weight)]
    start = torch.multinomial(weight, count, replacement=count > int((weight > 0).sum()), generator=generator)
    scale = pairs.table.std().item()
    tokens = nn.Parameter(pairs.table[start].to(pairs.device))
    first_rate = 0.1 * scale
    optimizer = torch.optim.Adam([tokens], lr=first_rate)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=1 / 3, patience=2, threshold=1e-3)
    fixed = [pairs.train[i] for i in torch.randperm(len(pairs.train), generator=generator)[:256].tolist()]
    best, best_tokens = float("inf"), tokens.detach().clone()
    while optimizer.param_groups[0]["lr"] > 0.01 * first_rate:
        for _ in range(20):
            batch = [pairs.train[i] for i in torch.randint(len(pairs.train), (32,), generator=generator).tolist()]
            optimizer.zero_grad()
            pairs.per_image(tokens[None], batch).mean().backward()
            optimizer.step()
        with torch.no_grad():
            value = pairs.per_image(tokens[None], fixed).mean().item()
        if value < best:
            best, best_tokens = value, tokens.detach().clone()
        plateau.step(value)
    return best_tokens


def contrast(pairs: Pairs, tokens: Tensor, positions: list[int]) -> Tensor:
    """How badly EMD tells the captions of a batch apart: InfoNCE (van den Oord et al. 2018), a scalar.

    tokens [B, N, D] of the images at `positions`, one random caption each; both ways, from image to caption and from
    caption to image, as in CLIP (Radford et al. 2021). A caption that another image has too (a class name) is no wrong
    answer there.
    """
    positions = positions[:CONTRASTED]  # a batch is in random order
    count = len(positions)
    captions = [pairs.rows[p][int(torch.randint(len(pairs.rows[p]), ()))] for p in positions]
    index = [i for i in range(count) for _ in captions]
    distances = pairs.distance(tokens[:count], captions * count, index).view(count, count)
    shared = [[i != j and captions[j] in pairs.rows[p] for j in range(count)] for i, p in enumerate(positions)]
    logits = -distances / pairs.settings.objective.temperature
    logits = logits.masked_fill(torch.tensor(shared, device=logits.device), -torch.inf)
    own = torch.arange(count, device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def retrieval(pairs: Pairs, adapter: Adapter, positions: list[int], seed: int) -> dict[str, float]:
    """Share of images whose own caption is the nearest, or among the five nearest, by EMD; raw and debiased.

    One seeded caption per image. Debiased: each caption's mean distance over all images is subtracted.
    """
    rng = np.random.default_rng(seed)
    captions = [pairs.rows[position][rng.integers(len(pairs.rows[position]))] for position in positions]
    rows = []
    for start in range(0, len(positions), 4):
        tokens = adapter(pairs.tokens(positions[start : start + 4]))
        index = [i for i in range(len(tokens)) for _ in captions]
        rows.append(pairs.distance(tokens, captions * len(tokens), index).view(len(tokens), -1))
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
    table = pairs.table.to(pairs.device)
    for start in range(0, len(pairs.val), 8):
        positions = pairs.val[start : start + 8]
        nearest = torch.cdist(adapter(pairs.tokens(positions)), table).argmin(2).tolist()
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


def pretrain(params: Params, name: AdapterName, out: Path) -> None:
    """Pre-train an adapter and write its weights of the first and last epoch, history and metrics to `out`."""
    keep_freed_memory()
    settings = params.pretrain_for(name)
    pairs = Pairs(params, settings)
    torch.manual_seed(params.seed)
    adapter = build_adapter(name, pairs.d_in, pairs.table.shape[1], **params.adapters[name].architecture).to(
        pairs.device
    )
    count = adapter(pairs.tokens(pairs.val[:1])).shape[1]
    blind = _blind_baselines(params, pairs, count)
    if settings.objective.start == "constant_set":
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
    trainer.checkpoint.remove()


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
    kept = _checkpoint(params, f"constant-set-{count}", settings, decides)
    state = kept.load()
    if state is None:
        state = {"tokens": fit_constant_set(pairs, count, params.seed)}
        kept.save(state)
    return state["tokens"].to(pairs.device)


def _checkpoint(params: Params, name: str, settings: Pretrain, decides: Sequence[object]) -> Checkpoint:
    """A checkpoint that holds as long as these values, the cached data and the code are the same."""
    base = Path("data") / params.profile
    files = [base / kind / data / "manifest.json" for kind in ("images", "text") for data in settings.data]
    files += [base / "prepare" / f"{data}.parquet" for data in settings.data]
    files += [Path(__file__), *(Path(__file__).with_name(code) for code in ("adapters.py", "emd.py", "transport.py"))]
    return Checkpoint.of(base, name, decides, files)


def _trainer(params: Params, name: AdapterName, pairs: Pairs, adapter: Adapter, blind: dict[str, float]) -> Trainer:
    settings = pairs.settings
    epoch, total = steps_per_epoch(settings, len(pairs.train)), total_steps(settings, len(pairs.train))
    rng = np.random.default_rng(params.seed)
    candidates = rng.permutation(pairs.val)[: settings.candidates].tolist()
    extras: dict[str, dict[str, Tensor]] = {}

    def loss(batch: list[int]) -> Tensor:
        positions = [pairs.train[i] for i in batch]
        tokens = adapter(pairs.tokens(positions))
        value = pairs.per_image(tokens, positions).mean()
        weight = settings.objective.contrast
        return value + weight * contrast(pairs, tokens, positions) if weight else value

    def validate(step: int) -> dict[str, float]:
        if "first" not in extras and step >= min(epoch, total):
            extras["first"] = {key: value.clone() for key, value in adapter.state_dict().items()}
        held_out = HeldOut.of(pairs, adapter, params.seed)
        values = {"val": held_out.matched.mean().item(), "shuffled": held_out.shuffled.mean().item()}
        return {"epoch": step / epoch, **values, **blind, **retrieval(pairs, adapter, candidates, params.seed)}

    decides = [params.seed, settings.model_dump(), params.adapters[name].architecture]
    return Trainer(
        name=f"pretrain {name}", model=adapter, groups=[{"params": list(adapter.parameters())}], settings=settings,
        examples=len(pairs.train), seed=params.seed, loss=loss, validate=validate,
        validate_at=set(range(epoch, total + 1, epoch)),
        checkpoint=_checkpoint(params, f"pretrain@{name}", settings, decides), extras=extras,
    )  # fmt: skip
