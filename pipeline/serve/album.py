"""The pictures of a run's data sets: what is known of each, and which are alike."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.media.pictures import decode, read
from pipeline.runs import Run
from pipeline.serve.desk import jpeg
from pipeline.store.reader import ImageTokens

LOOKED_AT = 4000  # pictures of a data set that are compared; of more every so manyth
READ = 64  # pictures at a time
ALIKE = 12
SIDES = (160, 640)  # of pictures as they are sent, in pixels


@dataclass(frozen=True)
class _Means:
    """Mean tokens of length 1, [n, D], of the pictures at some places of a data set."""

    at: list[int]
    vectors: Tensor


class Album:
    """Pictures by data set and place there. Methods raise UserError where there is no such data set or picture."""

    def __init__(self, params: Params):
        self.params, self.run = params, Run.of(params)
        self._images: dict[str, ImageTokens] = {}
        self._means: dict[str, _Means] = {}
        self._making = threading.Lock()

    def images(self, data: str) -> ImageTokens:
        """The image tokens of a data set, with the rows of its manifest."""
        if data not in self.params.run.data:
            raise UserError(data, "no such data set in run.data")
        if data not in self._images:
            self._images[data] = ImageTokens.open(self.run, data)
        return self._images[data]

    def row(self, data: str, at: int) -> dict[str, Any]:
        """What the manifest says of a picture."""
        images = self.images(data)
        if not 0 <= at < len(images):
            raise UserError(data, f"has {len(images)} pictures, and none at {at}")
        row = images.rows.iloc[at]
        texts = [] if row["captions"] is None else [str(text) for text in row["captions"]]
        label = row["label"] if isinstance(row["label"], str) else None
        return {"data": data, "at": at, "id": row["id"], "label": label, "split": row["split"], "captions": texts}

    def content(self, data: str, at: int) -> bytes:
        """The file of a picture. Raises UserError where it is no longer there."""
        self.row(data, at)
        name = str(self.images(data).rows["image"].iloc[at])
        try:
            return read(name)
        except OSError as error:
            raise UserError(name, error.strerror or error) from None

    def picture(self, data: str, at: int, side: int) -> bytes:
        """A picture as JPEG, no side longer than the first of SIDES that is at least `side`, or the last."""
        try:
            return jpeg(decode(self.content(data, at)), next((one for one in SIDES if one >= side), SIDES[-1]))
        except ValueError as error:
            raise UserError(f"{data} {at}", error) from None

    def some(self, data: str, count: int) -> list[dict[str, Any]]:
        """Test pictures of a data set, evenly spread."""
        test = self.images(data).split("test")
        return [self.row(data, at) for at in test[:: -(-len(test) // count) or 1]]

    def similar(self, tokens: Tensor, but: tuple[str, int] | None = None) -> dict[str, Any]:
        """The pictures of all data sets whose mean tokens have the largest cosines with that of tokens [1, N, D]."""
        looked_at, everything, found = 0, 0, []
        for data in self.params.run.data:
            means, total = self._means_of(data), len(self.images(data))
            looked_at, everything = looked_at + len(means.at), everything + total
            near = (means.vectors @ _unit(tokens)[0]).topk(min(ALIKE + 1, len(means.at)))
            found += [(cosine, data, means.at[i]) for cosine, i in zip(*map(Tensor.tolist, near), strict=True)]
        nearest = sorted((one for one in found if one[1:] != but), reverse=True)[:ALIKE]
        pictures = [{**self.row(data, at), "cosine": round(cosine, 4)} for cosine, data, at in nearest]
        return {"pictures": pictures, "looked_at": looked_at, "of": everything}

    def _means_of(self, data: str) -> _Means:
        with self._making:
            if data not in self._means:
                images = self.images(data)
                at = list(range(0, len(images), -(-len(images) // LOOKED_AT) or 1))
                parts = [_unit(images.tokens(at[i : i + READ])) for i in range(0, len(at), READ)]
                vectors = torch.cat(parts) if parts else torch.zeros(0, images.shape[-1])
                self._means[data] = _Means(at, vectors)
        return self._means[data]


def _unit(tokens: Tensor) -> Tensor:
    return torch.nn.functional.normalize(tokens.float().mean(1), dim=1)
