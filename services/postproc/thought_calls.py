"""Calls at the end of reasoning: the model sometimes forgets </think> before it calls.

Calls in reasoning are calls if they are the last that the answer says: no </think> and nothing but whitespace and other
such calls comes after them, and no limit cut the answer off. Each has to be complete (tool_json: its braces stand; of
</tool_call> only the last may be missing) and of a function that the request declares. Anything else is reasoning, as
written: the model also thinks about calls that it does not make.

So text from <tool_call> on is held back while it may still turn out to be such calls. The rules for markers are those
of tool_calls.
"""

from typing import NamedTuple

from services.postproc.detokenize import CALL_OPEN
from services.postproc.json_repair import SPACE
from services.postproc.stop import Finder, compile_patterns
from services.postproc.tool_json import Body


class Held(NamedTuple):
    """A piece of what is held back."""

    text: str
    is_marker: bool


class ThoughtCalls:
    """Holds back the calls of one answer's reasoning. Methods return what is known to be reasoning."""

    __slots__ = ("_body", "_declared", "_finder", "_held")

    def __init__(self, declared: frozenset[str], spelled: tuple[str, ...]) -> None:
        """`spelled`: the markers that the vocabulary lacks, to be looked for in the text."""
        self._declared = declared
        self._finder = Finder(compile_patterns(spelled)) if spelled else None
        self._held: list[Held] = []
        self._body: Body | None = None  # of the call that is open

    @property
    def holding(self) -> bool:
        """A call has begun."""
        return bool(self._held)

    @property
    def idle(self) -> bool:
        """Text would be returned as it is."""
        return not self._held and self._finder is None

    def push(self, text: str) -> str:
        """Read text of the reasoning."""
        if self._finder is None:
            return self._text(text)
        return "".join(
            self._text(plain) + (self._marker(marker) if marker else "") for plain, marker in self._finder.split(text)
        )

    def marker(self, marker: str) -> str:
        """Read a marker that came as a token."""
        return self._flush_finder() + self._marker(marker)

    def release(self) -> str:
        """Give up what is held back: it is reasoning."""
        return self._flush_finder() + self._release_held()

    def finish(self) -> tuple[str, list[Held]]:
        """End the answer: the rest of the reasoning, and the pieces of the calls after it."""
        text = self._flush_finder()
        if self._body is not None and not self._body.complete:
            return text + self._release_held(), []
        return text, self._held

    def _flush_finder(self) -> str:
        return self._text(self._finder.flush()) if self._finder else ""

    def _text(self, text: str) -> str:
        if not self._held:
            return text
        self._held.append(Held(text, is_marker=False))
        if self._body is None:
            may_be_calls = not text.strip(SPACE)
        else:
            names = [delta.name for delta in self._body.push(text) if delta.name is not None]
            may_be_calls = not self._body.lost and self._declared.issuperset(names)
        return "" if may_be_calls else self._release_held()

    def _marker(self, marker: str) -> str:
        text = ""
        if self._body is not None and not self._body.complete:
            text = self._release_held()
        if marker == CALL_OPEN:
            self._body = Body(0, str)
        elif self._body is not None:
            self._body = None
        else:
            return text + self._release_held() + marker
        self._held.append(Held(marker, is_marker=True))
        return text

    def _release_held(self) -> str:
        text = "".join(piece.text for piece in self._held)
        self._held.clear()
        self._body = None
        return text
