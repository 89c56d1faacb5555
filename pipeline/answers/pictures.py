"""Pictures as people have them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.errors import readable
from pipeline.media.pictures import read
from pipeline.sources.folders import no_picture

Picture = str | Path | bytes | Image.Image | np.ndarray
"""A picture: a file by its name, the bytes of one, one that is open, or an array of uint8 [H, W, 3], RGB."""


def content_of(picture: Picture) -> bytes:
    """The bytes of a file; of an open picture or array those of a file without loss.

    Raises OSError where there is none, TypeError where it is something else.
    """
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | os.PathLike):
        return read(name_of(picture))
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.shape[2:] != (3,):
            raise TypeError(f"picture: an array has to be uint8 [H, W, 3], not {picture.dtype} {list(picture.shape)}")
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        kinds = "a file's name, its bytes, an open PIL.Image or a NumPy array of uint8 [H, W, 3]"
        raise TypeError(f"picture: {kinds}, not {type(picture).__name__}")
    file = io.BytesIO()
    picture.save(file, "TIFF" if picture.mode in ("CMYK", "YCbCr", "LAB", "HSV", "F") else "PNG")
    return file.getvalue()


def digest_of(picture: Picture) -> str | None:
    """SHA-256 of these bytes, in hexadecimal digits; None where a file cannot be read. Raises TypeError as above."""
    try:
        return hashlib.sha256(content_of(picture)).hexdigest()
    except OSError:
        return None


def name_of(picture: str | os.PathLike[str]) -> str:
    """A file's name, of which ~ is the home folder if no file is so called."""
    name = str(picture)
    return name if os.path.exists(name) else os.path.expanduser(name)  # noqa: PTH110, PTH111 - Path merges // of URLs


@contextlib.contextmanager
def explained(picture: Picture) -> Iterator[None]:
    """What fails is a ValueError, of a file with the reason for which one in a folder is left out."""
    try:
        yield
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    except ValueError as error:
        reason = no_picture(Path(name_of(picture))) if isinstance(picture, str | os.PathLike) else None
        raise ValueError(reason or str(error)) from None


@contextlib.contextmanager
def naming(picture: Picture) -> Iterator[None]:
    """A ValueError about a picture is raised with its name, where it has one."""
    try:
        yield
    except ValueError as error:
        name = f"{picture}: " if isinstance(picture, str | os.PathLike) else ""
        raise ValueError(readable(f"{name}{error}")) from None
