"""The one exception a user is meant to read: what is wrong, where, and how to mend it."""

from __future__ import annotations

import re
from collections.abc import Sequence

_UNPRINTABLE = re.compile("[\0-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class UserError(Exception):
    """A fault in the input or the set-up; its text is one line and is printed without a traceback.

    `where` is a file, with its line where it has one, a key of params.yaml, a data set or a stage, or empty where
    `what` says it; `remedy` is what to do, or empty.
    """

    def __init__(self, where: object, what: object, remedy: object = ""):
        super().__init__(where, what, remedy)
        self.where, self.what, self.remedy = str(where), str(what), str(remedy)

    def __str__(self) -> str:
        place, mend = f"{self.where}: " if self.where else "", f"; {self.remedy}" if self.remedy else ""
        return readable(f"{place}{self.what}{mend}")


class UserErrors(UserError):
    """Several faults of one input, a line each."""

    def __init__(self, faults: Sequence[UserError]):
        first = faults[0]
        super().__init__(first.where, first.what, first.remedy)
        self.faults = list(faults)

    def __reduce__(self) -> tuple[type[UserErrors], tuple[Sequence[UserError]]]:
        return type(self), (self.faults,)

    def __str__(self) -> str:
        return "\n".join(map(str, self.faults))


def reason(error: BaseException) -> str:
    """What another package's exception says, in one line; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def readable(text: object) -> str:
    r"""`text` for people: \xe9 for a byte of a file's name that is not UTF-8, \x1b for a control character, \ud83d for
    half a surrogate pair. What is left any UTF-8 file and terminal can hold; line ends stay."""
    return _UNPRINTABLE.sub(_escape, str(text))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    byte = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code  # as Python holds the bytes of a name
    return f"\\x{byte:02x}" if byte < 0x100 else f"\\u{byte:04x}"
