"""What became of a picture: the words that its tokens are near, and where tokens lie among words."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.adapters.blocks import QueryBody
from pipeline.adapters.module import Adapter, load_adapter
from pipeline.alignment import adapted, components, sample
from pipeline.answers.model import Model
from pipeline.errors import UserError
from pipeline.llms.load import load_embedding, load_tokenizer
from pipeline.origin import check_llm
from pipeline.runs import remedy
from pipeline.serve.album import Album
from pipeline.store.reader import CaptionTokens

NEAREST = 6  # words of each token
PICTURES, VOCABULARY = 60, 1500  # in the plane of principal components
MOST_POINTS = 2500  # of a kind


@dataclass(frozen=True)
class Words:
    """Words of the LLM, by their token ids, and its input embeddings of them, float32 [T, D]."""

    ids: list[int]
    places: Tensor
    texts: list[str]


class Inside:
    """Adapters of a run, looked into. Methods raise UserError where something is missing or does not fit."""

    def __init__(self, model: Model, album: Album):
        self.model, self.album, self.run = model, album, model.run
        self._adapters: dict[str, Adapter] = {}
        self._loading = threading.Lock()

    def states(self) -> dict[str, str]:
        """Keys of the adapters that are there, before and after fine-tuning, with their names for people."""
        run, params = self.run, self.model.params.run
        found = {}
        for adapter in params.adapters:
            if (run.pretrained(adapter) / "last.safetensors").exists():
                found[adapter] = f"{adapter}, pre-trained"
            for recipe in params.recipes:
                if (run.finetuned(adapter, recipe) / "adapter.safetensors").exists():
                    found[f"{adapter}-{recipe}"] = f"{adapter}, fine-tuned on {recipe}"
        return found

    @torch.no_grad()
    def look(self, tokens: Tensor, state: str, of: str) -> dict[str, Any]:
        """Each adapted token's nearest words, and how far all tokens are from each of these; tokens [1, N, D_img].

        Nearest by Euclidean distance in the LLM's own space, as in the figure nearest_in_caption; `of`: the words of
        the `captions`, or the whole `vocabulary`.
        """
        adapter, words = self._adapter(state), self._words(of)
        given = adapter(tokens)[0]
        distances = torch.cdist(given, words.places)
        nearest = distances.topk(min(NEAREST, len(words.ids)), largest=False).indices
        listed = list(dict.fromkeys(nearest.T.flatten().tolist()))  # the nearest of each token first
        place = {row: i for i, row in enumerate(listed)}
        return {
            "side": self._side(adapter, tokens, given),
            "tokens": [[place[row] for row in rows] for rows in nearest.tolist()],
            "words": [words.texts[row] for row in listed],
            "distances": [[round(one, 4) for one in column] for column in distances[:, listed].T.tolist()],
        }

    def plane(self, state: str, data: str) -> dict[str, Any]:
        """Image tokens, caption words and rows of the vocabulary on their two principal components together.

        Image tokens are of validation pictures of a data set, words those of their captions, each weighing as often as
        it occurs.
        """
        adapter, images, seed = self._adapter(state), self.album.images(data), self.model.params.seed
        positions = [images.split("val")[i] for i in sample(len(images.split("val")), PICTURES, seed)]
        if not positions:
            raise UserError(data, "no validation pictures", "take another data set")
        image = adapted(adapter, images.tokens, positions)
        store = CaptionTokens.open(self.run, data)
        said = [token for at in positions for caption in store.captions(images.ids[at]) for token in caption]
        if not said:
            raise UserError(data, "no words of its validation pictures", "take another data set")
        table = self._words("vocabulary")
        rows = sample(len(table.ids), VOCABULARY, seed)
        clouds = [image, store.embeddings(said).double().numpy(), table.places[rows].double().numpy()]
        planes, explained = components(clouds)
        each = len(image) // len(positions)
        drawn = sample(len(image), MOST_POINTS, seed)
        first = {token: i for i, token in reversed(list(enumerate(said)))}
        words = list(first.items())[:MOST_POINTS]
        counts = dict(zip(*np.unique(said, return_counts=True), strict=True))
        return {
            "data": data,
            "explained": [float(share) for share in explained[:2]],
            "gap": float(np.linalg.norm(clouds[0].mean(0) - clouds[1].mean(0))),
            "images": [[*_xy(planes[0][i]), positions[i // each], int(i % each)] for i in drawn],
            "words": [[*_xy(planes[1][i]), self._text(t), int(counts[t])] for t, i in words],
            "vocabulary": [[*_xy(planes[2][i]), table.texts[row]] for i, row in enumerate(rows)],
        }

    def _adapter(self, state: str) -> Adapter:
        if state not in self.states():
            raise UserError(state, "no such adapter is trained", "run `dvc repro`")
        with self._loading:
            if state not in self._adapters:
                folder, weights = self._files(state)
                self.model.check_encoder(folder)
                check_llm(folder, self._embedding)
                self._adapters[state] = load_adapter(folder, weights)
        return self._adapters[state]

    def _files(self, state: str) -> tuple[Path, str]:
        adapter, _, recipe = state.partition("-")
        return (self.run.finetuned(adapter, recipe), "adapter") if recipe else (self.run.pretrained(adapter), "last")

    @staticmethod
    def _side(adapter: Adapter, tokens: Tensor, given: Tensor) -> int | None:
        """Of the square grid of the picture whose parts the adapted tokens are; None where they have no place in it."""
        parts = adapter.pooled(tokens).shape[1]
        side = round(parts**0.5)
        placed = len(given) == parts == side * side and not isinstance(adapter.body, QueryBody)
        return side if placed else None

    @cached_property
    def _embedding(self) -> torch.nn.Embedding:
        return load_embedding(self.model.params.llm)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.model.params.llm)

    def _words(self, of: str) -> Words:
        if of not in ("captions", "vocabulary"):
            raise UserError(of, "neither captions nor vocabulary")
        return self._of_captions if of == "captions" else self._vocabulary

    @cached_property
    def _vocabulary(self) -> Words:
        embedding, ids = self._embedding, list(range(min(self._embedding.num_embeddings, len(self._tokenizer))))
        with torch.no_grad():
            return Words(ids, embedding(torch.tensor(ids)), [self._text(i) for i in ids])

    @cached_property
    def _of_captions(self) -> Words:
        texts = {data: CaptionTokens.open(self.run, data) for data in self.model.params.run.data}
        ids = sorted({int(token) for text in texts.values() for token in text.token_ids})
        if not ids:
            raise UserError("", "no words in the captions", remedy(self.run.features("text", next(iter(texts)))))
        with torch.no_grad():
            return Words(ids, self._embedding(torch.tensor(ids)), [self._text(i) for i in ids])

    def _text(self, token: int) -> str:
        """A token for people: without the space before it; one that goes on a word with a hyphen in its place."""
        text = str(self._tokenizer.decode([token]))
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        goes_on = text[:1].isalnum() and text[:1] == piece[:1]
        return ("-" if goes_on else "") + (text.strip() or repr(text))


def _xy(point: Any) -> list[float]:
    return [round(float(value), 3) for value in point]
