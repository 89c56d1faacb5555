"""Decoding pictures: the one place that opens image files."""

from __future__ import annotations

import io

from PIL import Image, ImageOps, UnidentifiedImageError

# Formats of photographs; others (EPS, PDF) would start helper programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def decode(content: bytes) -> Image.Image:
    """Bytes of an image file to an upright RGB picture, decoded to its last row.

    Raises ValueError with the reason when they are not a whole picture of sane size.
    """
    if not content:
        raise ValueError("empty file")
    limit = Image.MAX_IMAGE_PIXELS or float("inf")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            if picture.width * picture.height > limit:
                raise ValueError(f"too large: {picture.width} x {picture.height} pixels")
            picture.load()
            return ImageOps.exif_transpose(picture).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError("not a picture") from None
    except Image.DecompressionBombError:
        raise ValueError(f"too large: more than {limit} pixels") from None
    except Exception as error:  # PIL's decoders raise whatever the damage leads them to: OSError, SyntaxError, struct
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(reason if reason.startswith("too large") else f"does not decode: {reason}") from None
