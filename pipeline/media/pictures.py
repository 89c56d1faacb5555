"""Reading and decoding pictures: the one place that knows what the manifest's image column means."""

from __future__ import annotations

import errno
import io
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.files import foreign_faults

BITS_PER_SAMPLE, MAX_SAMPLE_VALUE = 258, 281  # tags of TIFF
# Formats of photographs; others (EPS, PDF) would start helper programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
NARROWEST = 1 / 200  # an encoder scales the shorter side to its own, and the longer one with it
_PART_OF_TAR = re.compile(r"(?P<tar>.+\.tar)#(?P<offset>\d+):(?P<size>\d+)")


@dataclass(frozen=True)
class PlainJPEG:
    """The frame of a JPEG that every decoder understands alike: its size as stored, its EXIF orientation, 1 to 8."""

    width: int
    height: int
    orientation: int


class _Refused(ValueError):
    """A picture that could be decoded, and is not wanted."""


def part_of_tar(tar: str, offset: int, size: int) -> str:
    """The name of `size` bytes at `offset` of a tar (path or fsspec URL) that ends in .tar; `read` gives its bytes."""
    return f"{tar}#{offset}:{size}"


def read(image: str) -> bytes:
    """The bytes of a picture by its name in the manifest: a file, or a part of a local or remote tar.

    Raises OSError, with the reason in strerror, when the file is not there, is too short or cannot be reached.
    """
    part = _PART_OF_TAR.fullmatch(image)
    if not part:
        if not Path(image).is_file():  # nor is a device or a pipe one
            raise FileNotFoundError(errno.ENOENT, "no such file")
        return Path(image).read_bytes()
    offset, size = int(part["offset"]), int(part["size"])
    if "://" in part["tar"]:
        content = _read_remote(part["tar"], offset, size)
    else:
        with Path(part["tar"]).open("rb") as file:
            file.seek(offset)
            content = file.read(size)
    if len(content) != size:
        reason = f"{len(content)} bytes came instead of {size}: the tar is cut off, or its server ignores ranges"
        raise OSError(errno.ENODATA, reason)
    return content


def _read_remote(url: str, offset: int, size: int) -> bytes:
    import fsspec

    with foreign_faults(partial(OSError, errno.EIO)):
        system, path = fsspec.url_to_fs(url)
        return bytes(system.cat_file(path, start=offset, end=offset + size))


def decode(content: bytes) -> Image.Image:
    """Bytes of an image file to an upright RGB picture, 8 bits a channel, decoded to its last row.

    The content decides the format, not a name. EXIF orientation is applied, a damaged EXIF block ignored. Transparent
    parts are laid over white, as a browser does; 16 bits become 8; of an animation the first frame is taken. Of 16 bits
    a channel, `info` of the result has "brightest", the largest value of 65535 (after scaling as the file declares).
    Raises ValueError with the reason when they are not a whole picture of sane size; a size is judged by its header.
    """
    if not content:
        raise ValueError("empty file")
    limit = Image.MAX_IMAGE_PIXELS or float("inf")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > limit:
                raise _Refused(f"too large: {width} x {height} pixels")
            if min(width, height) < NARROWEST * max(width, height):
                raise _Refused(f"too narrow: {width} x {height} pixels")
            bits = _declared_bits(picture, content)
            picture.load()
            return _rgb(_upright(picture), bits, stretched=picture.format == "PNG")
    except _Refused:
        raise
    except UnidentifiedImageError:
        raise ValueError("not a picture") from None
    except Image.DecompressionBombError:
        raise ValueError(f"too large: more than {limit} pixels") from None
    except Exception as error:  # PIL's decoders raise whatever the damage leads them to: OSError, SyntaxError, struct
        raise ValueError(f"does not decode: {' '.join(str(error).split()) or type(error).__name__}") from None


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # whatever a damaged EXIF block leads to; the pixels are whole
        return picture


def _declared_bits(picture: Image.Image, content: bytes) -> int:
    """Bits a channel by the file's own word: those of its numbers, which may be fewer than those of their places."""
    if picture.format == "TIFF":
        tags: Any = getattr(picture, "tag_v2", {})
        bits, largest = (int(np.max(np.asarray(tags.get(tag) or 0))) for tag in (BITS_PER_SAMPLE, MAX_SAMPLE_VALUE))
        whole = 0xFF < largest < 0xFFFF and not largest & (largest + 1)  # 2^n - 1: of other values it says nothing
        return largest.bit_length() if bits == 16 and whole else bits
    if picture.format != "PNG" or content[24] != 16:
        return 8
    place = 8  # after the signature: length, name, body, checksum of each chunk
    while content[place + 4 : place + 8] not in (b"IDAT", b""):
        if content[place + 4 : place + 8] == b"sBIT":
            return min(max(content[place + 8], 8), 16)
        place += 12 + int.from_bytes(content[place : place + 4], "big")
    return 16


def _rgb(picture: Image.Image, bits: int, stretched: bool) -> Image.Image:
    if picture.mode.startswith("I;16"):  # PIL's own conversion would cut every value at 255
        values = _to_16_bits(np.asarray(picture), bits, stretched)
        rgb = Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
        rgb.info["brightest"] = int(values.max())
        return rgb
    if picture.mode in ("I", "F"):
        raise _Refused("32 bits a channel: black and white are anyone's guess; save it with 8 or 16")
    rgb = picture.convert("RGB")
    brightest = int(np.asarray(rgb).max()) * 257 if bits > 8 else None  # PIL has cut the values to 8 bits
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        rgb = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    rgb.info = {} if brightest is None else {"brightest": brightest}
    return rgb


def _to_16_bits(values: np.ndarray, bits: int, stretched: bool) -> np.ndarray:
    """Values of 16 bits from values of `bits`, [rows, columns].

    A PNG that follows its standard has them stretched to 16 already; then none of them has anything in its last bits
    while the first are empty.
    """
    if bits >= 16 or values.max() >> bits or (stretched and not (values & (2 ** (16 - bits) - 1)).any()):
        return values
    return values << (16 - bits)


def plain_jpeg(content: bytes) -> PlainJPEG | None:
    """The frame of a plain JPEG: baseline or progressive, 8 bits, YCbCr with halved or whole colour; else None.

    Decided by the file's own bytes alone. What is not plain (CMYK, RGB or grey JPEGs, arithmetic coding, other formats,
    EXIF blocks that PIL stumbles over) is for `decode`. Whether the rest of the file is whole is not looked at.
    """
    if content[:2] != b"\xff\xd8":
        return None
    at, frame, progressive, seen = 2, None, False, set[bytes]()
    while content[at : at + 1] == b"\xff":
        while content[at + 1 : at + 2] == b"\xff":  # any number of them may come before a marker
            at += 1
        marker, size = content[at + 1 : at + 2], int.from_bytes(content[at + 2 : at + 4], "big")
        body = content[at + 4 : at + 2 + size]
        if size < 2 or len(body) != size - 2:
            return None
        if marker == _START_OF_SCAN:
            together = progressive or body[:1] == b"\x03"  # all three components in one scan
            if frame is None or not together or not seen >= _TABLES:
                return None
            orientation = _orientation(content) if _EXIF_OR_XMP in seen else 1
            return PlainJPEG(*frame, orientation) if orientation else None
        if marker in _FRAMES:
            if frame is not None or marker not in (b"\xc0", b"\xc2") or not _COLOUR.fullmatch(body):
                return None
            progressive = marker == b"\xc2"
            frame = int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big")
            if 0 in frame:
                return None
        elif marker == b"\xee" and body[:5] == b"Adobe" and body[11:12] != b"\x01":  # its pixels are not YCbCr
            return None
        seen.add(marker)
        at += 2 + size
    return None


_START_OF_SCAN, _EXIF_OR_XMP = b"\xda", b"\xe1"
_TABLES = {b"\xdb", b"\xc4"}  # frames of motion JPEG leave the latter out
_FRAMES = {bytes([code]) for code in range(0xC0, 0xD0)} - {b"\xc4", b"\xc8", b"\xcc"}  # these are tables
# 8 bits, height, width, components 1 to 3: brightness at full, colour at its own, half its width, height or both.
_COLOUR = re.compile(rb"\x08.{4}\x03\x01[\x11\x21\x12\x22].\x02\x11.\x03\x11.", re.DOTALL)


def _orientation(content: bytes) -> int | None:
    """By PIL, so that `decode` turns the picture the same way; None when PIL stumbles: that is no plain picture."""
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as picture:
            exif = picture.getexif()
            found = exif.get(0x0112, 1)
            if found not in range(2, 9):
                return 1
            exif.tobytes()  # ImageOps.exif_transpose writes it anew, and fails with that
            return int(found)
    except Exception:  # whatever a damaged EXIF block leads to
        return None
