"""Files and their names: written whole or not at all, and shown without what no terminal or table can hold."""

from __future__ import annotations

import errno
import os
import platform
import secrets
from collections.abc import Iterator
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


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can hold it: not if a file's name has other bytes, or half of a surrogate pair is in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def atomically(path: Path) -> Iterator[BinaryIO]:
    """Write to a temporary name, fsync, rename: the file is there whole or not at all.

    The temporary name is of this process alone, also among machines that share the folder: processes that make the same
    file at once do not meet, and the last one's bytes stay. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Make a folder. Raises UserError when that fails or nothing can be written there: before the work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (probe := folder / f".{platform.node()}.{os.getpid()}.{secrets.token_hex(4)}").touch()
        probe.unlink()
    except OSError as error:
        raise UserError(refusal(error, folder)) from None


def denied(error: BaseException) -> bool:
    """Whether the system refused to read or write a file, or something else lies in its place.

    pyarrow, safetensors and torch say so in their texts only.
    """
    if isinstance(error, OSError) and error.errno in _DENIED:
        return True
    return "Permission denied" in str(error) or "Read-only file system" in str(error)


def refusal(error: BaseException, path: Path | str | None = None) -> str:
    """The line for an error that is `denied`: what, why, the remedy. `path` is what was tried, else the error says."""
    named = path or getattr(error, "filename", None)
    if named is None:
        return f"{' '.join(str(error).split())}; {_REMEDY}"
    path = Path(os.fsdecode(named))
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    present = next((above for above in (path, *path.parents) if os.path.lexists(above)), Path())
    return f"{path}: {reason}; {present.absolute()} belongs to {_owner(present)}: {_REMEDY}"


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except (KeyError, OSError):  # a number without a name, a link that leads nowhere
        return "another user"
