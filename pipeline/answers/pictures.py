"""Pictures as people have them."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from pipeline.media.pictures import read

Picture = str | Path | bytes | Image.Image
"""A picture: a file by its name, the bytes of one, or one that is open."""


def content_of(picture: Picture) -> bytes:
    """The bytes of a file; of an open picture those of a file without loss. Raises OSError where there is none."""
    if isinstance(picture, bytes):
        return picture
    if not isinstance(picture, Image.Image):
        return read(str(picture))
    file = io.BytesIO()
    picture.save(file, "TIFF" if picture.mode in ("CMYK", "YCbCr", "LAB", "HSV", "F") else "PNG")
    return file.getvalue()
