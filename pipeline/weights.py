"""Files of frozen models: what is wrong with one, found in milliseconds, and one line for what fails in loading it."""

from __future__ import annotations

import errno
import json
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import POINTER
from pipeline.needs import Fault

LONGEST_HEADER = 100_000_000  # bytes; what safetensors itself allows
AGAIN = "fetch it again"


@contextmanager
def told_in_one_line(tell: Callable[[Exception, str], UserError]) -> Iterator[None]:
    """Turns whatever a library raises over a foreign file into a UserError.

    `tell` makes it of the error and of what the error says, on one line. Our own words pass, and so does what is
    no fault of the files: memory that is exhausted and a disk that is full.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # libraries raise what they like
        import torch

        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or isinstance(error, torch.OutOfMemoryError):
            raise
        reason = textwrap.shorten(str(error), 240, placeholder=" ...") or type(error).__name__
        raise tell(error, reason) from error


def weights_fault(path: Path) -> Fault | None:
    """What keeps a file from being weights, with the remedy, or None: a file of another kind, or one cut off.

    The content of safetensors and of torch's zip files is held against their own tables; of torch's older pickles and
    of numpy's archives only the first bytes are looked at.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        return Fault(f"cannot be read ({error.strerror})")
    if path.is_dir():
        return Fault("is a folder", "name the file of weights in it")
    if not size:
        return Fault("is empty", AGAIN)
    if head.startswith(POINTER):
        return Fault("is a Git LFS pointer, not the weights", "run `git lfs pull` where it was cloned")
    if head.lstrip().startswith(b"<"):
        return Fault("is a web page, not weights", f"{AGAIN}, by a link to the file itself")
    if path.suffix == ".safetensors":
        return _safetensors_fault(path, size)
    if head[:4] == b"PK\x03\x04":
        return None if zipfile.is_zipfile(path) else Fault("is cut off", AGAIN)
    if head[:1] == b"\x80":
        return None
    if _safetensors_fault(path, size) is None:
        return Fault("has the content of a .safetensors file", "give it that suffix")
    return Fault("is no weights file that torch or safetensors wrote", AGAIN)


def _safetensors_fault(path: Path, size: int) -> Fault | None:
    try:
        names, needed = safetensors_table(path)
    except EOFError:
        return Fault("is cut off", AGAIN)
    except ValueError:
        return Fault("is no safetensors file", AGAIN)
    if size != needed:
        return Fault(f"has {size:,} bytes of {needed:,}", AGAIN)
    return None if names else Fault("holds no tensors")


def safetensors_table(path: Path) -> tuple[set[str], int]:
    """The names of the tensors in a safetensors file, and the bytes that a whole one has.

    Eight bytes of length, a JSON header, and tensors to exactly the end of the file. Raises EOFError when it ends
    within its header, ValueError when it is no such file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER or file.tell() < 8:
            raise ValueError("no header")
        header = file.read(length)
    if len(header) < length:
        raise EOFError
    try:
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        return set(tensors), 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (TypeError, LookupError, AttributeError):
        raise ValueError("no table of tensors") from None
