"""Rewrites JSON as a model writes it into valid JSON, piece by piece.

All text given out is, at any time, the beginning of a valid JSON value, and stays so whatever follows. A valid value is
given out as it was written. These repairs have one reading, and are made:

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


class StringRepair:
    """The inside of one JSON string, after its opening quote. Each piece given out is valid by itself; an escape that
    the text ends in is lost."""

    __slots__ = ("_escape", "_high", "closed")

    def __init__(self) -> None:
        self._escape = ""  # an escape that has begun
        self._high = ""  # the escape of the first half of a surrogate pair, waiting for the second
        self.closed = False  # the closing quote was read

    def push(self, text: str, at: int) -> tuple[str, int]:
        """Return what text[at:] adds, and where reading ended: after the closing quote, or at the end of `text`."""
        out: list[str] = []
        while at < len(text) and not self.closed:
            at = self._read_escape(text, at, out) if self._escape else self._read_plain(text, at, out)
        return "".join(out), at

    def _read_plain(self, text: str, at: int, out: list[str]) -> int:
        stop = _STRING_STOP.search(text, at)
        end = stop.start() if stop else len(text)
        if end > at:
            out.append(self._orphan() + text[at:end])
        if stop is None:
            return end
        if text[end] == "\\":
            self._escape = "\\"
            return end + 1
        self.closed = text[end] == '"'
        out.append(self._orphan() + ("" if self.closed else json.dumps(text[end])[1:-1]))
        return end + 1

    def _read_escape(self, text: str, at: int, out: list[str]) -> int:
        before, char = self._escape, text[at]
        unicode, digit = before.startswith("\\u"), char in "0123456789abcdefABCDEF"
        if (before == "\\" and char == "u") or (unicode and digit and len(before) < 5):
            self._escape += char
            return at + 1
        self._escape = ""
        if unicode and digit:
            out.append(self._unit(before + char))
        elif not unicode and char in '"\\/bfnrt':
            out.append(self._orphan() + before + char)
        elif not unicode and char == "'":
            out.append(self._orphan() + char)
        else:
            out.append(self._orphan() + "\\" + before)
            return at  # `char` stands for itself, and may be the closing quote
        return at + 1

    def _unit(self, escape: str) -> str:
        """The escape of a UTF-16 code unit."""
        unit = int(escape[2:], 16)
        if self._high and 0xDC00 <= unit < 0xE000:
            high, self._high = self._high, ""
            return high + escape
        orphan = self._orphan()
        if 0xD800 <= unit < 0xDC00:
            self._high = escape
            return orphan
        return orphan + (_LONE if 0xDC00 <= unit < 0xE000 else escape)

    def _orphan(self) -> str:
        """U+FFFD in place of a first half whose second did not come."""
        orphan, self._high = _LONE if self._high else "", ""
        return orphan


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
        "_shown",
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
        self._out: list[str] = []  # to be given out
        self._pending: list[str] = []  # waits for the value that it leads to
        self._gap: list[str] = []  # spaces, and at most one comma, since the last member or opening bracket
        self._comma = False  # in the gap
        self._has_member = False  # the innermost container has one
        self._stack: list[str] = []  # the brackets that would close the value
        self._shown = 0  # the number of those whose opening bracket was given out
        self._string = StringRepair()
        self._in_key = False
        self._scalar: list[str] = []
        self._state: Callable[[str, int], int] = self._value

    @property
    def begun(self) -> bool:
        """Something was given out."""
        return self.closed or self._shown > 0

    def push(self, text: str, at: int) -> int:
        """Read text[at:] and return where reading stopped: at the end, after the value, or where it is broken."""
        while at < len(text) and not self.closed and not self.broken:
            at = self._state(text, at)
        return at

    def take(self) -> str:
        """Give out what can be given out."""
        out = "".join(self._out)
        self._out.clear()
        return out

    def end(self, cut_off: bool) -> None:
        """Close the value if anything of it was given out. A scalar that a limit may have cut off is left out."""
        if self._state == self._read_scalar and not self.broken and not cut_off:
            self._end_scalar()
        if self.closed:
            return
        if self._state == self._read_string and not self._in_key:
            self._out.append('"')
        self._out += reversed(self._stack[: self._shown])
        self.broken = True

    # A state reads text[at:] as far as it is the state's own and returns where it stopped.

    def _member(self, text: str, at: int) -> int:
        """The place in a container before a member, a comma or the closing bracket."""
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
        fragment, at = self._string.push(text, at)
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
        if written in _LITERALS or (len(written) <= MAX_SCALAR and _NUMBER.fullmatch(written)):
            self._flush(_LITERALS.get(written, written))
            self._end_value()
        else:
            self.unread = written
            self.broken = True

    def _close(self, bracket: str, at: int) -> int:
        """A closing bracket also closes what is still open inside."""
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
        """Give out `text`, and before it what led to it."""
        self._out += [*self._pending, text]
        self._pending.clear()
        self._shown = len(self._stack)

    def _break(self, at: int) -> int:
        self.broken = True
        return at
