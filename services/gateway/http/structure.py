"""Bounds on what a JSON body would become, checked on its bytes: an empty list of three bytes is 72 once decoded.

The checks are passes in C over slices of a few tens of kilobytes, and the first limit that is exceeded ends them, so a
body costs what its length costs, whatever is in it, and no pass keeps other threads waiting.
"""

from collections.abc import Iterator
from itertools import accumulate

import msgspec

from shared.errors import Failure, RequestError, invalid

MAX_CONTAINERS = 1 << 16  # lists and objects
MAX_VALUES = 1 << 18  # keys and values of any kind
MAX_DIGITS = 1 << 20  # of all numbers: those of thousands of digits cost time with the square of their length
MAX_DEPTH = 128

_SLICE = 64 << 10
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_NOT_DIGITS = bytes(set(range(256)) - set(b"0123456789"))
_STEP = [(byte in b"[{") - (byte in b"]}") for byte in range(256)]
_DATA = b"data:"


def check_structure(body: bytes, max_text: int) -> None:
    """Check what a body has outside its strings, how deeply it is nested, and how much of it is text.

    All is text but uploads: data URLs longer than a slice, whose characters take one byte each when decoded. Text is
    dearer, since one emoji makes every character of its string take four.

    Raises:
        RequestError: 413 or 400, naming the limit.
    """
    containers = values = digits = 0
    brackets = []
    for outside, text in _slices(body):
        containers += outside.count(b"[") + outside.count(b"{")
        values += outside.count(b",") + outside.count(b":")
        digits += len(outside.translate(None, _NOT_DIGITS))
        if containers > MAX_CONTAINERS:
            raise _too_large(f"more than {MAX_CONTAINERS} lists and objects")
        if containers + values > MAX_VALUES:
            raise _too_large(f"more than {MAX_VALUES} keys and values")
        if digits > MAX_DIGITS:
            raise _too_large(f"numbers of more than {MAX_DIGITS} digits in all")
        if text > max_text:
            raise _too_large(f"more than {max_text} bytes of text, which is all but its uploads in data URLs")
        brackets.append(outside.translate(None, _NOT_BRACKETS))
    if containers > MAX_DEPTH and max(accumulate(map(_STEP.__getitem__, b"".join(brackets)))) > MAX_DEPTH:
        raise invalid(f"The request body is nested too deeply: more than {MAX_DEPTH} levels.", None, "invalid_json")


class _LongString(msgspec.Struct):
    """String that goes on beyond a slice."""

    head: bytes = b""
    length: int = 0
    narrow: bool = True  # every character takes one byte when decoded

    def add(self, part: bytes) -> None:
        self.head += part[: len(_DATA) - len(self.head)]
        self.length += len(part)
        self.narrow = self.narrow and part.isascii() and part.count(b"\\u") == part.count(b"\\u00")

    def upload_bytes(self) -> int:
        """Return its length if it is an upload, as far as is known."""
        return self.length if self.narrow and _DATA.startswith(self.head.lower()) else 0


def _slices(body: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield of each slice what is outside strings, and how many bytes up to its end are text.

    What is no JSON is cut in some way from where it stops to be.

    Raises:
        RequestError: 413, there are more strings than values may be.
    """
    start = quotes = uploads = 0
    string: _LongString | None = None  # the one in which a slice begins
    while start < len(body):
        piece = body[start : start + _SLICE]
        if piece.endswith(b"\\") and (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            piece = body[start : start + _SLICE + 1]  # what it escapes belongs to it
        start += len(piece)
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"..").replace(b'\\"', b"..")
        found = piece.count(b'"') if b'"' in piece else 0
        quotes += found
        if quotes > 2 * MAX_VALUES:
            raise _too_large(f"more than {MAX_VALUES} keys and values")
        parts = piece.split(b'"') if found else [piece]
        outside = b"".join(parts[string is not None :: 2])
        if string is not None:
            string.add(parts[0])
        if found:
            uploads += string.upload_bytes() if string is not None else 0
            string = _LongString() if quotes % 2 else None
            if string is not None:
                string.add(parts[-1])
        yield outside, start - uploads - (string.upload_bytes() if string is not None else 0)


def _too_large(what: str) -> RequestError:
    return RequestError(Failure(413, f"The request body has {what}.", code="request_too_large"))
