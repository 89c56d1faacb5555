"""The one exception a user is meant to read: what is wrong, where, and how to mend it."""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile("[\0-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class UserError(Exception):
    """A fault in the input or the set-up; its text is one line and is printed without a traceback."""

    def __str__(self) -> str:
        return readable(super().__str__())


def readable(text: object) -> str:
    r"""`text` for people: \xe9 for a byte of a file's name that is not UTF-8, \x1b for a control character, \ud83d for
    half a surrogate pair. What is left any UTF-8 file and terminal can hold; line ends stay."""
    return _UNPRINTABLE.sub(_escape, str(text))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    byte = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code  # as Python holds the bytes of a name
    return f"\\x{byte:02x}" if byte < 0x100 else f"\\u{byte:04x}"
