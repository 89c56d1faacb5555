"""Frozen vision encoders at work: a picture goes in, its image tokens come out."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from pipeline.config import Vision
from pipeline.devices import hash_weights, keep_freed_memory, pick_device, pick_dtype
from pipeline.encoders.base import Encoder, Parts
from pipeline.errors import UserError
from pipeline.media.preprocess import in_parts, normalise


class VisionEncoder(Protocol):
    """A frozen encoder; `identity` names weights, preprocessing and dtype: what decides the bytes of a token."""

    identity: dict[str, str]

    def preprocess(self, image: Image.Image) -> Tensor:
        """An RGB picture of any size to [3, H, W]: uint8, or float32 where the transform cannot be taken apart."""

    def encode(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """What `preprocess` gives, [B, 3, H, W] on any device, to image tokens [B, N, D] on the CPU.

        uint8 is normalised first, where the network is. The tokens come back in `dtype`. Threads may call it side by
        side.
        """


def load_vision_encoder(params: Vision, device: str = "auto") -> VisionEncoder:
    """The encoder that params.vision names, with its real weights.

    Raises UserError when the weights cannot be found; random weights only on request (pretrained: random).
    """
    keep_freed_memory()
    encoder = Encoder.of(params)
    return _Frozen(encoder, seeded(encoder.build), pick_device(device))


class TwoTowers:
    """The whole frozen model of an encoder, where that puts pictures and texts into one space.

    `identity` is of all its weights. Raises UserError when they cannot be found, or the encoder has no text tower.
    """

    def __init__(self, params: Vision, device: str = "auto"):
        encoder = Encoder.of(params)
        towers = seeded(encoder.two_towers)
        if towers is None:
            raise UserError(f"vision.encoder {params.encoder}", "has no text tower", "take one of open_clip's")
        self._pictures, self._texts = _Frozen(encoder, towers.parts, pick_device(device)), towers.texts
        self.preprocess, self.identity = self._pictures.preprocess, self._pictures.identity

    def pictures(self, pixels: Tensor) -> Tensor:
        """What `preprocess` gives, [B, 3, H, W] on any device, to float32 [B, E] of length 1, on the CPU."""
        return torch.nn.functional.normalize(self._pictures.encode(pixels)[:, 0], dim=1)

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> Tensor:
        """Texts, cut where the model's own tokenizer cuts them, to the same."""
        return torch.nn.functional.normalize(self._texts(texts).float(), dim=1).cpu()


_B = TypeVar("_B")


def seeded(build: Callable[[], _B]) -> _B:
    """What an encoder builds. An untrained network is the same one in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


class _Frozen:
    """The one implementation, of all encoders."""

    def __init__(self, encoder: Encoder, built: Parts, device: torch.device):
        self.name, self.device = encoder.settings.encoder, device
        self.dtype = pick_dtype(encoder.settings.dtype, device)
        self.identity = encoder.identity(built, hash_weights(built.network), self.dtype)
        # channels_last halves the time of convolutions on a CPU and changes nothing for transformers.
        built.network.eval().requires_grad_(False).to(device, self.dtype).to(memory_format=torch.channels_last)
        parts = in_parts(built.preprocess)
        self.preprocess, self._features = parts or built.preprocess, built.tokens
        self._constants = None if parts is None else parts.constants(device)
        self._streams = SimpleQueue[torch.cuda.Stream]()
        for _ in range(2 if device.type == "cuda" else 0):  # two, and no more: torch keeps freed memory by stream
            self._streams.put(torch.cuda.Stream(device))

    @torch.inference_mode()
    def encode(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.device.type == "cuda":
            return self._encode_on_stream(pixels, dtype)
        return self._tokens(pixels.to(self.device)).to(dtype).cpu()

    def _tokens(self, pixels: Tensor) -> Tensor:
        if pixels.dtype == torch.uint8:
            assert self._constants is not None, "preprocess gives uint8 only where the transform was taken apart"
            pixels = normalise(pixels, self._constants)
        tokens = self._features(pixels.to(self.dtype, memory_format=torch.channels_last))
        if tokens.ndim != 3 or len(tokens) != len(pixels):
            raise UserError(
                f"vision.encoder {self.name}",
                f"gives {list(tokens.shape)} of {len(pixels)} pictures, where image tokens [B, N, D] were due",
                "correct what its build returns",
            )
        return tokens

    def _encode_on_stream(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Copies from and to pinned memory overlap what the GPU computes for a thread that has the other stream."""
        stream = self._streams.get()
        try:
            stream.wait_stream(torch.cuda.default_stream(self.device))  # which brought the weights
            with torch.cuda.stream(stream):
                pixels = pixels if pixels.is_cuda else pixels.pin_memory()
                there = pixels.to(self.device, non_blocking=True)
                tokens = self._tokens(there).to(dtype).contiguous()
                back = torch.empty(tokens.shape, dtype=dtype, pin_memory=True).copy_(tokens, non_blocking=True)
            stream.synchronize()
            return back
        finally:
            self._streams.put(stream)
