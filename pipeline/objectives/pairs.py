"""What there is to align: cached image tokens and captions, without pictures and without an LLM."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.config import Params
from pipeline.config.schema import Pretrain
from pipeline.devices import pick_device, to_device
from pipeline.errors import UserError
from pipeline.runs import Run
from pipeline.store.reader import CaptionTokens, ImageTokens, drawn_views
from pipeline.store.webdataset import open_tars


@dataclass(frozen=True)
class Names:
    """The names of a data set's classes as captions, and which of them pictures have, by their positions."""

    captions: list[list[int]]
    of: dict[int, int]


@dataclass(frozen=True)
class Pairs:
    """Pictures, by their positions: image tokens, and captions as rows of one table of words.

    `tokens` gives image tokens [B, N, D_img], float32 on the table's device, of some positions, plain or, where there
    are several `views` of a picture, of the views that a second argument has; `table` [T, D] has the LLM's input
    embeddings of the words and `token_ids` [T] their numbers there. `train` and `val` are positions.
    Pictures of several data sets are numbered through. Those of the first, all that are before `first`, are the ones
    that held-out figures and document frequencies are of. `names` has an entry for each data set of classes,
    `starts` the first position of each data set.
    """

    tokens: Callable[..., Tensor]
    captions: list[list[list[int]]]
    table: Tensor
    token_ids: list[int]
    train: list[int]
    val: list[int]
    first: int
    names: list[Names] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    views: int = 1

    @classmethod
    def open(cls, params: Params, settings: Pretrain) -> Pairs:
        """The features of the data sets of pretrain.data.

        Pictures without words are named on stderr and are in no split. Raises UserError when features are missing, or
        the first data set has no picture with words to train on, or none to hold out.
        """
        device = pick_device(params.runtime.device)
        images, texts = zip(*(_features(params, data) for data in settings.data), strict=True)
        table, token_ids, row_of = _one_table(texts)
        captions: list[list[list[int]]] = []
        train: list[int] = []
        val: list[int] = []
        names: list[Names] = []
        starts: list[int] = []
        for number, (data, image, text) in enumerate(zip(settings.data, images, texts, strict=True)):
            start = len(captions)
            starts.append(start)
            captions += [[[row_of[t] for t in c] for c in text.captions(row_id) if c] for row_id in image.ids]
            if params.data[data].task == "classify":
                names.append(_names(captions, range(start, len(captions))))
            _name_wordless(data, [row_id for i, row_id in enumerate(image.ids) if not captions[start + i]])
            train += [start + i for i in image.split("train") if captions[start + i]]
            if number == 0:
                val = [i for i in image.split("val") if captions[i]][: settings.validation_images]
        if not train or not val:
            raise UserError(
                settings.data[0],
                f"{len(train)} train and {len(val)} val pictures with words",
                "both are needed: add pictures with texts",
            )
        return cls(
            _Joined(images, device), captions, table.to(device), token_ids, train, val, len(images[0]), names, starts,
            images[0].views,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self.table.device

    def drawn(self, positions: list[int]) -> Tensor:
        """Image tokens of a random view of each of some pictures, by torch's own state; nothing is drawn of one."""
        views = drawn_views(self.views, len(positions))
        return self.tokens(positions) if views is None else self.tokens(positions, views)

    def is_named(self, position: int) -> bool:
        """Whether a picture is of a class."""
        return any(position in names.of for names in self.names)

    def captions_of(self, positions: list[int]) -> tuple[list[list[int]], list[int]]:
        """All captions of some pictures, and which of the pictures each belongs to."""
        pairs = [(caption, i) for i, position in enumerate(positions) for caption in self.captions[position]]
        return [caption for caption, _ in pairs], [i for _, i in pairs]

    def one_caption_each(self, positions: list[int]) -> list[list[int]]:
        """A random caption of each of some pictures."""
        captions = [self.captions[position] for position in positions]
        return [some[int(torch.randint(len(some), ()))] for some in captions]

    def mean_by_image(self, image: list[int]) -> Callable[[Tensor], Tensor]:
        """What averages values of captions, [P, ...], to their images', [B, ...]; image [P] as of `captions_of`."""
        of = torch.tensor(image)
        index, count = to_device(of, self.device), to_device(torch.bincount(of), self.device)

        def mean(values: Tensor) -> Tensor:
            sums = values.new_zeros(len(count), *values.shape[1:]).index_add(0, index, values)
            return sums / count.view(-1, *[1] * (values.dim() - 1))

        return mean

    def document_frequencies(self, positions: list[int]) -> Tensor:
        """How many of some pictures have each word in a caption, [T], float32 on the CPU."""
        found = [row for at in positions for row in {row for caption in self.captions[at] for row in caption}]
        return torch.bincount(torch.tensor(found, dtype=torch.long), minlength=len(self.table)).float()


class _Joined:
    """Image tokens of several data sets, numbered through."""

    def __init__(self, images: Sequence[ImageTokens], device: torch.device):
        self._images, self._device = images, device
        self._places = [(number, i) for number, some in enumerate(images) for i in range(len(some))]

    def __call__(self, positions: list[int], views: Sequence[int] | None = None) -> Tensor:
        tokens = torch.empty(len(positions), *self._images[0].shape, device=self._device)
        for number, images in enumerate(self._images):
            here = [i for i, position in enumerate(positions) if self._places[position][0] == number]
            if here:
                own = None if views is None else [views[i] for i in here]
                found = images.tokens([self._places[positions[i]][1] for i in here], self._device, own)
                tokens.index_copy_(0, to_device(torch.tensor(here), self._device), found)
        return tokens


def _names(captions: list[list[list[int]]], positions: Sequence[int]) -> Names:
    """The names among the captions at some positions, in the order of their words; a class has one caption."""
    own = {position: tuple(captions[position][0]) for position in positions if captions[position]}
    distinct = sorted(set(own.values()))
    number = {name: i for i, name in enumerate(distinct)}
    return Names([list(name) for name in distinct], {position: number[name] for position, name in own.items()})


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


def _one_table(texts: Sequence[CaptionTokens]) -> tuple[Tensor, list[int], dict[int, int]]:
    """The embedding tables of several data sets as one, the token id of each row, and the row of each token id."""
    row_of: dict[int, int] = {}
    rows = []
    for text in texts:
        new = [token for token in text.token_ids.tolist() if token not in row_of]
        row_of |= {token: len(row_of) + i for i, token in enumerate(new)}
        rows.append(text.embeddings(new))
    return torch.cat(rows), list(row_of), row_of
