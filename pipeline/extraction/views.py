"""Views of pictures: what training may see instead of the plain ones, made of the pixels that an encoder takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

KEPT = 7 / 8  # of width and height, by a crop


def views_of(pixels: Tensor, names: Sequence[str]) -> Iterator[Tensor]:
    """A batch [B, 3, H, W], uint8 or float32, as it is, and the same of each of some views; none depends on chance."""
    yield pixels
    for name in names:
        yield VIEWS[name](pixels)


def flip(pixels: Tensor) -> Tensor:
    """Mirrored left to right."""
    return pixels.flip(-1)


def crop(pixels: Tensor) -> Tensor:
    """The middle, KEPT of width and height, at the size of the whole. In float32 also of uint8, as on a GPU it must."""
    height, width = pixels.shape[-2:]
    rows, columns = round(KEPT * height), round(KEPT * width)
    top, left = (height - rows) // 2, (width - columns) // 2
    middle = pixels[..., top : top + rows, left : left + columns].float()
    found = torch.nn.functional.interpolate(middle, (height, width), mode="bilinear", antialias=True)
    return found.round().clamp(0, 255).to(torch.uint8) if pixels.dtype == torch.uint8 else found.to(pixels.dtype)


VIEWS = {"flip": flip, "crop": crop}
