"""Pictures with captions in a table of file names and texts: CSV, JSON Lines, or a JSON list of objects."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from pipeline.errors import UserError
from pipeline.sources import texts
from pipeline.sources.base import FolderSettings, FolderSource
from pipeline.sources.coco import group_of
from pipeline.sources.folders import LeftOut, unnamed
from pipeline.sources.rows import Found, Row, below, order

if TYPE_CHECKING:
    from rich.progress import Progress

# What people call the two columns, in any case and with hyphens or spaces; the first that is there is taken.
FILE = ("file", "file_name", "filename", "file_path", "filepath", "image", "image_path", "image_file", "img", "path")
TEXT = ("text", "texts", "caption", "captions", "description")
DELIMITERS = ",;\t|"
LINES, LIST = (".jsonl", ".ndjson"), ".json"
_NEEDED = f"it needs a column {' or '.join(FILE[:2])}, and {' or '.join(TEXT[::2])}"


class TableSettings(FolderSettings):
    table: str = Field("captions.csv", description="CSV, JSON Lines or JSON list of files and texts, relative to root")
    images: str = Field("", description="folder that the file names are relative to, relative to root")


class Table(FolderSource):
    """A folder of pictures, and a table that names them."""

    Settings, tasks = TableSettings, ("caption",)
    settings: TableSettings
    has_classes: ClassVar[bool] = False

    @property
    def lists(self) -> list[str]:
        return [self.settings.table]

    @property
    def images(self) -> str:
        return self.settings.images

    def read(self, progress: Progress) -> Found:
        return read(self.folder(), self.settings.table, self.settings.images, self.settings.count)

    def named(self) -> set[Path]:
        folder, found = self.folder() / self.settings.images, set[Path]()
        for _, entry in entries(self.settings.root / self.settings.table, []):
            with suppress(ValueError):
                found.add(folder / _parsed(entry, folder)[0])
        return found

    def pictures(self) -> int | None:
        found = super().pictures()
        return min(found, self.settings.count or found) if found else None


def read(root: Path, table: str, images: str, count: int | None) -> Found:
    """One row per file of root/table, with all its texts, and its group where there is such a column (rows.Row).

    At most `count` files; an id is a file's name as the table has it. Left out are lines without a file or a text, or
    with more cells than the header, and pictures that no line names. Raises UserError when the table is damaged or
    lacks a column, or no line can be used.
    """
    path, captions, groups = root / table, defaultdict[str, list[str]](list), dict[str, str]()
    left_out: list[LeftOut] = []
    for name, entry in entries(path, left_out):
        try:
            file, said, group = _parsed(entry, root / images)
        except ValueError as fault:
            left_out.append(LeftOut(name, str(fault)))
            continue
        if said and set(said) <= set(captions[file]):
            left_out.append(LeftOut(name, "a repetition of an earlier line", id=file))
        elif not said:
            left_out.append(LeftOut(name, "with an empty text", id=file))
        captions[file] += [text for text in said if text not in captions[file]]
        if group:
            groups[file] = group
    if not captions:
        why = f"{left_out[0].name}: {left_out[0].reason}" if left_out else "empty"
        raise UserError(path, f"no line can be used ({why})", _NEEDED)
    left_out += unnamed(root / images, [root / images / file for file in captions], f"named by no line of {table}")
    return Found([_row(root / images, one, captions, groups) for one in sorted(captions, key=order)[:count]], left_out)


def _row(folder: Path, file: str, captions: Mapping[str, list[str]], groups: Mapping[str, str]) -> Row:
    reason = None if captions[file] else "no caption"
    return Row(file, folder / file, captions[file], label=None, quarantine=reason, group=groups.get(file))


def columns_of(entry: Iterable[str]) -> tuple[str | None, str | None]:
    """Which of some names of columns are the file's and the text's."""
    known = {name.strip().casefold().replace("-", "_").replace(" ", "_"): name for name in entry}
    file, text = (next((known[name] for name in names if name in known), None) for names in (FILE, TEXT))
    return file, text


def header_of(line: str) -> tuple[list[str], str] | None:
    """The names of the columns in the first line of a CSV file, and what parts them; None where they say nothing."""
    for delimiter in DELIMITERS:
        try:
            names = next(csv.reader([line], delimiter=delimiter), [])
        except csv.Error:  # no table: other line ends, or a line without end
            return None
        if all(columns_of(names)):
            return names, delimiter
    return None


def _parsed(entry: Any, folder: Path) -> tuple[str, list[str], str | None]:
    """File, texts and group of one line; ValueError with what is wrong."""
    if not isinstance(entry, dict):
        raise ValueError("no object, so without a file and a text")
    file, text = columns_of(entry)
    if file is None or text is None:
        raise ValueError(f"has no {'file' if file is None else 'text'}, only {', '.join(map(str, entry)) or 'nothing'}")
    if not isinstance(entry[file], str) or not entry[file].strip():
        raise ValueError(f"has {entry[file]!r} for {file!r}; it must be a file's name")
    said = entry[text] if isinstance(entry[text], list) else [entry[text]]
    if not all(one is None or isinstance(one, str) for one in said):
        raise ValueError(f"has a {type(entry[text]).__name__} for {text!r}; it must be a text or a list of texts")
    below(folder, name := entry[file].strip().replace("\\", "/"))
    return PurePosixPath(name).as_posix(), [one.strip() for one in said if one and one.strip()], _group(entry)


def _group(entry: dict[str, Any]) -> str | None:
    return next((group_of(value) for key, value in entry.items() if key.strip().casefold() == "group"), None)


def entries(path: Path, left_out: list[LeftOut]) -> Iterator[tuple[str, Any]]:
    """Name and content of each line, or of each entry of a list; lines that are none go to `left_out`."""
    try:
        content = path.read_bytes()
        kind = path.suffix.lower()
        if kind == LIST:
            return iter(_of_list(path, texts.parse_json(content)))
        text = texts.decode(content)
    except OSError as error:
        raise UserError(path, error.strerror, "it has to be a table of files and texts") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}", f"not valid JSON: {error.msg}") from None
    except ValueError as error:
        raise UserError(path, error, _NEEDED) from None
    return _of_lines(path.name, text, left_out) if kind in LINES else _of_csv(path, text, left_out)


def _of_list(path: Path, content: Any) -> list[tuple[str, Any]]:
    if not isinstance(content, list):
        raise UserError(path, f"expected a list of objects, found a {type(content).__name__}", "or use source: coco")
    return [(f"{path.name}[{number}]", entry) for number, entry in enumerate(content)]


def _of_lines(name: str, text: str, left_out: list[LeftOut]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"{name}:{number}", texts.parse_json(line.encode())
        except ValueError as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else error
            left_out.append(LeftOut(f"{name}:{number}", f"not valid JSON: {why}"))


def _of_csv(path: Path, text: str, left_out: list[LeftOut]) -> Iterator[tuple[str, Any]]:
    first = text.partition("\n")[0].strip()
    found = header_of(first)
    if found is None:
        raise UserError(f"{path}:1", f"no header that is understood: {texts.one_line(first[:120])!r}", _NEEDED)
    names, delimiter = found
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        next(reader)
        for cells in reader:
            name = f"{path.name}:{reader.line_num}"
            if len(cells) > len(names):
                why = f"has {len(cells)} cells, the header {len(names)}; put a text that holds {delimiter!r} in quotes"
                left_out.append(LeftOut(name, why))
            elif cells:
                yield name, dict(zip(names, [*cells, *[""] * (len(names) - len(cells))], strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}", f"not valid CSV: {error}", "mend that line") from None
