"""Decoders: from the bytes of a picture file to the pixels an encoder takes. Which one it is, is in the fingerprint.

What is not a plain JPEG (pictures.plain_jpeg), every decoder leaves to PIL, and so it does with what it refuses. So the
pixels of a picture depend on its own bytes alone, whatever else is in the batch.
"""

from __future__ import annotations

import io
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from queue import SimpleQueue
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipeline import versions
from pipeline.errors import UserError, reason
from pipeline.media.pictures import PlainJPEG, decode, plain_jpeg
from pipeline.media.preprocess import Preprocess

PIXELS_AT_ONCE = 64 << 20  # that nvJPEG decodes in one call: 200 MB, and four times that for the largest to resize
MOST_SHRINKING = 32  # torch resizes no further on a GPU: the weights of a pixel have to fit its shared memory


@dataclass(frozen=True)
class Encoded:
    """A plain JPEG on its way to the GPU: the file as uint8 [bytes], and its frame."""

    content: Tensor
    frame: PlainJPEG


Loaded = Tensor | Encoded
"""A picture as `load` gives it and `batch` takes it: pixels [3, H, W], or a file that the GPU decodes."""


class Broken(ValueError):
    """A picture of a batch that neither the decoder nor PIL takes; `row` is its place."""

    def __init__(self, row: int, reason: str):
        super().__init__(reason)
        self.row = row


class Decoder:
    """PIL, and what the decoders have in common. Threads may use one side by side."""

    name = "pil"
    light = False  # whether `load` leaves the work to `batch`

    def __init__(self, preprocess: Callable[[Image.Image], Tensor]):
        self.preprocess = preprocess
        self._refused, self._lock = 0, threading.Lock()

    @property
    def identity(self) -> dict[str, str]:
        """What it adds to the fingerprint of features: nothing for PIL, whose features are older than the choice."""
        return {} if self.name == "pil" else {"decoder": f"{self.name} {versions.DECODERS}"}

    def load(self, content: bytes) -> Loaded:
        """The bytes of a picture file, decoded as far as a thread of the CPU has to; ValueError as `decode`."""
        return self.preprocess(decode(content))

    def batch(self, pictures: list[Loaded], size: int) -> Tensor:
        """Pictures as `load` gave them to [size, 3, H, W] for an encoder, filled up with zeros. Raises Broken."""
        return padded([picture for picture in pictures if isinstance(picture, Tensor)], size)

    def take_refused(self) -> int:
        """How many plain JPEGs it refused and PIL decoded, since this was asked last."""
        with self._lock:
            refused, self._refused = self._refused, 0
        return refused

    def _by_pil(self, content: bytes) -> Tensor:
        """A plain JPEG that was refused."""
        with self._lock:
            self._refused += 1
        return self.preprocess(decode(content))


class TorchvisionDecoder(Decoder):
    """libjpeg-turbo as PIL has it, by torchvision; resized in 8 bits by torch. Threads do not wait for the GIL."""

    name = "torchvision"

    def __init__(self, preprocess: Preprocess):
        super().__init__(preprocess)
        self._fit = preprocess.fit

    def load(self, content: bytes) -> Tensor:
        frame = plain_jpeg(content)
        if frame is None:
            return self.preprocess(decode(content))
        try:
            pixels = decode_by_torchvision([as_tensor(content)])[0]
        except RuntimeError as error:
            _raise_unless_refused(error)
            return self._by_pil(content)
        return self._fit(upright(pixels, frame.orientation)) if _whole(pixels, frame) else self._by_pil(content)


class NvJpegDecoder(Decoder):
    """nvJPEG, by torchvision: files go to the GPU as they are, and are decoded and resized there.

    `decode_files` is what decodes a list of files, for tests.
    """

    name = "nvjpeg"
    light = True

    def __init__(
        self,
        preprocess: Preprocess,
        device: torch.device,
        decode_files: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ):
        super().__init__(preprocess)
        self._parts, self.device = preprocess, device
        self._decode_files = decode_files or (lambda files: decode_by_torchvision(files, device))
        self._streams = SimpleQueue[Any]()
        for _ in range(2):  # one decodes while the other resizes; torch keeps freed memory by stream
            self._streams.put(torch.cuda.Stream(device) if device.type == "cuda" else None)

    def load(self, content: bytes) -> Loaded:
        frame = plain_jpeg(content)
        if frame is None or self._parts.shrinks(frame.height, frame.width) > MOST_SHRINKING:
            return self.preprocess(decode(content))
        return Encoded(as_tensor(content), frame)

    @torch.inference_mode()
    def batch(self, pictures: list[Loaded], size: int) -> Tensor:
        with self._drained_stream() as drain:
            pixels = torch.zeros((size, 3, *self._parts.shape), dtype=torch.uint8, device=self.device)
            by_pil = {at: picture for at, picture in enumerate(pictures) if isinstance(picture, Tensor)}
            for group in _groups(pictures):
                drain()
                files = [file for _, file in group]
                alike: dict[torch.Size, dict[int, Tensor]] = {}  # by size: one call for many, as each waits for the GIL
                for (at, file), whole in zip(group, self._decoded(files), strict=True):
                    if whole is None:
                        by_pil[at] = self._refused_one(at, file)
                    else:
                        whole = upright(whole, file.frame.orientation)
                        alike.setdefault(whole.shape, {})[at] = whole
                for some in alike.values():
                    places = torch.tensor(list(some)).to(self.device, non_blocking=True)
                    pixels.index_copy_(0, places, self._parts.fit_in_float(torch.stack(list(some.values()))))
            if by_pil:
                pixels[list(by_pil)] = torch.stack(list(by_pil.values())).to(self.device)
            return pixels

    def _refused_one(self, at: int, file: Encoded) -> Tensor:
        try:
            return self._by_pil(bytes(file.content.numpy()))
        except ValueError as error:
            raise Broken(at, str(error)) from None

    @contextmanager
    def _drained_stream(self) -> Iterator[Callable[[], None]]:
        """A stream that is idle at the end, and a way to wait until it is.

        Before nvJPEG decodes it has to be: it writes at once, not when its turn in the stream has come, into memory
        that torch takes for free though kernels of the stream have yet to read it (pytorch/vision#9606).
        """
        stream = self._streams.get()
        try:
            if stream is None:
                yield lambda: None
                return
            with torch.cuda.stream(stream):
                yield stream.synchronize
            stream.synchronize()
        finally:
            self._streams.put(stream)

    def _decoded(self, files: list[Encoded]) -> list[Tensor | None]:
        """The pixels of some files as stored, uint8 [3, h, w]; None for one that nvJPEG refuses."""
        try:
            pictures = self._decode_files([file.content for file in files])
        except RuntimeError as error:
            _raise_unless_refused(error)
            # One spoils all. Alone, a picture that is not refused gets the bits that it has in a batch.
            return [None] if len(files) == 1 else [self._decoded([file])[0] for file in files]
        both = zip(pictures, files, strict=True)
        return [pixels if _whole(pixels, file.frame) else None for pixels, file in both]


def decoder_for(wanted: str, preprocess: Callable[[Image.Image], Tensor], device: torch.device) -> Decoder:
    """The decoder that vision.decoder names, for an encoder's `preprocess`; `auto` takes the fastest that works here.

    Raises UserError when the one that is named does not.
    """
    if wanted == "pil" or (wanted == "auto" and not isinstance(preprocess, Preprocess)):
        return Decoder(preprocess)
    if not isinstance(preprocess, Preprocess):
        raise UserError(
            f"vision.decoder {wanted}", "only PIL knows the transform of this encoder", "set it to auto or pil"
        )
    fastest = ["nvjpeg", "torchvision"] if device.type == "cuda" else ["torchvision"]
    for name in fastest if wanted == "auto" else [wanted]:
        fault = decoder_fault(name, device)
        if fault is None:
            return _make(name, preprocess, device)
        if wanted != "auto":
            raise UserError(f"vision.decoder {name}", fault, "set it to auto or pil")
        say_once(f"vision.decoder auto: not {name}, {fault}")
    return Decoder(preprocess)


def _make(name: str, preprocess: Preprocess, device: torch.device) -> Decoder:
    if name == "torchvision":
        return TorchvisionDecoder(preprocess)
    return NvJpegDecoder(preprocess, device if device.index is not None else torch.device("cuda", 0))


@cache
def decoder_fault(name: str, device: torch.device) -> str | None:
    """Why a decoder does not work here: it has to give of three little pictures what PIL gives."""
    if name == "nvjpeg" and device.type != "cuda":
        return "nvJPEG needs a CUDA GPU, and runtime.device gives none"
    trial = Preprocess((48, 64), "bicubic", 255.0, (0.0,) * 3, (1.0,) * 3, "trial")
    picture = Image.merge("RGB", [Image.radial_gradient("L"), *Image.linear_gradient("L").convert("RGB").split()[:2]])
    files = []
    for options in ({"subsampling": 0}, {"subsampling": 2}, {"progressive": True}):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90, **options)
        files.append(buffer.getvalue())
    try:
        decoder = _make(name, trial, device)
        found = decoder.batch([decoder.load(file) for file in files], len(files)).cpu()
    except (RuntimeError, ImportError) as error:  # a later torchvision is to leave decoding to torchcodec
        return f"{name} does not work here ({reason(error)})"
    wrong = (found.float() - torch.stack([trial(decode(file)) for file in files])).abs().mean((1, 2, 3)).max()
    return f"{name} gives other pictures than PIL here" if wrong > 4 or decoder.take_refused() else None


@cache
def say_once(what: str) -> None:
    """On stderr, once a process: not once a data set."""
    print(what, file=sys.stderr)


def padded(pictures: list[Tensor], size: int) -> Tensor:
    """[3, H, W] each to [size, 3, H, W], filled up with zeros: a batch of another size would give other bits."""
    return torch.stack([*pictures, *[torch.zeros_like(pictures[0])] * (size - len(pictures))])


def as_tensor(content: bytes) -> Tensor:
    """The bytes of a file as uint8 [bytes]."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def upright(pixels: Tensor, orientation: int) -> Tensor:
    """[3, h, w] as stored to how EXIF orientation 1 to 8 wants it shown."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    flips = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}
    return pixels.flip(flips[orientation]) if orientation in flips else pixels


def decode_by_torchvision(files: list[Tensor], device: torch.device | str = "cpu") -> list[Tensor]:
    """Files, uint8 [bytes] each, to uint8 [3, h, w] on the device; RuntimeError for one that does not decode."""
    from torchvision.io import ImageReadMode, decode_jpeg

    pictures: list[Tensor] = decode_jpeg(files, ImageReadMode.RGB, device=device)
    return pictures


def _whole(pixels: Tensor, frame: PlainJPEG) -> bool:
    return pixels.shape == (3, frame.height, frame.width)


# libjpeg's words for a file that ends too early or makes no sense come alone; nvJPEG's carry its status, of which these
# are about the file: invalid parameter, bad or unsupported JPEG, not implemented, incomplete.
_NVJPEG_STATUS = re.compile(r"Failed to [\w ]+: (\d+)")
_OF_THE_FILE = {"2", "3", "4", "9", "10"}


def _raise_unless_refused(error: RuntimeError) -> None:
    """Raise what is not about the picture, or its pixels would depend on how much memory was free."""
    status = _NVJPEG_STATUS.search(str(error))
    memory = isinstance(error, torch.OutOfMemoryError) or re.search("memory|allocat|CUDA error", str(error))
    if memory or (status and status[1] not in _OF_THE_FILE):
        raise error


def _groups(pictures: list[Loaded]) -> Iterator[list[tuple[int, Encoded]]]:
    """The files among pictures, with their places, in groups that fit PIXELS_AT_ONCE."""
    group: list[tuple[int, Encoded]] = []
    pixels = 0
    for at, file in enumerate(pictures):
        if not isinstance(file, Encoded):
            continue
        own = file.frame.width * file.frame.height
        if group and pixels + own > PIXELS_AT_ONCE:
            yield group
            group, pixels = [], 0
        group.append((at, file))
        pixels += own
    if group:
        yield group
