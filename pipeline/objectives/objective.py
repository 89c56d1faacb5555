"""What pre-training minimises: EMD between image tokens and captions, from cached tensors alone (docs/emd.md)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import copy
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import Params
from pipeline.config.schema import Pretrain
from pipeline.devices import exact_products, pick_device, to_device
from pipeline.errors import UserError
from pipeline.objectives.emd import EMDSettings
from pipeline.runs import Run
from pipeline.started import Started
from pipeline.store.reader import CaptionTokens, ImageTokens
from pipeline.store.webdataset import open_tars
from pipeline.transport.emd import barycentric_weights, start_emd

WHITENING_RIDGE = 0.1  # of the mean variance
CONTRASTED = 32  # images of a batch at most: the contrast costs their number squared


class Pairs:
    """Cached image tokens and captions of the data sets of pretrain.data, and the objective between them.

    Rows of all sets are numbered through; held-out figures are of the first alone.
    """

    def __init__(self, params: Params, settings: Pretrain):
        self.device = pick_device(params.runtime.device)
        self.in_flight = 3 if self.device.type == "cuda" else 1  # micro-batches: on the GPU, at the solver, on the way
        self.settings, self.threads = settings, params.runtime.emd_threads
        features = [_features(params, data) for data in settings.data]
        self._images, texts = [images for images, _ in features], [text for _, text in features]
        table, row_of = _one_table(texts)
        self.table = table.to(self.device)
        self.text = texts[0]
        self.rows: list[list[list[int]]] = []
        self._places: list[tuple[int, int]] = []
        self.train: list[int] = []
        for number, (images, text) in enumerate(zip(self._images, texts, strict=True)):
            start = len(self.rows)
            self._places += [(number, i) for i in range(len(images.ids))]
            self.rows += [[[row_of[t] for t in c] for c in text.captions(row_id) if c] for row_id in images.ids]
            worded = {i for i in range(len(images.ids)) if self.rows[start + i]}
            _name_wordless(settings.data[number], [row_id for i, row_id in enumerate(images.ids) if i not in worded])
            self.train += [start + i for i in images.split("train") if i in worded]
            if number == 0:
                self.val = [start + i for i in images.split("val") if i in worded][: settings.validation_images]
        if not self.train or not self.val:
            raise UserError(
                f"{settings.data[0]}: {len(self.train)} train and {len(self.val)} val pictures with words; both are "
                "needed: add pictures with texts"
            )
        self._measure()

    def _measure(self) -> None:
        """What the objective's distance needs: weights of words, the map into its space, the centre of words there."""
        self.word_weights = self._weights_of_words()
        counts = self._document_frequencies(self.train).to(self.device)
        self.words, self.into_space = self.table, None
        if self.objective.space == "whitened":
            self.into_space = whitening(self.table, counts)
            with exact_products():
                self.words = self.table @ self.into_space
        self.center = counts @ self.words / counts.sum()

    @property
    def objective(self) -> EMDSettings:
        """The objective's settings."""
        return cast(EMDSettings, self.settings.objective)

    def measured_by(self, objective: EMDSettings) -> Pairs:
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
        so no token is spent on them. Frequencies are those of the first data set: names have no function words.
        """
        kind = self.objective.word_weights
        if kind == "uniform":
            return torch.ones(len(self.table))
        captioned = [i for i in self.train if self._places[i][0] == 0]
        idf = torch.log((len(captioned) + 1) / (self._document_frequencies(captioned) + 1))
        return idf.square() if kind == "idf_squared" else idf

    def _document_frequencies(self, positions: list[int]) -> Tensor:
        """How many of some images have each word in a caption, [T]."""
        found = [row for position in positions for row in {row for caption in self.rows[position] for row in caption}]
        return torch.bincount(torch.tensor(found, dtype=torch.long), minlength=len(self.table)).float()

    def captions_of(self, positions: list[int]) -> tuple[list[list[int]], list[int]]:
        """All captions of some images as rows of the embedding table, and which image each belongs to."""
        pairs = [(caption, i) for i, position in enumerate(positions) for caption in self.rows[position]]
        return [caption for caption, _ in pairs], [i for _, i in pairs]

    def distance(self, tokens: Tensor, captions: list[list[int]], image_index: list[int] | None) -> Tensor:
        """EMD in the objective's own cost and marginal, [P], as in `emd`; tokens [B, N, D] on the device."""
        return self.start_distance(tokens, captions, image_index).result()

    def start_distance(self, tokens: Tensor, captions: list[list[int]], image_index: list[int] | None) -> Started:
        """The same, started."""
        flat = [row for caption in captions for row in caption]
        offsets = np.cumsum([0, *map(len, captions)]).tolist()
        tokens = self._in_space(tokens)
        words = self.words[to_device(torch.tensor(flat), self.device)]
        return start_emd(
            tokens, words, offsets, image_index,
            cost=self.objective.cost, word_weights=self._weights(flat, captions),
            center=self.center, unmatched=self.objective.unmatched,
            solver=self.objective.solver, threads=self.threads, background=self.in_flight > 1,
        )  # fmt: skip

    def _in_space(self, tokens: Tensor) -> Tensor:
        if self.into_space is None:
            return tokens
        with exact_products():
            return tokens @ self.into_space

    def _weights(self, flat: list[int], captions: list[list[int]]) -> Tensor:
        """Weights of the words of some captions, [T]; a caption of nothing but ubiquitous words keeps equal ones."""
        weights, lengths = self.word_weights[flat], torch.tensor([len(caption) for caption in captions])
        caption_of = torch.repeat_interleave(torch.arange(len(captions)), lengths)
        mass = weights.new_zeros(len(captions)).index_add(0, caption_of, weights)
        return torch.where(mass[caption_of] > 0, weights, 1.0)

    def better_set(self, tokens: Tensor, positions: list[int]) -> tuple[float, Tensor, Tensor]:
        """One set of tokens [M, D] against some images' captions: EMD summed over the images, and a better set.

        That is words' sums by weight, [M, D], and the weights' sums, [M, 1]: of several parts they add up.
        """
        captions, index = self.captions_of(positions)
        flat = [row for caption in captions for row in caption]
        rows, image = (to_device(torch.tensor(values), self.device) for values in (flat, index))
        value, weights = barycentric_weights(
            self._in_space(tokens), self.words[rows],
            np.cumsum([0, *map(len, captions)]).tolist(), torch.bincount(image)[image].reciprocal(),
            cost=self.objective.cost, word_weights=self._weights(flat, captions), center=self.center,
            unmatched=self.objective.unmatched, solver=self.objective.solver, threads=self.threads,
        )  # fmt: skip
        with exact_products():
            return value, weights @ self.table[rows], weights.sum(1, keepdim=True)

    def tokens(self, positions: list[int]) -> Tensor:
        """Image tokens [B, N, D] on the device."""
        tokens = torch.empty(len(positions), *self._images[0].shape, device=self.device)
        for number, images in enumerate(self._images):
            here = [i for i, position in enumerate(positions) if self._places[position][0] == number]
            if here:
                found = images.tokens([self._places[positions[i]][1] for i in here], self.device)
                tokens.index_copy_(0, to_device(torch.tensor(here), self.device), found)
        return tokens

    def per_image(self, tokens: Tensor, positions: list[int]) -> Tensor:
        """EMD averaged over the captions of each image, [B].

        tokens [B, N, D] may be of other images, or [1, N, D] the same for all.
        """
        return self.start_per_image(tokens, positions).result()

    def start_per_image(self, tokens: Tensor, positions: list[int]) -> Started:
        """The same, started."""
        captions, index = self.captions_of(positions)
        distances = self.start_distance(tokens, captions, index if len(tokens) > 1 else [0] * len(index))
        image, count = (to_device(t, tokens.device) for t in (torch.tensor(index), torch.bincount(torch.tensor(index))))
        sums = torch.zeros(len(positions), device=tokens.device)
        return distances.then(lambda values: sums.index_add(0, image, values) / count)


def _features(params: Params, data: str) -> tuple[ImageTokens, CaptionTokens]:
    if params.cache.reader == "webdataset":
        return open_tars(params, data)
    run = Run.of(params)
    return ImageTokens.open(run, data), CaptionTokens.open(run, data)


def _name_wordless(data: str, ids: list[str]) -> None:
    """Say on stderr which pictures have no word to align with, and so no part in pre-training."""
    if ids:
        names = f"{', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''}"
        print(f"{data}: {len(ids)} pictures have no words and are left out: {names}", file=sys.stderr)


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


def start_loss(pairs: Pairs, tokens: Tensor, positions: list[int]) -> Started:
    """Start the loss of a batch, tokens [B, N, D] of the images at `positions`, and return what gives the scalar.

    It is the mean over the images of their EMD, and the contrast if the objective has one. All that is random is drawn
    at the start.
    """
    distances, weight = pairs.start_per_image(tokens, positions), pairs.objective.contrast
    if not weight:
        return distances.then(torch.mean)
    contrasted = start_contrast(pairs, tokens, positions)
    return Started(lambda: distances.result().mean() + weight * contrasted())


def start_contrast(pairs: Pairs, tokens: Tensor, positions: list[int]) -> Callable[[], Tensor]:
    """How badly EMD tells the captions of a batch apart: InfoNCE (van den Oord et al. 2018), started.

    tokens [B, N, D] of the images at `positions`, one random caption each; both ways, from image to caption and from
    caption to image, as in CLIP (Radford et al. 2021). A caption that another image has too (a class name) is no wrong
    answer there.
    """
    positions = positions[:CONTRASTED]  # a batch is in random order
    count = len(positions)
    captions = [pairs.rows[p][int(torch.randint(len(pairs.rows[p]), ()))] for p in positions]
    distances = pairs.start_distance(tokens[:count], captions, None)
    shared = [[i != j and captions[j] in pairs.rows[p] for j in range(count)] for i, p in enumerate(positions)]
    no_answer = to_device(torch.tensor(shared), tokens.device)

    def finish() -> Tensor:
        logits = -distances.result().view(count, count) / pairs.objective.temperature
        logits = logits.masked_fill(no_answer, -torch.inf)
        own = torch.arange(count, device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    return finish
