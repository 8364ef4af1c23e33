"""Repair JSON as models write it, piece by piece, into valid JSON.

All text returned so far is, at any time, the beginning of a valid JSON value, and stays so whatever follows. A valid
value is returned as it was written. Repairs are made where there is one reading:

- Commas that are missing, doubled or trailing. A closing bracket that skips an open one, as in {"a": [1}.
- In strings: raw control characters, escapes that JSON does not know (the backslash stands for itself), and half a
  surrogate pair, which becomes U+FFFD.
- Python's True, False and None.

Anything else breaks the value: nothing after it is read. A value that is broken, or that ends too early, is closed by
the quote and brackets that are missing. Commas, keys and opening brackets wait for the string, scalar or closing
bracket that they lead to, and scalars for their end; so a member without a readable value is left out.
"""

import json
import re
from collections.abc import Callable
from math import isfinite

SPACE = " \t\r\n"
MAX_DEPTH = 100  # json.loads and others fail at some depth between 128 and a few thousand
MAX_SCALAR = 1000  # characters; json.loads refuses integers of more than 4300

_STRING_STOP = re.compile(r'["\\\x00-\x1f]')
_SCALAR_STOP = re.compile(r'[\s,:"{}\[\]]')
_SPACES = re.compile(f"[{SPACE}]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_LITERALS = {name: name.lower() for name in ("true", "false", "null", "True", "False")} | {"None": "null"}
_CLOSING = {"{": "}", "[": "]"}
_LONE = "\\ufffd"


def unquote(inside: str) -> str:
    """Decode the inside of a valid JSON string."""
    return str(json.loads(f'"{inside}"'))


def _is_number(text: str) -> bool:
    """Return whether every parser reads `text` as a finite number.

    A fraction or an exponent beyond the range of a double, as in 1e999, is infinity to some, and an error to others.
    """
    number = _NUMBER.fullmatch(text) if len(text) <= MAX_SCALAR else None
    return number is not None and (text.lstrip("-").isdigit() or isfinite(float(text)))


class StringRepair:
    """The inside of one JSON string, behind its opening quote. Each piece returned is valid by itself; an incomplete
    escape at the end of the text is dropped."""

    __slots__ = ("_escape", "_high", "closed")

    def __init__(self) -> None:
        self._escape = ""  # an escape that has begun
        self._high = ""  # the escape of the first half of a surrogate pair, waiting for the second
        self.closed = False  # the closing quote was read

    def read_string(self, text: str, at: int) -> tuple[str, int]:
        """Read text[at:] and return (repaired piece, index behind the closing quote or the end of `text`)."""
        out: list[str] = []
        while at < len(text) and not self.closed:
            at = self._read_escape(text, at, out) if self._escape else self._read_plain(text, at, out)
        return "".join(out), at

    def _read_plain(self, text: str, at: int, out: list[str]) -> int:
        stop = _STRING_STOP.search(text, at)
        end = stop.start() if stop else len(text)
        if end > at:
            out.append(self._drop_high() + text[at:end])
        if stop is None:
            return end
        if text[end] == "\\":
            self._escape = "\\"
            return end + 1
        self.closed = text[end] == '"'
        out.append(self._drop_high() + ("" if self.closed else json.dumps(text[end])[1:-1]))
        return end + 1

    def _read_escape(self, text: str, at: int, out: list[str]) -> int:
        before, char = self._escape, text[at]
        unicode, digit = before.startswith("\\u"), char in "0123456789abcdefABCDEF"
        if (before == "\\" and char == "u") or (unicode and digit and len(before) < 5):
            self._escape += char
            return at + 1
        self._escape = ""
        if unicode and digit:
            out.append(self._add_code_unit(before + char))
        elif not unicode and char in '"\\/bfnrt':
            out.append(self._drop_high() + before + char)
        elif not unicode and char == "'":
            out.append(self._drop_high() + char)
        else:
            out.append(self._drop_high() + "\\" + before)
            return at  # `char` stands for itself, and may be the closing quote
        return at + 1

    def _add_code_unit(self, escape: str) -> str:
        """Return what the escape of a UTF-16 code unit adds."""
        unit = int(escape[2:], 16)
        if self._high and 0xDC00 <= unit < 0xE000:
            high, self._high = self._high, ""
            return high + escape
        lone = self._drop_high()
        if 0xD800 <= unit < 0xDC00:
            self._high = escape
            return lone
        return lone + (_LONE if 0xDC00 <= unit < 0xE000 else escape)

    def _drop_high(self) -> str:
        """Return U+FFFD in place of a first half of a surrogate pair whose second did not come, if there is one."""
        lone, self._high = _LONE if self._high else "", ""
        return lone


class ValueRepair:
    """One JSON value, from its first character on. Time and memory are linear in its length."""

    __slots__ = (
        "_comma",
        "_gap",
        "_has_member",
        "_in_key",
        "_out",
        "_pending",
        "_scalar",
        "_shown_depth",
        "_stack",
        "_state",
        "_string",
        "broken",
        "closed",
        "unread",
    )

    def __init__(self) -> None:
        self.closed = False  # it was read to its end
        self.broken = False  # it cannot be read further
        self.unread = ""  # the scalar that broke it
        self._out: list[str] = []  # to be returned
        self._pending: list[str] = []  # waits for the value that it leads to
        self._gap: list[str] = []  # spaces, and at most one comma, since the last member or opening bracket
        self._comma = False  # in the gap
        self._has_member = False  # the innermost container has one
        self._stack: list[str] = []  # the brackets that would close the value
        self._shown_depth = 0  # the number of those whose opening bracket was returned
        self._string = StringRepair()
        self._in_key = False
        self._scalar: list[str] = []
        self._state: Callable[[str, int], int] = self._value

    @property
    def begun(self) -> bool:
        """True if some of it was returned."""
        return self.closed or self._shown_depth > 0

    def read_value(self, text: str, at: int) -> int:
        """Read text[at:] and return the index of the end, of the place behind the value, or where it broke."""
        while at < len(text) and not self.closed and not self.broken:
            at = self._state(text, at)
        return at

    def take_valid(self) -> str:
        """Return the valid text that has become known since the last call."""
        out = "".join(self._out)
        self._out.clear()
        return out

    def end_value(self, cut_off: bool) -> None:
        """Close the value if some of it was returned. A scalar that a limit may have cut off is left out."""
        if self._state == self._read_scalar and not self.broken and not cut_off:
            self._end_scalar()
        if self.closed:
            return
        if self._state == self._read_string and not self._in_key:
            self._out.append('"')
        self._out += reversed(self._stack[: self._shown_depth])
        self.broken = True

    # Each method below is a state: it reads its part of text[at:] and returns the index at which it stopped.

    def _member(self, text: str, at: int) -> int:
        """Read in a container, before a member, a comma or the closing bracket."""
        char = text[at]
        if spaces := _SPACES.match(text, at):
            self._gap.append(spaces.group())
            return spaces.end()
        if char == ",":
            self._gap += [","] * (self._has_member and not self._comma)
            self._comma = self._has_member
            return at + 1
        if char in "}]":
            return self._close(char, at)
        if self._stack[-1] == "}" and char != '"':
            return self._break(at)
        self._pending += [","] * (self._has_member and not self._comma)
        self._end_gap(self._gap)
        if self._stack[-1] == "]":
            return self._value(text, at)
        self._pending.append('"')
        return self._begin_string(at, in_key=True)

    def _colon(self, text: str, at: int) -> int:
        if text[at] == ":":
            self._state = self._value
        elif text[at] not in SPACE:
            return self._break(at)
        self._pending.append(text[at])
        return at + 1

    def _value(self, text: str, at: int) -> int:
        char = text[at]
        if char in SPACE:
            self._pending.append(char)
        elif char == '"':
            self._flush(char)
            return self._begin_string(at, in_key=False)
        elif char in _CLOSING and len(self._stack) < MAX_DEPTH:
            self._pending.append(char)
            self._stack.append(_CLOSING[char])
            self._has_member = False
            self._state = self._member
        elif char in _CLOSING or _SCALAR_STOP.match(char):
            return self._break(at)
        else:
            self._scalar.clear()
            self._state = self._read_scalar
            return at
        return at + 1

    def _begin_string(self, at: int, in_key: bool) -> int:
        self._string = StringRepair()
        self._in_key = in_key
        self._state = self._read_string
        return at + 1

    def _read_string(self, text: str, at: int) -> int:
        fragment, at = self._string.read_string(text, at)
        sink = self._pending if self._in_key else self._out
        sink.append(fragment + '"' * self._string.closed)
        if self._string.closed and self._in_key:
            self._state = self._colon
        elif self._string.closed:
            self._end_value()
        return at

    def _read_scalar(self, text: str, at: int) -> int:
        stop = _SCALAR_STOP.search(text, at)
        end = stop.start() if stop else len(text)
        self._scalar.append(text[at:end])
        if stop:
            self._end_scalar()
        return end

    def _end_scalar(self) -> None:
        written = "".join(self._scalar)
        if written in _LITERALS or _is_number(written):
            self._flush(_LITERALS.get(written, written))
            self._end_value()
        else:
            self.unread = written
            self.broken = True

    def _close(self, bracket: str, at: int) -> int:
        """Close a container, and with it all that are still open inside."""
        if bracket not in self._stack:
            return self._break(at)
        self._end_gap([space for space in self._gap if space != ","])
        closing = ""
        while closing != bracket:
            closing = self._stack.pop()
            self._flush(closing)
        self._end_value()
        return at + 1

    def _end_value(self) -> None:
        self.closed = not self._stack
        self._has_member = True
        self._state = self._member

    def _end_gap(self, kept: list[str]) -> None:
        self._pending += kept
        self._gap.clear()
        self._comma = False

    def _flush(self, text: str) -> None:
        """Return `text` next, behind the keys, commas and brackets that lead to it."""
        self._out += [*self._pending, text]
        self._pending.clear()
        self._shown_depth = len(self._stack)

    def _break(self, at: int) -> int:
        self.broken = True
        return at
