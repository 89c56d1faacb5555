"""Which data sets are in a folder: class folders, a file of captions, or both; by what is there, not by its names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.sources import table
from pipeline.sources.folders import SUFFIXES, is_hidden, pictures_below
from pipeline.sources.imagefolder import PARTS
from pipeline.sources.texts import by_reason, decode, listed, one_line, parse_json

# Folders that are called so only because something has to be their name.
GENERIC = {"images", "image", "imgs", "img", "pictures", "photos", "pics", "jpg", "jpegs", "jpegimages", "data"}
TABLES, JSON = (".csv", ".tsv", ".txt", *table.LINES), ".json"
LOOKED_AT = 200  # names of a file of captions that are looked for
SIDECARS = 50  # so many texts in a folder are one for each picture, and no table
LONGEST = 200  # characters of a reason
LARGEST = 2**30  # bytes of a JSON file that is read whole
NEARLY = 0.9  # share of a folder's pictures that have captions, from which it is a folder of these
ALONE = "the only class folder, and so nothing to tell apart"
OTHERS = (
    "put the pictures of other kinds into folders beside it, or write captions.csv with the columns file and text there"
)
REMEDY = (
    "put the pictures into one folder per class, or write captions.csv with the columns file and text beside them; "
    "docs/own-data.md has the layouts"
)


@dataclass(frozen=True)
class DataSet:
    """A data set that was recognised: its section of a profile, its pictures' names, and what to say of it."""

    section: dict[str, Any]
    names: list[str]
    said: str
    classes: tuple[str, ...] = ()
    has_parts: bool = False  # whether its folders give all three parts


@dataclass(frozen=True)
class Layout:
    """The data sets in a folder, by their names in the profile; and files that were recognised and are not used."""

    sets: dict[str, DataSet]
    unused: list[str] = field(default_factory=list)
    seen: str = field(default_factory=lambda: datetime.now().isoformat(" ", "milliseconds"))


def recognise(folder: Path) -> Layout:
    """What is in a folder. Raises UserError when there is nothing to learn from."""
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise UserError(folder, what, "give the path of the folder that your pictures are in")
    faults: list[str] = []
    found = sorted(_files_of_captions(folder, faults), key=lambda one: (-len(one.names), str(one.section)))
    captions = found[0] if found else None
    classes = _classes(folder, captions)
    unused = [one.said for one in found[1:]] + faults
    if classes is not None and len(classes.classes) == 1:
        only = classes.section["root"] / classes.classes[0]
        if captions is None:
            raise UserError(only, ALONE, OTHERS)
        unused.append(f"{only}: {ALONE}")
        classes = None
    sets = {"captions": captions, "classes": classes}
    known = {name: one for name, one in sets.items() if one is not None}
    if not known:
        raise UserError(folder, _nothing_in(folder, faults), REMEDY)
    return Layout(known, unused)


def _nothing_in(folder: Path, faults: list[str]) -> str:
    """Why there is nothing to learn from in a folder, whose tables have these faults."""
    if count := sum(1 for _ in _pictures(folder)):
        return "; ".join([f"{count} pictures, and nothing that says what they show", *faults[:3]])
    left_out = [(str(one), one.reason) for one in pictures_below(folder, any_name=True).left_out if not one.hidden]
    return f"no picture in it; {by_reason(left_out)}" if left_out else "no picture in it"


def _files_of_captions(folder: Path, faults: list[str]) -> Iterator[DataSet]:
    """The files of captions in a folder and in those right below it, with the pictures they name.

    Why others are none, which seem meant to be, goes to `faults`.
    """
    for place in [folder, *_folders(folder)]:
        kinds = {JSON, *TABLES}
        files = sorted(path for path in place.iterdir() if path.suffix.lower() in kinds and not is_hidden(path.name))
        for path in files if len(files) < SIDECARS else []:
            try:
                names, source = _named_by(path)
                images = _where(names, path.parent, folder)
            except (OSError, ValueError, UserError) as fault:
                reason = fault.strerror if isinstance(fault, OSError) else fault
                if "caption" in path.stem.lower() or (place == folder and path.suffix.lower() != ".txt"):
                    faults.append(f"{path}: no captions ({one_line(reason)[:LONGEST]})")
                continue
            key = "captions" if source == "coco" else "table"
            relative = {key: path.relative_to(folder), "images": images.relative_to(folder)}
            texts = {key: "" if value == Path() else value.as_posix() for key, value in relative.items()}
            section = {"task": "caption", "source": source, "root": folder, **texts}
            kind = "COCO captions" if source == "coco" else "a table of files and texts"
            yield DataSet(section, names, f"{path}: {kind}, {len(names)} pictures, in {images}")


def _named_by(path: Path) -> tuple[list[str], str]:
    """The pictures that a file of captions names, and its source. Raises OSError, ValueError with why it is none."""
    suffix, size = path.suffix.lower(), path.stat().st_size
    if suffix == JSON and size >= LARGEST:
        raise ValueError(f"larger than {LARGEST >> 30} GiB")
    content = path.read_bytes()
    if suffix == JSON:
        value = parse_json(content)
        names, source = (_of_coco(value), "coco") if isinstance(value, dict) else (_of_entries(value), "table")
    elif suffix in table.LINES:
        lines = (line for line in decode(content).split("\n") if line.strip())
        names, source = _of_entries(map(_parsed, lines)), "table"
    else:
        first = decode(content).partition("\n")[0].strip()
        if not first:
            raise ValueError("empty" if not content.strip() else "its first line is empty")
        if not table.header_of(first):
            raise ValueError(f"its first line, {first[:60]!r}, has no columns {table.FILE[0]} and {table.TEXT[0]}")
        names, source = _of_csv(path), "table"
    if not names:
        raise ValueError("no entry has a file and a text")
    return names, source


def _parsed(line: str) -> Any:
    try:
        return parse_json(line.encode())
    except ValueError:
        return None


def _of_coco(content: dict[str, Any]) -> list[str]:
    images, said = content.get("images"), content.get("annotations")
    if not isinstance(images, list) or not isinstance(said, list):
        return []
    if not any(isinstance(entry, dict) and "caption" in entry for entry in said[:LOOKED_AT]):
        return []
    names = (entry.get("file_name") for entry in images if isinstance(entry, dict))
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def _of_entries(entries: Any) -> list[str]:
    found: dict[str, None] = {}
    for entry in entries if not isinstance(entries, str | int | float | None) else []:
        file, text = table.columns_of(entry) if isinstance(entry, dict) else (None, None)
        if file and text and isinstance(entry[file], str) and (name := entry[file].strip()):
            found[name.replace("\\", "/")] = None
    return list(found)


def _of_csv(path: Path) -> list[str]:
    return _of_entries(entry for _, entry in table.entries(path, []))


def _where(names: list[str], beside: Path, folder: Path) -> Path:
    """The folder that most of some names are relative to. Raises ValueError where none of them is there."""
    places = dict.fromkeys([beside, folder, *_folders(beside), *_folders(folder)])
    places |= dict.fromkeys(inner for place in list(places) for inner in _folders(place))
    few = names[:: max(1, len(names) // LOOKED_AT)]
    counts = {place: sum(os.path.isfile(place / name) for name in few) for place in places}  # noqa: PTH113 - any name
    best = max(counts, key=lambda place: counts[place])
    if not counts[best]:
        raise ValueError(f"no file that it names is there; the first is {names[0]}")
    return best


def _classes(folder: Path, captions: DataSet | None) -> DataSet | None:
    """The class folders, which may lie in a folder of their own; None where there are none."""
    images = folder / captions.section["images"] if captions else None
    for root in dict.fromkeys([folder, *([images] if images else []), *_folders(folder)]):
        if (root / "meta" / "classes.txt").is_file() and (root / "images").is_dir():
            section = {"task": "classify", "source": "food101", "root": root}
            names = [name for name, _ in _pictures(root / "images")]
            inside = tuple(one.name for one in _folders(root / "images"))
            return DataSet(section, names, f"{root}: the layout of Food-101", inside)
        if found := _class_folders(root, captions, images):
            return found
    return None


def _class_folders(root: Path, captions: DataSet | None, images: Path | None) -> DataSet | None:
    """`root` as a folder of class folders; `images` is what the pictures with captions are named from."""
    inside = [one for one in _folders(root) if any(_pictures(one))]
    parts = bool(inside) and all(one.name.casefold() in PARTS for one in inside)
    without = _captioned(inside, captions.names, images) if captions and images and not parts else []
    inside = [one for one in inside if one not in without]
    deep = [one for one in inside if any(any(_pictures(inner)) for inner in _folders(one))]
    if parts and not deep:
        return None  # train and test of pictures alone: no classes
    if len(inside) == 1 and not parts and (deep or inside[0].name.casefold() in GENERIC):
        return None  # one folder around the others, or of pictures alone
    if not inside:
        return None
    classes = sorted({inner.name for one in inside for inner in _folders(one)} if parts else {x.name for x in inside})
    names = [f"{one.name}/{name}" for one in inside for name, _ in _pictures(one)]
    has_parts = parts and len({PARTS[one.name.casefold()] for one in inside}) == 3
    how = f", in the parts {listed([one.name for one in inside])}" if parts else ""
    but = f", without {listed([one.name for one in without])}, where the captions are" if without else ""
    said = f"{root}: {len(classes)} class folders ({listed(classes, 5)}){how}{but}"
    section = {"task": "classify", "source": "imagefolder", "root": root}
    section |= {"without": [one.name for one in without]} if without else {}
    return DataSet(section, names, said, tuple(classes), has_parts)


def _captioned(inside: list[Path], names: list[str], images: Path) -> list[Path]:
    """The folders beside others that are no classes: where captions name pictures from, or the one they name alone."""
    around = [one for one in inside if images.is_relative_to(one)]
    if around:
        return around
    named = {images / name for name in names}
    have = {one: [path in named for _, path in _pictures(one)] for one in inside}
    some = [one for one in inside if any(have[one])]
    return some if len(inside) > 1 == len(some) and sum(have[some[0]]) >= NEARLY * len(have[some[0]]) else []


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


def _pictures(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files below a folder that are pictures by their names: path from there, and path."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(files):
            path = Path(place, name)
            if path.suffix.lower() in SUFFIXES and not is_hidden(name):
                yield path.relative_to(folder).as_posix(), path
