"""Files here and elsewhere: written whole or not at all, and whatever is wrong with them is one line."""

from __future__ import annotations

import errno
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import UserError

_DENIED = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.ELOOP}
)
_REMEDY = (
    "make it yours or writable for you (chmod, chown), move away what is in the way, or work in a project folder of "
    "your own"
)
POINTER = b"version https://git-lfs"


class Damaged(Exception):
    """A file is not what its name says; the text says what it is instead."""


def refuse_pointer(path: Path) -> None:
    """Raises Damaged when a file is empty, or only the pointer that Git LFS leaves in place of its content."""
    with path.open("rb") as file:
        start = file.read(len(POINTER))
    if start == POINTER:
        raise Damaged(f"{path.name}: a Git LFS pointer, not the file itself")
    if not start:
        raise Damaged(f"{path.name}: empty")


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can hold it: not if a file's name has other bytes, or half of a surrogate pair is in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def temporary_name(name: str) -> str:
    """A hidden name of this process alone, also among machines that share the folder."""
    return f".{name}.{platform.node()}.{os.getpid()}.{secrets.token_hex(4)}"


@contextmanager
def atomically(path: Path) -> Iterator[BinaryIO]:
    """Write to a temporary name, fsync, rename: the file is there whole or not at all.

    Processes that make the same file at once do not meet, and the last one's bytes stay. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name(path.name))
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder, to be filled under a temporary name: it gets its own when the body is done, or is gone.

    An empty folder of that name is replaced. Raises FileExistsError when there is one with files, as another process
    that made the same was first, and OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name(path.name))
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


_Fault = Callable[[str], Exception]


@contextmanager
def foreign_faults(fault: _Fault, missing: _Fault | None = None) -> Iterator[None]:
    """Whatever a file system of fsspec raises (OSError, aiohttp's, botocore's), as `fault` of `<its type>: <its text>`.

    `missing` makes of its text the error for a file that is not there. UserError passes, and so does a full disk.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        text = " ".join(str(error).split()) or "no reason given"
        if missing and isinstance(error, FileNotFoundError):
            raise missing(text) from None
        raise fault(f"{type(error).__name__}: {text}") from None


def check_writable(folder: Path) -> None:
    """Make a folder. Raises UserError when that fails or nothing can be written there: before the work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (probe := folder / temporary_name("writable")).touch()
        probe.unlink()
    except OSError as error:
        raise refusal(error, folder) from None


def denied(error: BaseException) -> bool:
    """Whether the system refused to read or write a file, or something else lies in its place.

    pyarrow, safetensors and torch say so in their texts only.
    """
    if isinstance(error, OSError) and error.errno in _DENIED:
        return True
    return "Permission denied" in str(error) or "Read-only file system" in str(error)


def refusal(error: BaseException, path: Path | str | None = None) -> UserError:
    """What to tell of an error that is `denied`; `path` is what was tried, else the error says."""
    named = path or getattr(error, "filename", None)
    if named is None:
        return UserError("", " ".join(str(error).split()), _REMEDY)
    path = Path(os.fsdecode(named))
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    present = next((above for above in (path, *path.parents) if os.path.lexists(above)), Path())
    return UserError(path, reason, f"{present.absolute()} belongs to {_owner(present)}: {_REMEDY}")


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except (KeyError, OSError):  # a number without a name, a link that leads nowhere
        return "another user"
