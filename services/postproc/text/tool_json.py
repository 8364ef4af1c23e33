"""Parse the text between <tool_call> and </tool_call>, as it is written: one call or several.

A call is the JSON object {"name": ..., "arguments": {...}}. Variants that models write are read too:

- The keys come in any order. `parameters` means `arguments`. Other keys are skipped, and of a repeated key the first
  counts. Commas may be missing or too many.
- The outer braces may be missing, either or both. Several objects may follow each other, in a list or not.
- Arguments are an object, which json_repair repairs, or a JSON string that says one. If they are null, an empty string
  or absent from a call that ended, they are {}.

A call is reported as soon as its name is known and its arguments have a first value or are complete. It stands from
then on: its arguments end where they cannot be read, or where the text ends, closed by the brackets that are missing.
All that comes before decides whether it is one: without a name, with arguments that are no object or that cannot be
read before their first value, it is no call but text.

These rules know nothing of pieces, so a stream and a whole answer agree.
"""

from collections.abc import Callable

from services.postproc.text.json_repair import SPACE, StringRepair, ValueRepair, unquote
from shared.messages import ToolDelta

_ARGUMENTS = ("arguments", "parameters")


class CallParser:
    """One call: an object, from behind its opening brace to its closing one."""

    __slots__ = (
        "_fragments",
        "_has_arguments",
        "_key",
        "_read",
        "_state",
        "_string",
        "_value",
        "broken",
        "closed",
        "name",
        "unread",
    )

    def __init__(self) -> None:
        self.name: str | None = None
        self.closed = False  # its closing brace was read
        self.broken = False  # it cannot be read further
        self.unread = ""  # the scalar that broke it
        self._has_arguments = False  # their key was read
        self._fragments: list[str] = []  # of the arguments, not yet taken
        self._key = ""
        self._read: list[str] = []  # of a key or the name
        self._string = StringRepair()
        self._value = ValueRepair()
        self._state: Callable[[str, int], int] = self._members

    def read_call(self, text: str, at: int) -> int:
        """Read text[at:] and return the index of the end, of the place behind the object, or where it broke."""
        while at < len(text) and not self.closed and not self.broken:
            at = self._state(text, at)
        return at

    def take_arguments(self) -> str:
        """Return the arguments that have become known since the last call, none before the name is known."""
        if self.name is None:
            return ""
        out = "".join(self._fragments)
        self._fragments.clear()
        return out

    def end_call(self, cut_off: bool) -> None:
        """Close the call at the end of its text; `cut_off` if a limit ended the text."""
        if self._state in (self._read_arguments, self._read_quoted):
            self._end_arguments(cut_off)
        elif self._state == self._skip:
            self._value.end_value(cut_off)
            self._end_skip()
        if self._state == self._members and not cut_off:
            self._default_arguments()

    def _default_arguments(self) -> None:
        """Give a call without arguments the empty object."""
        if not self._has_arguments:
            self._has_arguments = True
            self._fragments.append("{}")

    def _end_arguments(self, cut_off: bool = False) -> None:
        self._value.end_value(cut_off)
        self._fragments.append(self._value.take_valid())

    def _break(self, at: int, unread: str = "") -> int:
        self.broken = True
        self.unread = unread
        return at

    # Each method below is a state: it reads its part of text[at:] and returns the index at which it stopped.

    def _members(self, text: str, at: int) -> int:
        char = text[at]
        if char == '"':
            self._begin_string(self._read_key)
        elif char == "}":
            if self.name is None:
                return self._break(at)
            self._default_arguments()
            self.closed = True
        elif char != "," and char not in SPACE:
            return self._break(at)
        return at + 1

    def _begin_string(self, state: Callable[[str, int], int]) -> None:
        self._string = StringRepair()
        self._read.clear()
        self._state = state

    def _read_key(self, text: str, at: int) -> int:
        at = self._read_fragment(text, at)
        if self._string.closed:
            self._key = unquote("".join(self._read))
            self._state = self._colon
        return at

    def _read_name(self, text: str, at: int) -> int:
        at = self._read_fragment(text, at)
        if self._string.closed:
            name = unquote("".join(self._read))
            if not name.strip():
                return self._break(at)
            self.name = name
            self._state = self._members
        return at

    def _read_fragment(self, text: str, at: int) -> int:
        fragment, at = self._string.read_string(text, at)
        self._read.append(fragment)
        return at

    def _colon(self, text: str, at: int) -> int:
        if text[at] == ":":
            self._state = self._begin_value
        elif text[at] not in SPACE:
            return self._break(at)
        return at + 1

    def _begin_value(self, text: str, at: int) -> int:
        char = text[at]
        if char in SPACE:
            return at + 1
        if self._key == "name" and self.name is None:
            if char != '"':
                return self._break(at)
            self._begin_string(self._read_name)
            return at + 1
        self._value = ValueRepair()
        self._state = self._skip
        if self._key in _ARGUMENTS and not self._has_arguments:
            self._has_arguments = char in '{"'
            if char == "{":
                self._state = self._read_arguments
            elif char == '"':
                self._begin_string(self._read_quoted)
                return at + 1
        return at

    def _read_arguments(self, text: str, at: int) -> int:
        at = self._value.read_value(text, at)
        self._fragments.append(self._value.take_valid())
        if self._value.broken:
            self._end_arguments()
            return self._break(at, self._value.unread)
        if self._value.closed:
            self._state = self._members
        return at

    def _read_quoted(self, text: str, at: int) -> int:
        """Read arguments given as a JSON string, to its closing quote even if the object in it is broken."""
        fragment, at = self._string.read_string(text, at)
        said = unquote(fragment)
        if not self._read:
            said = said.lstrip(SPACE)
            self._read += [said] * bool(said)
            self._value.broken = bool(said) and said[0] != "{"
        self._value.read_value(said, 0)
        self._fragments.append(self._value.take_valid())
        if self._string.closed:
            return self._end_quoted(at)
        return at

    def _end_quoted(self, at: int) -> int:
        broken = self._value.broken
        self._end_arguments()
        if not self._read:
            self._fragments.append("{}")
        elif broken or not self._value.begun:
            return self._break(at)
        self._state = self._members
        return at

    def _skip(self, text: str, at: int) -> int:
        """Read the value of another key, or arguments that are no object: null stands for none."""
        at = self._value.read_value(text, at)
        if self._value.broken:
            return self._break(at, self._value.unread)
        if self._value.closed:
            self._end_skip()
        return at

    def _end_skip(self) -> None:
        if not self._value.closed:
            return
        if self._key in _ARGUMENTS and not self._has_arguments:
            if self._value.take_valid() != "null":
                self.broken = True
                return
            self._default_arguments()
        self._state = self._members


class CallBody:
    """All text between two markers. Time and memory are linear in its length."""

    __slots__ = ("_call", "_call_id", "_index", "_listed", "_reported", "_rest", "names", "unreadable")

    def __init__(self, index: int, call_id: Callable[[int], str]) -> None:
        """`index`: the first call's. `call_id` makes a call's id from its index."""
        self.names: list[str] = []  # of the calls that were reported
        self.unreadable = False  # it cannot be read further
        self._index = index
        self._call_id = call_id
        self._call: CallParser | None = None
        self._reported = False  # the call was reported
        self._listed = False  # an opening bracket was read
        self._rest: list[str] = []  # text that is no part of a call that was reported

    @property
    def malformed(self) -> bool:
        """True if there is no call in it, whatever follows."""
        return self.unreadable and not self.names

    @property
    def complete(self) -> bool:
        """True if it consists of calls so far, each read to its end."""
        return bool(self.names) and self._call is None and not self.unreadable

    @property
    def rest(self) -> str:
        """Return the text that is in no call: everything if no call was reported, else the text behind the last one."""
        return "".join(self._rest)

    def read_body(self, text: str) -> list[ToolDelta]:
        """Read on and return what `text` adds to the calls."""
        deltas: list[ToolDelta] = []
        at = 0
        while at < len(text) and not self.unreadable:
            call = self._call
            at = self._read_call(call, text, at, deltas) if call else self._between(text, at)
        self._rest += [text[at:]] * (at < len(text))
        return deltas

    def end_body(self, cut_off: bool) -> list[ToolDelta]:
        """End the body, at its closing marker or without one; `cut_off` if a limit ended the answer."""
        if self._call is None or self.unreadable:
            return []
        self._call.end_call(cut_off)
        return self._take_deltas(self._call)

    def _between(self, text: str, at: int) -> int:
        """Read one character before the first object or behind one."""
        char, first = text[at], not self.names
        if char == "{" or (char == '"' and first and not self._listed):
            self._call = CallParser()
            self._reported = False
            if char == '"':
                return at
        elif char == "[" and first and not self._listed:
            self._listed = True
        elif char not in SPACE and (first or char not in ",}]"):
            self.unreadable = True
            return at
        self._rest.append(char)
        return at + 1

    def _read_call(self, call: CallParser, text: str, start: int, deltas: list[ToolDelta]) -> int:
        at = call.read_call(text, start)
        self._rest.append(text[start:at])
        deltas += self._take_deltas(call)
        if call.broken:
            self.unreadable = True
            self._rest += [call.unread] * self._reported
        elif call.closed:
            self._call = None
        return at

    def _take_deltas(self, call: CallParser) -> list[ToolDelta]:
        """Return the parts of a call that have become known; with the first, the call is reported."""
        deltas = []
        arguments = call.take_arguments()
        if arguments and not self._reported and call.name is not None:
            index = self._index + len(self.names)
            self.names.append(call.name)
            self._reported = True
            deltas.append(ToolDelta(index, self._call_id(index), call.name, ""))
        if self._reported:
            self._rest.clear()
        if arguments:
            deltas.append(ToolDelta(self._index + len(self.names) - 1, None, None, arguments))
        return deltas
