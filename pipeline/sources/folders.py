"""What is in a folder of pictures: links are followed, no file is taken twice, and whatever is left out says why."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import UserError, readable
from pipeline.files import is_utf8

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
# What systems and programs leave beside pictures; names that begin with a dot are hidden anyway.
DROPPINGS = frozenset(
    {
        "__macosx", "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin",
        "system volume information", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "__pycache__",
    }
)  # fmt: skip
# Pictures by their first bytes, and yet copies, unfinished downloads, or raw photos, which begin with a small preview.
COPIES = ("~", ".bak", ".orig", ".old", "_original", ".tmp", ".part", ".partial", ".crdownload", ".download")
RAW = (".nef", ".nrw", ".cr2", ".dng", ".arw", ".sr2", ".srf", ".orf", ".pef", ".rw2", ".srw", ".3fr", ".erf", ".kdc")
OTHERS = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".svg", ".cr3", ".raf", *RAW)
NOT_UTF8 = "its name is not UTF-8; rename it (convmv -f latin1 -t utf8)"
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)


@dataclass(frozen=True)
class LeftOut:
    """Something of a data set that is not used; `id` is that of its picture, where it is part of one.

    `files` is the number of files in a folder that is left out without a look at them; `owner` the data set that it
    is part of instead.
    """

    name: str
    reason: str
    hidden: bool = False
    id: str = ""
    files: int = 0
    owner: str = ""

    def __str__(self) -> str:
        return f"{self.name} with {self.files} files" if self.files else self.name


@dataclass(frozen=True)
class Tree:
    """Files below a folder by their path from there, with /; its folders; and what is not taken, named from outside."""

    root: Path
    files: dict[str, Path] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def leave(self, key: str, reason: str, hidden: bool = False, files: int = 0) -> None:
        self.left_out.append(LeftOut(str(self.root / key), reason, hidden, files=files))


def pictures_below(root: Path, any_name: bool = False, without: Collection[str] = ()) -> Tree:
    """The pictures among the files below a folder: by name, or else by their first bytes. Raises like walk.

    Names that are not UTF-8 are left out, unless `any_name`: no manifest can hold them.
    """
    tree = walk(root, without)
    for key, path in list(tree.files.items()):
        reason = None if path.suffix.lower() in SUFFIXES else no_picture(path)
        reason = reason or (None if any_name or is_utf8(key) else NOT_UTF8)
        if reason:
            tree.leave(key, reason)
            del tree.files[key]
    return tree


def walk(root: Path, without: Collection[str] = ()) -> Tree:
    """Every file below a folder but for some folders right in it, also through links, but each file and folder once.

    Left out are what is hidden (is_hidden), links that lead nowhere, to what is taken already or to a folder above,
    folders that can't be read, and what is no plain file. A file that is reached both
    directly and by a link is taken directly. Raises UserError when `root` itself can't be read.
    """
    walk = _Walk(root, without)
    walk.enter("", walk.top)
    while walk.linked_folders:
        walk.follow(walk.linked_folders.popleft())
    walk.take_linked_files()
    tree = walk.tree
    tree.folders.sort()
    return Tree(root, dict(sorted(tree.files.items())), tree.folders, sorted(tree.left_out, key=lambda one: one.name))


class _Walk:
    def __init__(self, root: Path, without: Collection[str]):
        self.tree, self.without = Tree(root), without
        self.top = os.path.realpath(root)
        self.entered: dict[str, str] = {}  # the real path of a folder -> its key
        self.linked_folders: deque[str] = deque()
        self.linked_files: list[str] = []

    def enter(self, key: str, real: str) -> None:
        """Take a folder and those in it; what is linked comes later, so that the direct way to a file wins."""
        pending = [(key, real)]
        while pending:
            key, real = pending.pop()
            if real in self.entered:
                taken = self.tree.root / self.entered[real]
                self.tree.leave(key, f"a link to a folder that is taken already, {readable(taken)}")
                continue
            self.entered[real] = key
            if key:
                self.tree.folders.append(key)
            for entry in self._entries(key):
                child = f"{key}/{entry.name}" if key else entry.name
                if child in self.without:
                    continue
                if self._sort(child, entry):
                    pending.append((child, f"{real.rstrip('/')}/{entry.name}"))

    def _entries(self, key: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.tree.root / key) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not key:
                raise UserError(self.tree.root, f"can't be read: {error.strerror}", "mend that") from None
            self.tree.leave(key, f"can't be read: {error.strerror}")
            return []

    def _sort(self, key: str, entry: os.DirEntry[str]) -> bool:
        """Whether it is a folder to enter; what it is else is noted."""
        folder, link = entry.is_dir(follow_symlinks=False), entry.is_symlink()
        if is_hidden(entry.name):
            self.tree.leave(key, "hidden", hidden=True, files=_count(entry.path) if folder else 0)
        elif folder:
            return True
        elif entry.is_file(follow_symlinks=False):
            self.tree.files[key] = self.tree.root / key
        elif link and (fault := _dangling(entry)):
            self.tree.leave(key, fault)
        elif link and entry.is_dir():
            self.linked_folders.append(key)
        elif link and entry.is_file():
            self.linked_files.append(key)
        else:
            self.tree.leave(key, "no plain file")
        return False

    def follow(self, key: str) -> None:
        real = os.path.realpath(self.tree.root / key)
        if self.top != real and self.top.startswith(f"{real.rstrip('/')}/"):
            self.tree.leave(key, "a link to a folder above this one")
        else:
            self.enter(key, real)

    def take_linked_files(self) -> None:
        if not self.linked_files:
            return
        real_of = {key: real for real, key in self.entered.items()}
        taken = {f"{real_of[key.rpartition('/')[0]]}/{key.rpartition('/')[2]}": key for key in self.tree.files}
        for key in sorted(self.linked_files):
            path = self.tree.root / key
            first = taken.setdefault(os.path.realpath(path), key)
            if first == key:
                self.tree.files[key] = path
            else:
                self.tree.leave(key, f"a link to a picture that is taken already, {readable(self.tree.root / first)}")


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or a dropping of a system: .DS_Store, __MACOSX, @eaDir."""
    return name.startswith(".") or name.casefold() in DROPPINGS


def _count(folder: str) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def _dangling(link: os.DirEntry[str]) -> str | None:
    try:
        link.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return "a link that leads nowhere"
        return f"can't be read: {error.strerror}"
    return None


def unnamed(folder: Path, used: Iterable[Path], reason: str) -> list[LeftOut]:
    """The pictures below a folder that are not in `used`, which names files below it, perhaps by a linked one."""
    if not folder.is_dir():
        return []
    found, named = pictures_below(folder, any_name=True).files.values(), set(used)
    if rest := set(found) - named:
        real = {os.path.realpath(path) for path in named.difference(found)}
        rest = {path for path in rest if os.path.realpath(path) not in real}
    return [LeftOut(str(path), reason) for path in sorted(rest)]


def no_picture(path: Path) -> str | None:
    """Why a file whose name says nothing is no picture; None if it begins as one."""
    try:
        with path.open("rb") as file:
            head = file.read(32)
    except OSError as error:
        return f"can't be read: {error.strerror}"
    name = path.name.lower()
    if name.endswith(OTHERS) and not (begins_as_picture(head) and not name.endswith(RAW)):
        return "of a format that is not read here; save it as JPEG or PNG"
    if not begins_as_picture(head):
        return "no picture by its content" if head else "an empty file"
    return "a copy or an unfinished download, by its name" if name.endswith(COPIES) else None


def begins_as_picture(head: bytes) -> bool:
    """Whether the first 32 bytes of a file are those of JPEG, PNG, WebP, GIF, BMP or TIFF."""
    if head.startswith(b"BM"):
        return int.from_bytes(head[14:18], "little") in _BMP_HEADERS
    if head.startswith(b"RIFF"):
        return head[8:12] == b"WEBP"
    return head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"))
