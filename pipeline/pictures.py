"""Reading and decoding pictures: the one place that knows what the manifest's image column means."""

from __future__ import annotations

import errno
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Formats of photographs; others (EPS, PDF) would start helper programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
NARROWEST = 1 / 200  # an encoder scales the shorter side to its own, and the longer one with it
_PART_OF_TAR = re.compile(r"(?P<tar>.+\.tar)#(?P<offset>\d+):(?P<size>\d+)")


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

    try:
        system, path = fsspec.url_to_fs(url)
        return bytes(system.cat_file(path, start=offset, end=offset + size))
    except Exception as error:  # each file system raises its own: OSError, aiohttp's, botocore's
        raise OSError(errno.EIO, f"{type(error).__name__}: {' '.join(str(error).split())}") from None


def decode(content: bytes) -> Image.Image:
    """Bytes of an image file to an upright RGB picture, 8 bits a channel, decoded to its last row.

    The content decides the format, not a name. EXIF orientation is applied, a damaged EXIF block ignored. Transparent
    parts are laid over white, as a browser does; 16 bits become 8; of an animation the first frame is taken.
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
            picture.load()
            return _rgb(_upright(picture))
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


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):  # PIL's own conversion would cut every value at 255
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise _Refused("32 bits a channel: black and white are anyone's guess; save it with 8 or 16")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
