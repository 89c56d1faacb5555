"""Decoders: each gives PIL's pictures, closely where it decodes itself and exactly where it does not."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pipeline.encoders import lite0
from pipeline.errors import UserError
from pipeline.media import decoding
from pipeline.media.decoding import Broken, Decoder, Encoded, NvJpegDecoder, TorchvisionDecoder, decoder_for
from pipeline.media.pictures import PlainJPEG, decode, plain_jpeg
from pipeline.media.preprocess import Preprocess, in_parts, normalise

CPU = torch.device("cpu")
LITE0 = lite0.preprocess()
COCA = Preprocess(224, "bicubic", 255.0, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), "coca", crop=(224, 224))
ORIENTATION = 0x0112
pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Tag data larger")


def photo(width: int = 320, height: int = 240, seed: int = 0) -> Image.Image:
    """Blurred colours with edges and some grain, as a photograph has them."""
    generator = np.random.default_rng(seed)
    colours = Image.fromarray(generator.integers(0, 256, (6, 8, 3), np.uint8)).resize((width, height), 3)
    colours.paste((200, 30, 40), (width // 4, height // 3, width // 2, height // 2))
    grain = np.asarray(colours) + generator.normal(0, 4, (height, width, 3))
    return Image.fromarray(grain.clip(0, 255).astype(np.uint8))


def jpeg(picture: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (picture or photo()).save(buffer, options.pop("form", "JPEG"), **{"quality": 90, **options})
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return jpeg(exif=exif)


def patched(content: bytes, marker: int, change: Callable[[bytearray], None]) -> bytes:
    """A JPEG whose first segment of this marker is changed."""
    at = content.index(bytes([0xFF, marker]))
    segment = bytearray(content[at:])
    change(segment)
    return content[:at] + bytes(segment)


def with_segment(marker: int, body: bytes) -> bytes:
    return b"\xff\xd8" + bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body + jpeg()[2:]


XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
PLAIN = {
    **{f"orientation {value}": turned(value) for value in range(1, 9)},
    **{f"subsampling {value}": jpeg(subsampling=value) for value in (0, 1, 2)},
    "progressive": jpeg(progressive=True),
    "restart markers": jpeg(restart_marker_rows=1),
    "odd size": jpeg(photo(301, 227)),
    "long": jpeg(photo(900, 60)),
    "tiny": jpeg(photo(9, 8)),
    "damaged EXIF": jpeg(exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "EXIF that is none": jpeg(exif=b"Exif\0\0garbage"),
    "turned by XMP": with_segment(0xE1, XMP),
    "two pictures": jpeg(form="MPO", save_all=True, append_images=[photo(seed=1)]),
    "fill bytes": b"\xff\xd8\xff\xff" + jpeg()[2:],
    "rubbish after it": jpeg() + b"\0" * 99,
}
NOT_PLAIN = {
    "grey": jpeg(photo().convert("L")),
    "CMYK": jpeg(photo().convert("CMYK")),
    "RGB": jpeg(keep_rgb=True),
    "colour at a quarter": patched(jpeg(subsampling=1), 0xC0, lambda frame: frame.__setitem__(11, 0x41)),
    "PNG": jpeg(form="PNG"),
    "WebP": jpeg(form="WEBP"),
    "transparent": jpeg(photo().convert("RGBA"), form="PNG"),
}


def by_torchvision(
    files: list[Tensor], real: Callable[[list[Tensor]], list[Tensor]] = decoding.decode_by_torchvision
) -> Any:
    return real(files)


def nvjpeg(preprocess: Preprocess, decode_files: Callable[[list[Tensor]], list[Tensor]] = by_torchvision) -> Decoder:
    """All of the GPU's path but the decoding of the files."""
    return NvJpegDecoder(preprocess, CPU, decode_files)


def pixels_of(decoder: Decoder, *contents: bytes) -> Tensor:
    return decoder.batch([decoder.load(content) for content in contents], len(contents))


def by_pil(preprocess: Preprocess, *contents: bytes) -> Tensor:
    return torch.stack([preprocess(decode(content)) for content in contents])


DECODERS = [TorchvisionDecoder, nvjpeg]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_jpegs(name: str) -> None:
    stored = Image.open(io.BytesIO(PLAIN[name]))
    orientation = stored.getexif().get(ORIENTATION, 1)
    assert plain_jpeg(PLAIN[name]) == PlainJPEG(stored.width, stored.height, orientation)


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_no_plain_jpeg(name: str) -> None:
    assert plain_jpeg(NOT_PLAIN[name]) is None


def test_frames_that_decoders_understand_differently_are_not_plain() -> None:
    content = jpeg()
    for code in (0xC1, 0xC3, 0xC9, 0xCA):  # extended, lossless, arithmetic
        assert plain_jpeg(patched(content, 0xC0, lambda frame, code=code: frame.__setitem__(1, code))) is None
    assert plain_jpeg(patched(content, 0xC0, lambda frame: frame.__setitem__(4, 12))) is None, "12 bits"
    assert plain_jpeg(patched(content, 0xC0, lambda frame: frame.__setitem__(slice(5, 7), b"\0\0"))) is None
    assert plain_jpeg(patched(content, 0xDA, lambda scan: scan.__setitem__(4, 1))) is None, "a scan for each colour"
    assert plain_jpeg(content.replace(b"\xff\xc4", b"\xff\xfe")) is None, "without Huffman tables"


def test_exif_that_pil_cannot_write_anew_is_not_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """ImageOps.exif_transpose fails with it, so that the picture is left as it is stored."""
    monkeypatch.setattr(Image.Exif, "tobytes", lambda self, offset=8: 1 / 0)
    assert plain_jpeg(PLAIN["orientation 6"]) is None and decode(PLAIN["orientation 6"]).size == (320, 240)
    assert plain_jpeg(PLAIN["orientation 1"]) == PlainJPEG(320, 240, 1)


def test_no_bytes_make_it_fail() -> None:
    generator, content = np.random.default_rng(0), turned(6)
    for end in range(0, 700, 7):
        assert plain_jpeg(content[:end]) is None or end > content.index(b"\xff\xda")
    for _ in range(300):
        damaged = bytearray(content)
        for at in generator.integers(0, 700, 3):
            damaged[at] = generator.integers(256)
        plain_jpeg(bytes(damaged))


def lite0_itself(image: Image.Image) -> Tensor:
    from torchvision.transforms.v2 import functional as F

    side = min(image.size)
    square = F.center_crop(image, [side, side]).resize((224, 224), Image.Resampling.BICUBIC)
    return (F.pil_to_tensor(square).float() - 127) / 128


def of_open_clip(**options: Any) -> Callable[[Image.Image], Tensor]:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(**options), is_train=False)


def of_timm(model: str) -> Callable[[Image.Image], Tensor]:
    from timm import get_pretrained_cfg
    from timm.data import create_transform, resolve_data_config

    return create_transform(**resolve_data_config({}, pretrained_cfg=get_pretrained_cfg(model).to_dict()))


@pytest.mark.parametrize("size", [(3, 2), (224, 224), (320, 240), (241, 321), (97, 401), (200, 1)])
def test_a_transform_taken_apart_gives_its_bits(size: tuple[int, int]) -> None:
    transforms = [of_open_clip(size=224), of_open_clip(size=(224, 160), resize_mode="squash"), of_timm("resnet10t")]
    for whole, parts in [(lite0_itself, LITE0), *((whole, in_parts(whole)) for whole in transforms)]:
        assert parts is not None
        pixels = parts(photo(*size))
        assert pixels.dtype == torch.uint8
        assert torch.equal(normalise(pixels[None], parts.constants(CPU))[0], whole(photo(*size)))


def test_a_transform_of_other_parts_is_not_taken_apart() -> None:
    assert in_parts(of_open_clip(size=224, resize_mode="longest")) is None
    assert in_parts(of_timm("volo_d4_448")) is None, "its crop is larger than its size: it adds a border"
    assert in_parts(lambda image: torch.zeros(3, 8, 8)) is None


@pytest.mark.parametrize("preprocess", [LITE0, COCA], ids=["lite0", "coca"])
@pytest.mark.parametrize("make", DECODERS)
@pytest.mark.parametrize("name", PLAIN)
def test_plain_jpegs_come_close_to_pil(name: str, make: Any, preprocess: Preprocess) -> None:
    off = (pixels_of(make(preprocess), PLAIN[name]).float() - by_pil(preprocess, PLAIN[name])).abs()
    assert off.mean() < 0.05 and off.max() <= 3


@pytest.mark.parametrize("make", DECODERS)
@pytest.mark.parametrize("name", NOT_PLAIN)
def test_other_pictures_are_exactly_those_of_pil(name: str, make: Any) -> None:
    assert torch.equal(pixels_of(make(LITE0), NOT_PLAIN[name]), by_pil(LITE0, NOT_PLAIN[name]))


def test_a_large_picture_is_resized_as_by_pil() -> None:
    content = jpeg(photo(1800, 1200))
    for make in DECODERS:
        off = (pixels_of(make(COCA), content).float() - by_pil(COCA, content)).abs()
        assert off.mean() < 0.1 and off.max() <= 3
    assert isinstance(nvjpeg(COCA).load(content), Encoded)
    tiny = Preprocess((32, 32), "bicubic", 255.0, (0.5,) * 3, (0.5,) * 3, "tiny")
    assert isinstance(nvjpeg(tiny).load(content), Tensor), "further than a GPU's shared memory allows"


@pytest.mark.parametrize("make", [Decoder, *DECODERS])
@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=str)
def test_truncated_pictures_do_not_decode(make: Any, options: dict[str, Any]) -> None:
    whole, cut = jpeg(**options), jpeg(**options)[:-800]
    decoder = make(COCA)
    with pytest.raises(ValueError, match="does not decode"):
        pixels_of(decoder, whole, cut)
    if make is nvjpeg:
        with pytest.raises(Broken) as fault:
            pixels_of(decoder, whole, cut)
        assert fault.value.row == 1


def test_a_picture_has_its_bits_whatever_is_in_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [*PLAIN.values(), *NOT_PLAIN.values()]
    alone = torch.cat([pixels_of(nvjpeg(COCA), content) for content in contents])
    assert torch.equal(pixels_of(nvjpeg(COCA), *contents), alone)
    monkeypatch.setattr(decoding, "PIXELS_AT_ONCE", 200_000)
    calls = []

    def counted(files: list[Tensor]) -> list[Tensor]:
        calls.append(len(files))
        return by_torchvision(files)

    assert torch.equal(pixels_of(nvjpeg(COCA, counted), *contents[::-1]), alone.flip(0))
    assert sum(calls) == len(PLAIN) and len(calls) > 5, "in several calls, by the number of pixels"
    decoder = nvjpeg(COCA)
    filled_up = decoder.batch([decoder.load(contents[0])], 4)
    assert torch.equal(filled_up[0], alone[0]) and not filled_up[1:].any()


def refusing(refused: bytes, message: str) -> Callable[[list[Tensor]], list[Tensor]]:
    def decode_files(files: list[Tensor]) -> list[Tensor]:
        if any(bytes(file.numpy()) == refused for file in files):
            raise RuntimeError(message)
        return by_torchvision(files)

    return decode_files


@pytest.mark.parametrize("message", ["Failed to decode batch: 4", "Unknown chroma subsampling", "Image is incomplete"])
def test_what_a_decoder_refuses_is_pils_and_counted(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [jpeg(photo(seed=seed)) for seed in range(3)]
    decode_files = refusing(contents[1], f"Error while decoding JPEG images: {message}\nException raised from f")
    monkeypatch.setattr(decoding, "decode_by_torchvision", lambda files, device="cpu": decode_files(files))
    for decoder, usual in (
        (nvjpeg(COCA, decode_files), nvjpeg(COCA)),
        (TorchvisionDecoder(COCA), TorchvisionDecoder(COCA)),
    ):
        found = pixels_of(decoder, *contents)
        assert torch.equal(found[1:2], by_pil(COCA, contents[1]))
        assert torch.equal(found[::2], pixels_of(usual, *contents[::2]))
        assert decoder.take_refused() == 1 and decoder.take_refused() == 0


@pytest.mark.parametrize("message", ["CUDA out of memory.", "Failed to decode batch: 5", "CUDA error: misaligned"])
def test_what_is_not_the_pictures_fault_is_raised(message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        pixels_of(nvjpeg(COCA, refusing(jpeg(), message)), jpeg())


def test_auto_takes_what_works_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert decoder_for("auto", COCA, CPU).name == "torchvision"
    assert decoder_for("pil", COCA, CPU).name == "pil"
    assert decoder_for("auto", lambda image: torch.zeros(3, 8, 8), CPU).name == "pil"
    with pytest.raises(UserError, match="only PIL knows the transform"):
        decoder_for("torchvision", lambda image: torch.zeros(3, 8, 8), CPU)
    with pytest.raises(UserError, match=r"nvJPEG needs a CUDA GPU.*; set it to auto or pil"):
        decoder_for("nvjpeg", COCA, CPU)

    def nothing(files: list[Tensor], device: Any = "cpu") -> list[Tensor]:
        return [torch.zeros_like(pixels) for pixels in real(files)]

    def fails(files: list[Tensor], device: Any = "cpu") -> list[Tensor]:
        raise RuntimeError("Couldn't load the image extension.\nmore")

    real = decoding.decode_by_torchvision
    for broken, words in ((nothing, "gives other pictures than PIL here"), (fails, "torchvision gives other")):
        decoding.decoder_fault.cache_clear()
        decoding.say_once.cache_clear()
        monkeypatch.setattr(decoding, "decode_by_torchvision", broken)
        assert decoder_for("auto", COCA, CPU).name == "pil"
        assert words in capsys.readouterr().err
    with pytest.raises(UserError, match=r"vision.decoder torchvision: .*; set it to auto or pil"):
        decoder_for("torchvision", COCA, CPU)
    decoding.decoder_fault.cache_clear()


def test_upright_is_what_pil_makes_of_it() -> None:
    stored = photo(7, 5)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        buffer = io.BytesIO()
        stored.save(buffer, "PNG", exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(buffer)))
        found = decoding.upright(torch.from_numpy(np.array(stored)).permute(2, 0, 1), orientation)
        assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@on_gpu
def test_nvjpeg_gives_the_same_bits_whatever_is_in_the_batch() -> None:
    decoder = decoder_for("nvjpeg", COCA, torch.device("cuda"))
    contents = [*PLAIN.values(), *NOT_PLAIN.values(), *(jpeg(photo(640, 480, seed)) for seed in range(40))]
    loaded = [decoder.load(content) for content in contents]
    whole = decoder.batch(loaded, len(loaded))
    for _ in range(5):
        alone = torch.cat([decoder.batch([picture], 1) for picture in loaded])
        assert torch.equal(alone, whole)
        backwards = decoder.batch(loaded[::-1], len(loaded) + 3)
        assert torch.equal(backwards[: len(loaded)].flip(0), whole) and not backwards[len(loaded) :].any()


@on_gpu
@pytest.mark.parametrize("name", [name for name in (*PLAIN, *NOT_PLAIN) if name != "tiny"])  # it has 20 colours in all
def test_nvjpeg_comes_close_to_pil(name: str) -> None:
    content = {**PLAIN, **NOT_PLAIN}[name]
    decoder = decoder_for("nvjpeg", COCA, torch.device("cuda"))
    off = (pixels_of(decoder, content).cpu().float() - by_pil(COCA, content)).abs()
    assert off.mean() < 3, "it makes up colour between the pixels that have it otherwise than libjpeg-turbo"


@on_gpu
def test_nvjpeg_beside_work_on_the_gpu() -> None:
    """It writes at once; what it writes into must not be waited for by kernels (pytorch/vision#9606)."""
    from concurrent.futures import ThreadPoolExecutor

    decoder = decoder_for("nvjpeg", COCA, torch.device("cuda"))
    contents = [jpeg(photo(640, 480, seed)) for seed in range(32)]
    expected = pixels_of(decoder, *contents)
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda _: torch.equal(pixels_of(decoder, *contents), expected), range(60))
    assert all(found)


@on_gpu
def test_pixels_are_normalised_on_a_gpu_to_the_bits_of_a_cpu() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).expand(2, 3, 4, 256)
    for preprocess in (LITE0, COCA):
        there = normalise(pixels.cuda(), preprocess.constants(torch.device("cuda"))).cpu()
        assert torch.equal(there, normalise(pixels, preprocess.constants(CPU)))


@on_gpu
def test_a_large_picture_on_the_gpu() -> None:
    decoder, content = decoder_for("nvjpeg", COCA, torch.device("cuda")), jpeg(photo(7100, 7100))
    assert isinstance(decoder.load(content), Encoded), "shrunk 31.7 times"
    assert (pixels_of(decoder, content).cpu().float() - by_pil(COCA, content)).abs().mean() < 3
