"""An encoder's transform in two parts: resize and crop in 8 bits, here or on a GPU; then the normalisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
Box = tuple[int, int, int, int]
"""Left, upper, right, lower."""


@dataclass(frozen=True)
class Preprocess:
    """Centre square if `square`, resize, centre crop if `crop`; then (pixel / scale - mean) / std.

    `size` is that of the shorter side, or (height, width); `crop` is (height, width). `text` names it in fingerprints.
    """

    size: int | tuple[int, int]
    resampling: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    text: str
    square: bool = False
    crop: tuple[int, int] | None = None

    def __repr__(self) -> str:
        return self.text

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of what comes out; a `size` of the shorter side alone comes with a crop or a square."""
        return self.crop or ((self.size, self.size) if isinstance(self.size, int) else self.size)

    def plan(self, height: int, width: int) -> tuple[Box, tuple[int, int], Box]:
        """What to take of a picture, the (height, width) to bring it to, and what to take of that."""
        before = _centre(height, width, *[min(height, width)] * 2) if self.square else (0, 0, width, height)
        height, width = before[3] - before[1], before[2] - before[0]
        if isinstance(self.size, int):  # the shorter side exactly, the longer one cut to whole pixels
            short, long = min(height, width), int(self.size * max(height, width) / min(height, width))
            size = (self.size, long) if height == short else (long, self.size)
        else:
            size = self.size
        return before, size, _centre(*size, *self.shape)

    def shrinks(self, height: int, width: int) -> float:
        """How many times as long as the result the picture is, in the direction where that is more."""
        (left, upper, right, lower), size, _ = self.plan(height, width)
        return max((lower - upper) / size[0], (right - left) / size[1])

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB picture of any size to uint8 [3, H, W], by PIL."""
        before, (height, width), after = self.plan(image.height, image.width)
        image = image if before == (0, 0, *image.size) else image.crop(before)
        image = image.resize((width, height), RESAMPLING[self.resampling]).crop(after)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def fit(self, pixels: Tensor) -> Tensor:
        """The same by torch, of uint8 [3, h, w] on a CPU."""
        before, size, after = self.plan(*pixels.shape[1:])
        return _cut(self._resize(_cut(pixels, before)[None], size)[0], after).contiguous()

    def fit_in_float(self, pixels: Tensor) -> Tensor:
        """The same of uint8 [B, 3, h, w] on any device: a GPU resizes no uint8.

        As in PIL, rows are resized first and rounded, then columns; without the rounding between, Lite0's tokens differ
        40 times as much from PIL's.
        """
        before, (height, width), after = self.plan(*pixels.shape[2:])
        part = _cut(pixels, before).float()
        rows = self._resize(part, (part.shape[2], width)).round_().clamp_(0, 255)
        return _cut(self._resize(rows, (height, width)), after).round().clamp_(0, 255).to(torch.uint8)

    def _resize(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        return torch.nn.functional.interpolate(pixels, size, mode=self.resampling, antialias=True)

    def constants(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, mean and deviation for `normalise`, as tensors: by a plain number a GPU does not divide exactly."""
        of_channels = [torch.tensor(values)[:, None, None].to(device) for values in (self.mean, self.std)]
        return torch.tensor(self.scale).to(device), of_channels[0], of_channels[1]


def normalise(pixels: Tensor, constants: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """uint8 [B, 3, H, W] to float32, by Preprocess.constants: the bits of the encoder's own transform."""
    scale, mean, std = constants
    return pixels.float().div_(scale).sub_(mean).div_(std)


def in_parts(transform: Callable[[Image.Image], Tensor]) -> Preprocess | None:
    """A transform of torchvision's parts, as open_clip and timm have them, taken apart; None when it has others."""
    if isinstance(transform, Preprocess):
        return transform
    from torchvision import transforms  # which takes two seconds, and torch's compiler with it

    parts = list(getattr(transform, "transforms", ()))
    parts = [part for part in parts if _name(part) not in ("_convert_to_rgb", "MaybeConvertMode")]  # pictures are RGB
    if [_name(part) for part in parts if _name(part) != "CenterCrop"] not in (
        ["Resize", "ToTensor", "Normalize"], ["Resize", "MaybeToTensor", "Normalize"],
    ) or len(parts) > 4:  # fmt: skip
        return None
    resize, crop = parts[0], parts[1] if len(parts) == 4 else None
    if not (isinstance(resize, transforms.Resize) and isinstance(parts[-1], transforms.Normalize)):
        return None
    size = _size(resize.size)
    wanted = None if crop is None else _size(crop.size)
    wanted = (wanted, wanted) if isinstance(wanted, int) else wanted
    least = (size, size) if isinstance(size, int) else size
    fits = wanted is None or (wanted[0] <= least[0] and wanted[1] <= least[1])  # else it would add a border
    mode = getattr(resize.interpolation, "value", None)
    if resize.max_size is not None or mode not in RESAMPLING or not fits or (wanted is None and isinstance(size, int)):
        return None
    mean, std = (tuple(float(x) for x in values) for values in (parts[-1].mean, parts[-1].std))
    text = " ".join(repr(transform).split())
    return Preprocess(size, mode, 255.0, mean, std, text, crop=wanted)


def _name(part: Any) -> str:
    return str(getattr(part, "__name__", type(part).__name__))


def _size(size: Any) -> int | tuple[int, int]:
    """As torchvision takes it: a number or a list of one are of the shorter side."""
    if isinstance(size, int):
        return size
    return int(size[0]) if len(size) == 1 else (int(size[0]), int(size[1]))


def _centre(height: int, width: int, wanted_height: int, wanted_width: int) -> Box:
    upper, left = round((height - wanted_height) / 2), round((width - wanted_width) / 2)
    return left, upper, left + wanted_width, upper + wanted_height


def _cut(pixels: Tensor, box: Box) -> Tensor:
    left, upper, right, lower = box
    return pixels[..., upper:lower, left:right]
