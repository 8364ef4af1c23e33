"""Reads the body of one tool call as it is written: the name as soon as it is complete, then its arguments.

A body is the JSON object {"name": ..., "arguments": {...}}, and what models make of it is read too:

- The keys come in any order; arguments that come before the name wait for it. Other keys are skipped, and of a
  repeated key the first counts. Commas may be missing or too many.
- The outer braces may be missing, either or both.
- Arguments are passed on exactly as written, without a look at what is in them beyond brackets and strings. If they
  are a JSON string, what it says is passed on; if they are null, empty or absent from a call that ended, "{}".
- Whatever follows the object, or what cannot be read after the name, is the call's tail and no part of it.

A body without a name, or one that cannot be read before it, is malformed: not a call.
"""

import json
import re
from collections.abc import Callable

from shared.messages import ToolDelta

_SPACE = " \t\r\n"
_STRING_STOP = re.compile(r'["\\]')
_BRACKET_STOP = re.compile(r'["{}\[\]]')
_SCALAR_STOP = re.compile(r"[,}\]\s]")
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


class Unescape:
    """The text a JSON string stands for, as the string is written. Escapes JSON does not know stay as written, half a
    surrogate pair becomes U+FFFD, and an escape the text ends in is lost."""

    __slots__ = ("_escape", "_high", "closed")

    def __init__(self) -> None:
        self._escape = ""  # an escape that has begun
        self._high = 0  # the first half of a surrogate pair, waiting for the second
        self.closed = False  # the closing quote was read

    def push(self, text: str, at: int) -> tuple[str, int]:
        """(what text[at:] adds, where reading ended: after the closing quote, or at the end of `text`)."""
        out: list[str] = []
        while at < len(text) and not self.closed:
            if self._escape:
                at = self._read_escape(text[at], at, out)
                continue
            stop = _STRING_STOP.search(text, at)
            end = stop.start() if stop else len(text)
            if end > at:
                out.append(self._orphan() + text[at:end])
            at = end + 1 if stop else end
            if stop and text[end] == "\\":
                self._escape = "\\"
            elif stop:
                self.closed = True
                out.append(self._orphan())
        return "".join(out), at

    def _read_escape(self, char: str, at: int, out: list[str]) -> int:
        escape = self._escape + char
        if escape == "\\u" or (escape[1] == "u" and len(escape) < 6 and _is_hex(char)):
            self._escape = escape
            return at + 1
        self._escape = ""
        if escape[1] != "u":
            out.append(self._orphan() + _ESCAPES.get(char, escape))
        elif _is_hex(char):
            out.append(self._unit(int(escape[2:], 16)))
        else:
            out.append(self._orphan() + escape[:-1])
            return at  # `char` may be the closing quote
        return at + 1

    def _unit(self, unit: int) -> str:
        """A UTF-16 code unit."""
        if self._high and 0xDC00 <= unit < 0xE000:
            high, self._high = self._high, 0
            return chr(0x10000 + ((high - 0xD800) << 10) + (unit - 0xDC00))
        orphan = self._orphan()
        if 0xD800 <= unit < 0xDC00:
            self._high = unit
            return orphan
        return orphan + ("\ufffd" if 0xDC00 <= unit < 0xE000 else chr(unit))

    def _orphan(self) -> str:
        """U+FFFD in place of a first half whose second did not come."""
        orphan, self._high = "\ufffd" if self._high else "", 0
        return orphan


class Call:
    """One tool call, from its opening marker to its end. Time and memory are linear in the body's length."""

    def __init__(self, index: int, call_id: str) -> None:
        self.name: str | None = None
        self.malformed = False
        self.raw: list[str] = []  # the body as written, while there is no name
        self.tail: list[str] = []
        self.index = index
        self._id = call_id
        self._announced = False
        self._fragments: list[str] = []  # of the arguments, not yet given out
        self._has_arguments = False  # the key was read
        self._key = ""
        self._state: Callable[[str, int], int] = self._start
        self._string: list[str] = []  # a key, the name or a scalar, so far
        self._then: Callable[[str], None] = self._got_key
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._emitting = False
        self._unescape = Unescape()
        self._any = False  # quoted arguments say something

    def push(self, text: str) -> list[ToolDelta]:
        """What `text`, the next of the body, adds to the call. Afterwards it may have become malformed."""
        if self.name is None:
            self.raw.append(text)
        at = 0
        while at < len(text):
            at = self._state(text, at)
        return self._take()

    def end(self) -> list[ToolDelta]:
        """The body is over, and was not cut off."""
        if self._state == self._scalar:
            self._end_scalar()
        if self._state == self._members:
            self._complete()
        return self._take()

    def _take(self) -> list[ToolDelta]:
        if self.name is None:
            return []
        deltas = []
        if not self._announced:
            self._announced = True
            self.raw.clear()
            deltas.append(ToolDelta(self.index, self._id, self.name, ""))
        if arguments := "".join(self._fragments):
            deltas.append(ToolDelta(self.index, None, None, arguments))
        self._fragments.clear()
        return deltas

    def _complete(self) -> None:
        if not self._has_arguments:
            self._fragments.append("{}")
            self._has_arguments = True

    def _unreadable(self, read: str, at: int = 0) -> int:
        """The body breaks the grammar; `read` is what was taken for something else until now."""
        self.malformed = self.name is None
        self.tail.append(read)
        self._state = self._after
        return at

    # A state reads text[at:] as far as it is the state's own and returns where it stopped.

    def _start(self, text: str, at: int) -> int:
        char = text[at]
        if char == "{":
            self._state = self._members
        elif char == '"':
            self._begin_string(self._got_key)
        elif char not in _SPACE:
            return self._unreadable("", at)
        return at + 1

    def _members(self, text: str, at: int) -> int:
        char = text[at]
        if char == '"':
            self._begin_string(self._got_key)
        elif char == "}":
            if self.name is None:
                return self._unreadable("", at)
            self._complete()
            self._state = self._after
        elif char != "," and char not in _SPACE:
            return self._unreadable("", at)
        return at + 1

    def _colon(self, text: str, at: int) -> int:
        if text[at] == ":":
            self._state = self._value
        elif text[at] not in _SPACE:
            return self._unreadable("", at)
        return at + 1

    def _value(self, text: str, at: int) -> int:
        char = text[at]
        if char in _SPACE:
            return at + 1
        if self._key == "name" and self.name is None:
            if char != '"':
                return self._unreadable("", at)
            self._begin_string(self._got_name)
            return at + 1
        self._emitting = self._key == "arguments" and not self._has_arguments
        self._has_arguments |= self._emitting
        if char == '"' and self._emitting:
            self._state = self._quoted
            return at + 1
        if char in '"{[':
            self._state, self._depth, self._in_string, self._escaped = self._raw_value, 0, False, False
            return at
        if _SCALAR_STOP.match(char):
            return self._unreadable("", at)
        self._string.clear()
        self._state = self._scalar
        return at

    def _begin_string(self, then: Callable[[str], None]) -> None:
        self._string.clear()
        self._escaped = False
        self._then = then
        self._state = self._short_string

    def _short_string(self, text: str, at: int) -> int:
        """A key or the name: kept whole, since only the end makes it one."""
        if self._escaped:
            self._escaped = False
            self._string.append(text[at])
            return at + 1
        stop = _STRING_STOP.search(text, at)
        if stop is None:
            self._string.append(text[at:])
            return len(text)
        self._string.append(text[at : stop.start()])
        if stop.group() == '"':
            quoted = '"' + "".join(self._string) + '"'
            if (string := _decode(quoted)) is None:
                return self._unreadable(quoted, stop.end())
            self._then(string)
        else:
            self._string.append("\\")
            self._escaped = True
        return stop.end()

    def _got_key(self, key: str) -> None:
        self._key = key
        self._state = self._colon

    def _got_name(self, name: str) -> None:
        if name.strip():
            self.name = name
            self._state = self._members
        else:
            self._unreadable("")

    def _raw_value(self, text: str, at: int) -> int:
        """An object or array, or a string that nobody wants, passed on or skipped as it is."""
        begin, done = at, False
        while at < len(text) and not done:
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            stop = (_STRING_STOP if self._in_string else _BRACKET_STOP).search(text, at)
            if stop is None:
                at = len(text)
                break
            at, char = stop.end(), stop.group()
            if char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = not self._in_string
                done = not self._depth and not self._in_string
            else:
                self._depth += 1 if char in "{[" else -1
                done = not self._depth
        if self._emitting:
            self._fragments.append(text[begin:at])
        if done:
            self._state = self._members
        return at

    def _quoted(self, text: str, at: int) -> int:
        """Arguments given as a JSON string."""
        fragment, at = self._unescape.push(text, at)
        self._fragments.append(fragment)
        self._any |= bool(fragment)
        if self._unescape.closed:
            if not self._any:
                self._fragments.append("{}")
            self._state = self._members
        return at

    def _scalar(self, text: str, at: int) -> int:
        """A number or literal: kept whole, since null as arguments means there are none."""
        stop = _SCALAR_STOP.search(text, at)
        end = stop.start() if stop else len(text)
        self._string.append(text[at:end])
        if stop:
            self._end_scalar()
        return end

    def _end_scalar(self) -> None:
        value = "".join(self._string)
        if _decode(value) is None:
            self._unreadable(value)
            return
        if self._emitting:
            self._fragments.append("{}" if value == "null" else value)
        self._state = self._members

    def _after(self, text: str, at: int) -> int:
        self.tail.append(text[at:])
        return len(text)


def _decode(text: str) -> str | None:
    """A short JSON value, as str, and None if it is not JSON. Half a surrogate pair, which no message can carry,
    becomes U+FFFD."""
    try:
        value = str(json.loads(text, strict=False))
    except ValueError:
        return None
    return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _is_hex(char: str) -> bool:
    return char in "0123456789abcdefABCDEF"
