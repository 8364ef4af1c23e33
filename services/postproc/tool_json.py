"""Reads what stands between <tool_call> and </tool_call>, as it is written: one call or several.

A call is the JSON object {"name": ..., "arguments": {...}}, and what models make of it is read too:

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

from services.postproc.json_repair import SPACE, StringRepair, ValueRepair, unquote
from shared.messages import ToolDelta

_ARGUMENTS = ("arguments", "parameters")


class Call:
    """One object, from behind its opening brace to its closing one."""

    __slots__ = (
        "_arguments",
        "_fragments",
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
        self._arguments = False  # the key was read
        self._fragments: list[str] = []  # of the arguments, not yet given out
        self._key = ""
        self._read: list[str] = []  # of a key or the name
        self._string = StringRepair()
        self._value = ValueRepair()
        self._state: Callable[[str, int], int] = self._members

    def push(self, text: str, at: int) -> int:
        """Read text[at:] and return where reading stopped: at the end, after the object, or where it is broken."""
        while at < len(text) and not self.closed and not self.broken:
            at = self._state(text, at)
        return at

    def take(self) -> str:
        """Give out the arguments that have become known since the last time; the name is known with the first."""
        if self.name is None:
            return ""
        out = "".join(self._fragments)
        self._fragments.clear()
        return out

    def end(self, cut_off: bool) -> None:
        """Close the call, at the end of its text, or where a limit cut it off."""
        if self._state in (self._read_arguments, self._read_quoted):
            self._end_arguments(cut_off)
        elif self._state == self._skip:
            self._value.end(cut_off)
            self._end_skip()
        if self._state == self._members and not cut_off:
            self._complete()

    def _complete(self) -> None:
        if not self._arguments:
            self._arguments = True
            self._fragments.append("{}")

    def _end_arguments(self, cut_off: bool = False) -> None:
        self._value.end(cut_off)
        self._fragments.append(self._value.take())

    def _break(self, at: int, unread: str = "") -> int:
        self.broken = True
        self.unread = unread
        return at

    # A state reads text[at:] as far as it is the state's own and returns where it stopped.

    def _members(self, text: str, at: int) -> int:
        char = text[at]
        if char == '"':
            self._begin_string(self._read_key)
        elif char == "}":
            if self.name is None:
                return self._break(at)
            self._complete()
            self.closed = True
        elif char != "," and char not in SPACE:
            return self._break(at)
        return at + 1

    def _begin_string(self, state: Callable[[str, int], int]) -> None:
        self._string = StringRepair()
        self._read.clear()
        self._state = state

    def _read_key(self, text: str, at: int) -> int:
        at = self._push_string(text, at)
        if self._string.closed:
            self._key = unquote("".join(self._read))
            self._state = self._colon
        return at

    def _read_name(self, text: str, at: int) -> int:
        at = self._push_string(text, at)
        if self._string.closed:
            name = unquote("".join(self._read))
            if not name.strip():
                return self._break(at)
            self.name = name
            self._state = self._members
        return at

    def _push_string(self, text: str, at: int) -> int:
        fragment, at = self._string.push(text, at)
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
        if self._key in _ARGUMENTS and not self._arguments:
            self._arguments = char in '{"'
            if char == "{":
                self._state = self._read_arguments
            elif char == '"':
                self._begin_string(self._read_quoted)
                return at + 1
        return at

    def _read_arguments(self, text: str, at: int) -> int:
        at = self._value.push(text, at)
        self._fragments.append(self._value.take())
        if self._value.broken:
            self._end_arguments()
            return self._break(at, self._value.unread)
        if self._value.closed:
            self._state = self._members
        return at

    def _read_quoted(self, text: str, at: int) -> int:
        """Arguments given as a JSON string. It is read to its closing quote even if what it says is broken."""
        fragment, at = self._string.push(text, at)
        said = unquote(fragment)
        if not self._read:
            said = said.lstrip(SPACE)
            self._read += [said] * bool(said)
            self._value.broken = bool(said) and said[0] != "{"
        self._value.push(said, 0)
        self._fragments.append(self._value.take())
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
        """A value that nobody wants, or arguments that are no object: null is as good as none."""
        at = self._value.push(text, at)
        if self._value.broken:
            return self._break(at, self._value.unread)
        if self._value.closed:
            self._end_skip()
        return at

    def _end_skip(self) -> None:
        if not self._value.closed:
            return
        if self._key in _ARGUMENTS and not self._arguments:
            if self._value.take() != "null":
                self.broken = True
                return
            self._complete()
        self._state = self._members


class Body:
    """All that stands between the markers. Time and memory are linear in its length."""

    __slots__ = ("_announced", "_call", "_call_id", "_index", "_listed", "_rest", "lost", "names")

    def __init__(self, index: int, call_id: Callable[[int], str]) -> None:
        """`index`: the first call's. `call_id` makes a call's id from its index."""
        self.names: list[str] = []  # of the calls that were reported
        self.lost = False  # it cannot be read further
        self._index = index
        self._call_id = call_id
        self._call: Call | None = None
        self._announced = False  # the call was reported
        self._listed = False  # an opening bracket was read
        self._rest: list[str] = []  # text that is no part of a call that was reported

    @property
    def malformed(self) -> bool:
        """There is no call in it, whatever follows."""
        return self.lost and not self.names

    @property
    def complete(self) -> bool:
        """There are calls in it so far, each read to its end, and nothing else."""
        return bool(self.names) and self._call is None and not self.lost

    @property
    def rest(self) -> str:
        """Everything if no call was reported, else what follows the last one."""
        return "".join(self._rest)

    def push(self, text: str) -> list[ToolDelta]:
        """Read on, and return what `text` adds to the calls."""
        deltas: list[ToolDelta] = []
        at = 0
        while at < len(text) and not self.lost:
            call = self._call
            at = self._read_call(call, text, at, deltas) if call else self._between(text, at)
        self._rest += [text[at:]] * (at < len(text))
        return deltas

    def end(self, cut_off: bool) -> list[ToolDelta]:
        """End the body, at its closing marker or without, or where a limit cut it off."""
        if self._call is None or self.lost:
            return []
        self._call.end(cut_off)
        return self._take(self._call)

    def _between(self, text: str, at: int) -> int:
        """Before the first object, or after one."""
        char, first = text[at], not self.names
        if char == "{" or (char == '"' and first and not self._listed):
            self._call = Call()
            self._announced = False
            if char == '"':
                return at
        elif char == "[" and first and not self._listed:
            self._listed = True
        elif char not in SPACE and (first or char not in ",}]"):
            self.lost = True
            return at
        self._rest.append(char)
        return at + 1

    def _read_call(self, call: Call, text: str, start: int, deltas: list[ToolDelta]) -> int:
        at = call.push(text, start)
        self._rest.append(text[start:at])
        deltas += self._take(call)
        if call.broken:
            self.lost = True
            self._rest += [call.unread] * self._announced
        elif call.closed:
            self._call = None
        return at

    def _take(self, call: Call) -> list[ToolDelta]:
        deltas = []
        arguments = call.take()
        if arguments and not self._announced and call.name is not None:
            index = self._index + len(self.names)
            self.names.append(call.name)
            self._announced = True
            deltas.append(ToolDelta(index, self._call_id(index), call.name, ""))
        if self._announced:
            self._rest.clear()
        if arguments:
            deltas.append(ToolDelta(self._index + len(self.names) - 1, None, None, arguments))
        return deltas
