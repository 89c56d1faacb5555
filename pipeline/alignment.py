"""Where adapted image tokens lie among the text tokens: principal components, their pictures, and the modality gap."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.adapters.module import load_adapter
from pipeline.config import Params
from pipeline.devices import CPU, pick_device
from pipeline.errors import UserError
from pipeline.llms.load import load_embedding
from pipeline.media.plots import BLUE, GREEN, GREY, INK, RED, canvas, save_png
from pipeline.origin import check_llm, check_results
from pipeline.runs import Run, require
from pipeline.store.reader import CaptionTokens, ImageTokens

Array = NDArray[np.float64]
STATES = {"epoch1": "after the first epoch", "last": "after pre-training", "finetuned": "after fine-tuning"}
DRAWN = 2500  # points of a kind in a picture; the figures use all of them
BATCH = 16


@dataclass(frozen=True)
class Components:
    """Principal components of image and text tokens together, in one state of the adapter."""

    image: Array  # [n, 2] on the first two components
    text: Array  # [m, 2]
    explained: Array  # [min(n + m, D)] ratios of the variance, falling
    gap: float  # distance of the two centroids in the LLM's embedding space

    @property
    def k80(self) -> int:
        """How many components hold 80 % of the variance."""
        return count_for(self.explained, 0.8)

    @property
    def plane(self) -> float:
        """Share of the variance that the first two components, and so the picture, show."""
        return float(self.explained[:2].sum())

    def metrics(self) -> dict[str, object]:
        """What goes into metrics.json; the ratios of the first 100 components."""
        return {"k80": self.k80, "gap": self.gap, "explained": [float(ratio) for ratio in self.explained[:100]]}


def pca(params: Params, adapter: str) -> Path:
    """Compute and draw the components of one adapter; returns the folder data/<profile>/pca/<adapter>.

    Writes metrics.json and six pictures. Raises UserError when an input is missing or tokens are not finite.
    """
    run = Run.of(params)
    data, recipe = params.pca.data, params.pca.recipe
    positions, image_store = _pictures(params, run)
    text = text_tokens(CaptionTokens.open(run, data), [image_store.ids[at] for at in positions])
    device = pick_device(params.runtime.device)
    device = CPU if device.type == "mps" else device  # which has no float64
    embedding = load_embedding(params.llm)
    for folder in check_results(run, adapter, params.llm, {recipe: params.finetune.recipes[recipe].data}):
        check_llm(folder, embedding)
    images = {
        state: _image_tokens(folder, weights, image_store, positions, device)
        for state, (folder, weights) in _weights(run, adapter, recipe).items()
    }
    states = {state: fit(tokens, text, device) for state, tokens in images.items()}
    table = embedding.weight.detach()
    vocabulary = table[sample(len(table), params.pca.vocabulary, params.seed)].double().numpy()
    folder = run.pca(adapter)
    folder.mkdir(parents=True, exist_ok=True)
    draw_states(folder, adapter, states, params.seed)
    draw_vocabulary(folder / "vocabulary.png", adapter, images["last"], text, vocabulary, params.seed, device)
    draw_explained(folder / "explained.png", adapter, {state: found.explained for state, found in states.items()})
    metrics = {state: found.metrics() for state, found in states.items()}
    _, alone = components([text], device)
    metrics["text"] = {"k80": count_for(alone, 0.8), "explained": [float(ratio) for ratio in alone[:100]]}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    return folder


def _pictures(params: Params, run: Run) -> tuple[list[int], ImageTokens]:
    store = ImageTokens.open(run, params.pca.data)
    positions = store.split("val")
    if not positions:
        raise UserError(
            run.manifest(params.pca.data), "no validation pictures", f"add pictures to the data set {params.pca.data}"
        )
    return [positions[at] for at in sample(len(positions), params.pca.images, params.seed)], store


def text_tokens(store: CaptionTokens, ids: list[str]) -> Array:
    """Input embeddings of every token of every caption of some pictures: [m, D]; a repeated word counts each time."""
    tokens = [token for row_id in ids for caption in store.captions(row_id) for token in caption]
    return np.asarray(store.embeddings(tokens).double().numpy())


def _weights(run: Run, adapter: str, recipe: str) -> dict[str, tuple[Path, str]]:
    """The folder of each state of an adapter, and the name of its weights there."""
    pretrained = run.pretrained(adapter)
    states = (pretrained, "first"), (pretrained, "last"), (run.finetuned(adapter, recipe), "adapter")
    return dict(zip(STATES, states, strict=True))


def _image_tokens(folder: Path, weights: str, store: ImageTokens, positions: list[int], device: torch.device) -> Array:
    path = require(folder / f"{weights}.safetensors")
    network = load_adapter(folder, weights).to(device)
    tokens = adapted(network, lambda some: store.tokens(some, device), positions)
    if not np.isfinite(tokens).all():
        stage = folder.parent.name
        raise UserError(path, "its image tokens are not finite", f"lower the learning rate in {stage}")
    return tokens


@torch.no_grad()
def adapted(adapter: Callable[[Tensor], Tensor], tokens: Callable[[list[int]], Tensor], positions: list[int]) -> Array:
    """Image tokens of some pictures after the adapter, in one heap: float64 [B * M, D]."""
    parts = [adapter(tokens(positions[at : at + BATCH])) for at in range(0, len(positions), BATCH)]
    return np.asarray(torch.cat(parts).flatten(0, 1).double().cpu().numpy())


def fit(image: Array, text: Array, device: torch.device = CPU) -> Components:
    """PCA on image tokens [n, D] and text tokens [m, D] together."""
    planes, explained = components([image, text], device)
    gap = float(np.linalg.norm(image.mean(0) - text.mean(0)))
    return Components(planes[0], planes[1], explained, gap)


def components(clouds: list[Array], device: torch.device = CPU) -> tuple[list[Array], Array]:
    """Clouds [n, D] on the first two principal components of all of them together, and all variance ratios, falling.

    By the covariance's eigenvectors, in float64: exact, and D x D however many tokens there are. A component has the
    sign that makes its largest entry positive.
    """
    parts = [torch.from_numpy(cloud).to(device) for cloud in clouds]
    rows = torch.cat(parts)
    center = rows.mean(0)
    rows -= center
    variances, axes = torch.linalg.eigh(rows.T @ rows)
    variances, plane = variances.flip(0).clamp_min(0), axes.flip(1)[:, :2]
    plane = plane * plane.gather(0, plane.abs().argmax(0, keepdim=True)).sign()
    explained = (variances / variances.sum())[: min(rows.shape)]
    return [((part - center) @ plane).cpu().numpy() for part in parts], explained.cpu().numpy()


def count_for(explained: Array, share: float) -> int:
    """The smallest number of leading components whose ratios sum to `share`."""
    # The tolerance is for sums like 0.5 + 0.3, which fall short of 0.8 by rounding alone.
    return int(np.searchsorted(np.cumsum(explained), share - 1e-9)) + 1


def sample(total: int, count: int, seed: int) -> NDArray[np.int64]:
    """Positions of at most `count` of `total` rows: the same for the same seed, in their order."""
    if total <= count:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, count, replace=False))


def overlap(image: Array, text: Array) -> tuple[Array, Array, bool]:
    """Limits (low [2], high [2]) of the window in which both clouds lie, and whether there is such a window.

    Per axis: where the central 90 % of both kinds meet. Where they do not, the span from one median to the other.
    """
    edges = np.stack([np.percentile(cloud, (5, 95), axis=0) for cloud in (image, text)])  # [kind, edge, axis]
    low, high = edges[:, 0].max(0), edges[:, 1].min(0)
    meet = low < high
    medians = np.stack([np.median(cloud, axis=0) for cloud in (image, text)])
    low, high = np.where(meet, low, medians.min(0)), np.where(meet, high, medians.max(0))
    margin = 0.08 * (high - low) + 1e-9
    return low - margin, high + margin, bool(meet.all())


def draw_states(folder: Path, adapter: str, states: dict[str, Components], seed: int) -> None:
    """epoch1.png, last.png, finetuned.png, and zoom.png, the crowded part of last.png."""
    for state, found in states.items():
        head = f"{adapter} {STATES[state]}: centroids (crosses) {found.gap:.2f} apart in all dimensions,"
        note = f"{100 * found.plane:.0f} % of the variance in this plane"
        _scatter(folder / f"{state}.png", f"{head}\n{note}", found.image, found.text, seed)
    last = states["last"]
    low, high, meet = overlap(last.image, last.text)
    seen = "where image and text tokens overlap" if meet else "the span between the kinds, which do not overlap"
    title = f"{adapter} {STATES['last']}, closer:\n{seen}"
    _scatter(folder / "zoom.png", title, last.image, last.text, seed, (low, high))


def draw_vocabulary(
    path: Path, adapter: str, image: Array, text: Array, vocabulary: Array, seed: int, device: torch.device = CPU
) -> None:
    """Image and text tokens on the components of all three kinds: vocabulary rows [V, D] in grey below them."""
    title = f"{adapter} {STATES['last']} among the LLM's vocabulary\n({len(vocabulary):,} of its rows, at random)"
    planes, _ = components([image, text, vocabulary], device)
    _scatter(path, title, planes[0], planes[1], seed, vocabulary=planes[2])


def _scatter(
    path: Path,
    title: str,
    image: Array,
    text: Array,
    seed: int,
    window: tuple[Array, Array] | None = None,
    vocabulary: Array | None = None,
) -> None:
    figure, axes = canvas(title, "first principal component", "second principal component")
    if vocabulary is not None:
        axes.scatter(vocabulary[:, 0], vocabulary[:, 1], s=7, c=GREY, alpha=0.35, linewidths=0, label="vocabulary")
    kinds = ((image, BLUE, "o", "image tokens"), (text, RED, "^", "text tokens"))
    for cloud, colour, marker, label in kinds:
        seen = cloud if window is None else cloud[((cloud > window[0]) & (cloud < window[1])).all(1)]
        x, y = seen[sample(len(seen), DRAWN, seed)].T
        axes.scatter(x, y, s=26 if window else 14, c=colour, marker=marker, alpha=0.45, linewidths=0, label=label)
    for cloud, colour, _, _ in kinds:
        x, y = cloud.mean(0)
        axes.plot(x, y, "X", color=colour, markersize=13, markeredgecolor="white", markeredgewidth=1.5)
    if window is not None:
        axes.set_xlim(window[0][0], window[1][0])
        axes.set_ylim(window[0][1], window[1][1])
    legend = axes.legend(loc="best", fontsize=11, framealpha=0.9, edgecolor="none", markerscale=1.8)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    save_png(figure, path)


def draw_explained(path: Path, adapter: str, curves: dict[str, Array]) -> None:
    """Cumulative explained variance of the states over the number of components, with the 80 % line."""
    counts = {state: count_for(ratios, 0.8) for state, ratios in curves.items()}
    title = f"{adapter}: 80 % of the variance needs {counts['last']} components {STATES['last']},\n"
    title += f"{counts['finetuned']} {STATES['finetuned']}"
    figure, axes = canvas(title, "components (log scale)", "share of the variance")
    axes.axhline(0.8, color=INK, linewidth=1, linestyle=":")
    axes.annotate("80 %", (1, 0.8), (4, 4), textcoords="offset points", fontsize=11, color=INK)
    styles = {"epoch1": (GREEN, "--"), "last": (BLUE, "-"), "finetuned": (RED, "-.")}
    for state, ratios in curves.items():
        colour, dashes = styles[state]
        label = f"{STATES[state]}: {counts[state]}"
        steps = np.arange(1, len(ratios) + 1)
        axes.plot(steps, np.cumsum(ratios), dashes, color=colour, linewidth=2.2, label=label)
        axes.plot(counts[state], np.cumsum(ratios)[counts[state] - 1], "o", color=colour, markersize=7)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(loc="lower right", fontsize=11, frameon=False)
    save_png(figure, path)
