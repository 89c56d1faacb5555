"""Pictures as they come: every kind of pixel arrives as upright 8-bit RGB, and what is no picture says why."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from pipeline.config import Vision
from pipeline.media.pictures import decode, part_of_tar, read


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def pixel(content: bytes, place: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    picture = decode(content)
    assert picture.mode == "RGB"
    value = picture.getpixel(place)
    assert isinstance(value, tuple)
    return value


def halves(mode: str, left: Any, right: Any) -> Image.Image:
    """16 x 8, the left half of one colour, the right half of another."""
    picture = Image.new(mode, (16, 8), left)
    picture.paste(right, (8, 0, 16, 8))
    return picture


def noise(side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, form: str) -> None:
    # What each value asks for, as numpy has it: [rows, columns] of the stored picture to those of the upright one.
    upright = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90,
    }[orientation]  # fmt: skip
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :16], stored[:8, 16:], stored[8:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    found = np.asarray(decode(encoded(Image.fromarray(stored), form, exif=exif, **options)))
    assert found.shape == upright(stored).shape
    assert np.abs(found.astype(int) - upright(stored)).mean() < 3


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_does_not_cost_the_picture(exif: bytes, form: str) -> None:
    assert decode(encoded(Image.new("RGB", (8, 4)), form, exif=exif)).size == (8, 4)


def test_cmyk() -> None:
    inks = halves("CMYK", (0, 255, 255, 0), (255, 0, 0, 0))  # red, cyan
    for form in ("JPEG", "TIFF"):
        content = encoded(inks, form)
        assert pixel(content, (1, 1)) == pytest.approx((255, 0, 0), abs=8)
        assert pixel(content, (14, 1)) == pytest.approx((0, 255, 255), abs=8)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_cut(form: str) -> None:
    grey = Image.fromarray(np.array([[0, 256, 0x7FFF, 0xFFFF]], np.uint16).repeat(4, axis=0))
    content = encoded(grey, form)
    assert [pixel(content, (x, 0))[0] for x in range(4)] == [0, 1, 0x7F, 0xFF]


def grey_png(values: list[int], sbit: int | None = None) -> bytes:
    """One row of 16-bit grey, with its number of significant bits where the file says it."""
    extra = b"" if sbit is None else chunk(b"sBIT", bytes([sbit]))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", len(values), 1, 16, 0, 0, 0, 0))
    row = zlib.compress(b"\0" + struct.pack(f">{len(values)}H", *values))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", row) + chunk(b"IEND", b"")


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def greys(content: bytes) -> list[int]:
    return np.asarray(decode(content))[0, :, 0].tolist()


def test_12_bits_that_the_file_declares_are_scaled() -> None:
    twelve = [0, 1, 2047, 4095]
    assert greys(grey_png(twelve, sbit=12)) == [0, 0, 127, 255]
    assert greys(grey_png(twelve)) == [0, 0, 7, 15], "undeclared: as they are"
    stretched = [value << 4 | value >> 8 for value in twelve]  # as the standard has it
    assert greys(grey_png(stretched, sbit=12)) == [0, 0, 127, 255]
    dark = [value << 4 for value in (0, 8, 100, 255)]
    assert greys(grey_png(dark, sbit=12)) == [0, 0, 6, 15], "stretched and dark stays dark"
    tiff = Image.fromarray(np.array([twelve], np.uint16))
    assert greys(encoded(tiff, "TIFF", tiffinfo={281: 4095})) == [0, 0, 127, 255]
    assert greys(encoded(tiff, "TIFF", tiffinfo={281: 4000})) == [0, 0, 7, 15], "a largest value is no number of bits"
    assert greys(encoded(tiff, "TIFF")) == [0, 0, 7, 15]
    turned = Image.Exif()
    turned[0x0112] = 3
    assert greys(encoded(Image.fromarray(np.array([twelve], np.uint16)), "PNG", exif=turned)) == [15, 7, 0, 0]


def test_packed_12_bit_tiff() -> None:
    """Pillow writes none, so it is put together here: two pixels, 4095 and 2048, in three bytes."""
    tags = {
        256: (3, 2),
        257: (3, 1),
        258: (3, 12),
        259: (3, 1),
        262: (3, 1),
        273: (4, 8),
        277: (3, 1),
        278: (3, 1),
        279: (4, 3),
    }
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in tags.items())
    content = b"II*\0" + struct.pack("<I", 12) + b"\xff\xf8\x00\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    assert greys(content) == [255, 128]


def test_the_brightest_value_of_16_bits_is_told() -> None:
    assert decode(grey_png([0, 4095])).info == {"brightest": 4095}
    assert decode(grey_png([0, 4095], sbit=12)).info == {"brightest": 4095 << 4}
    assert decode(encoded(Image.new("L", (4, 4), 9))).info == {}


def test_16_bit_colour_png() -> None:
    """Pillow writes none, so it is put together here: one red and one green pixel, RGB, 16 bits a channel."""
    row = b"\0" + struct.pack(">6H", 0xFFFF, 0, 0, 0, 0x8000, 0)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    assert [pixel(content), pixel(content, (1, 0))] == [(255, 0, 0), (0, 128, 0)]
    assert decode(content).info == {"brightest": 65535}


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="32 bits a channel"):
        decode(encoded(Image.new(mode, (4, 4)), "TIFF"))


def test_palette_grey_and_black_and_white() -> None:
    colours = halves("RGB", (255, 0, 0), (0, 0, 255)).quantize(4)
    assert colours.mode == "P"
    for form in ("PNG", "GIF", "BMP", "TIFF"):
        assert [pixel(encoded(colours, form), (x, 0)) for x in (1, 14)] == [(255, 0, 0), (0, 0, 255)]
    assert pixel(encoded(Image.new("L", (4, 4), 77))) == (77, 77, 77)
    assert pixel(encoded(Image.new("1", (4, 4), 1))) == (255, 255, 255)


def test_transparency_lies_over_white() -> None:
    hidden = halves("RGBA", (255, 0, 0, 255), (0, 0, 0, 0))
    for content in (encoded(hidden), encoded(hidden, "WEBP", lossless=True), encoded(hidden, "TIFF")):
        assert [pixel(content, (x, 0)) for x in (1, 14)] == [(255, 0, 0), (255, 255, 255)]
    assert pixel(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 128)))) == pytest.approx((127, 127, 127), abs=1)
    assert pixel(encoded(Image.new("LA", (4, 4), (0, 0)))) == (255, 255, 255)
    palette = halves("RGB", (255, 0, 0), (0, 0, 255)).quantize(4)
    blue = palette.getpixel((14, 0))
    for content in (encoded(palette, transparency=blue), encoded(palette, "GIF", transparency=blue)):
        assert [pixel(content, (x, 0)) for x in (1, 14)] == [(255, 0, 0), (255, 255, 255)]
    assert pixel(encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))) == (255, 255, 255)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(form: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    content = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    assert getattr(Image.open(io.BytesIO(content)), "n_frames", 1) == 3
    assert pixel(content) == pytest.approx((255, 0, 0), abs=8)


def test_progressive_jpeg_gives_the_same_pixels() -> None:
    plain, progressive = (encoded(noise(), "JPEG", progressive=value) for value in (False, True))
    assert plain != progressive
    assert decode(plain).tobytes() == decode(progressive).tobytes()


@pytest.mark.parametrize("options", [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})], ids=str)
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_truncated_pictures_do_not_decode(options: tuple[str, dict[str, Any]], kept: float) -> None:
    content = encoded(noise(), options[0], **options[1])
    with pytest.raises(ValueError, match=r"does not decode|not a picture"):
        decode(content[: int(len(content) * kept)])


def test_what_is_no_picture_says_so() -> None:
    with pytest.raises(ValueError, match=r"^empty file$"):
        decode(b"")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    for content in (b"\0", b"<html>not found</html>", b"%PDF-1.7\n", postscript, bytes(1000), b"\x1f\x8b" * 99):
        with pytest.raises(ValueError, match=r"^not a picture$"):
            decode(content)


@pytest.mark.filterwarnings("ignore:Image size")
def test_a_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = bytearray(encoded(Image.new("L", (8, 8))))
    for width, height in ((30_000, 30_000), (12_000, 12_000)):  # beyond twice PIL's limit, and between once and twice
        header = b"IHDR" + struct.pack(">II", width, height) + bomb[24:29]
        bomb[12:33] = header + struct.pack(">I", zlib.crc32(header))
        with monkeypatch.context() as patch:
            patch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
            with pytest.raises(ValueError, match=r"^too large: "):
                decode(bytes(bomb))


def test_one_pixel_passes_an_encoder_and_a_hair_does_not() -> None:
    from pipeline.encoders.vision import load_vision_encoder

    encoder = load_vision_encoder(Vision(encoder="timm", model="resnet10t", pretrained="random", dtype="float32"))
    pixels = encoder.preprocess(decode(encoded(Image.new("RGB", (1, 1), (9, 9, 9)))))
    assert encoder.encode(pixels[None]).isfinite().all()
    with pytest.raises(ValueError, match="too narrow: 1 x 5000 pixels"):
        decode(encoded(Image.new("RGB", (1, 5000))))
    assert decode(encoded(Image.new("RGB", (10, 2000)))).size == (10, 2000)


def test_reading_files_and_parts_of_tars(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    (tmp_path / "b #1:2.jpg").write_bytes(b"plain")
    assert read(part_of_tar(f"{tmp_path}/a.tar", 3, 4)) == b"3456"
    assert read(part_of_tar(f"file://{tmp_path}/a.tar", 3, 4)) == b"3456"
    assert read(f"{tmp_path}/b #1:2.jpg") == b"plain"
    for scheme in ("", "file://"):
        with pytest.raises(OSError, match="2 bytes came instead of 5"):
            read(part_of_tar(f"{scheme}{tmp_path}/a.tar", 8, 5))
        with pytest.raises(OSError):
            read(part_of_tar(f"{scheme}{tmp_path}/none.tar", 0, 1))
