"""The tool-call parser `ernie-45-vl-thinking`: splits the content into text and calls.

After thinking the model writes `<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>`, any number of times:

- A marker is its token where the vocabulary has one, and then ordinary tokens that spell it are text; otherwise it is
  its spelling. A marker always acts, even inside a JSON string. </tool_call> that closes nothing is text. A call that
  is still open when another opens, or when the answer ends, ends there.
- Text before, between and after calls is content. Newlines at the end of the text before a call and whitespace after
  one separate; they are shown (the newlines) only if text comes on both sides.
- The body is read as tool_json says. Of what stands between the last call in it and </tool_call> nothing is shown; if
  </tool_call> does not come, it is content.
- A body without a call is text: marker and body as written. Nothing of it has been shown before that is known.
- The arguments of every call that was reported are a JSON object, also where a limit cut the answer off.
- With parallel calls off, the first call is the only one; later ones are read and left out.

Calls in reasoning are the subject of reasoning_calls.
"""

from hashlib import blake2b

from services.postproc.text.detokenize import CALL_CLOSE, CALL_OPEN
from services.postproc.text.reasoning import TrailingNewlines
from services.postproc.text.stop import PatternFinder, compile_automaton
from services.postproc.text.tool_json import CallBody
from shared.messages import ToolDelta

Piece = str | ToolDelta  # content, or a part of a call


def call_id(request_id: str, index: int) -> str:
    """Return the id by which clients answer a call. It is the same whenever the request is replayed."""
    return "call_" + blake2b(f"{request_id}:{index}".encode(), digest_size=12).hexdigest()


class ToolCalls:
    """The calls of one answer. Methods return the pieces that they add, in the order in which they were written."""

    def __init__(self, request_id: str, parallel: bool, spelled: tuple[str, ...]) -> None:
        """`spelled`: the markers that the vocabulary lacks, to be looked for in the text."""
        self._count = 0  # calls so far, those that are left out included
        self._request_id = request_id
        self._parallel = parallel
        self._finder = PatternFinder(compile_automaton(spelled)) if spelled else None
        self._newlines = TrailingNewlines()
        self._body: CallBody | None = None
        self._after_call = False  # since the last call there was only whitespace
        self._has_content = False  # some content was shown

    @property
    def idle(self) -> bool:
        """True if text without a newline at its end would be shown as it is and changes no state."""
        settled = self._has_content and not self._after_call and not self._newlines.held
        return settled and self._body is None and self._finder is None

    def read_text(self, text: str) -> list[Piece]:
        """Read text that comes after thinking."""
        if self._finder is None:
            return self._add_text(text)
        pieces: list[Piece] = []
        for plain, marker in self._finder.split(text):
            pieces += self._add_text(plain)
            pieces += self._add_marker(marker) if marker else []
        return pieces

    def read_marker(self, marker: str) -> list[Piece]:
        """Read a marker that came as a token."""
        return self._flush_finder() + self._add_marker(marker)

    def end_answer(self, cut_off: bool) -> list[Piece]:
        """End the answer; `cut_off` if a limit ended it."""
        pieces = self._flush_finder() + self._end_body("", cut_off)
        newlines = "" if self._after_call else self._newlines.release()
        return [*pieces, newlines] if newlines else pieces

    def _flush_finder(self) -> list[Piece]:
        return self._add_text(self._finder.flush()) if self._finder else []

    def _add_marker(self, marker: str) -> list[Piece]:
        if marker == CALL_CLOSE:
            return self._end_body(CALL_CLOSE) if self._body else self._add_content(CALL_CLOSE)
        pieces = self._end_body("")
        self._body = CallBody(self._count, lambda index: call_id(self._request_id, index))
        return pieces

    def _add_text(self, text: str) -> list[Piece]:
        if self._body is None:
            return self._add_content(text)
        pieces = self._select(self._body.read_body(text))
        if self._body.malformed:
            pieces += self._end_body("")
        return pieces

    def _end_body(self, marker: str, cut_off: bool = False) -> list[Piece]:
        """End the body that was open, if one was, at `marker` or without one ("")."""
        body, self._body = self._body, None
        if body is None:
            return []
        pieces = self._select(body.end_body(cut_off))
        if not body.names:
            return self._add_content(CALL_OPEN + body.rest + marker)
        self._count += len(body.names)
        self._after_call = True
        return pieces if marker else pieces + self._add_content(body.rest)

    def _select(self, deltas: list[ToolDelta]) -> list[Piece]:
        """Return the deltas that may be shown: without parallel calls, those of the first call."""
        return [delta for delta in deltas if self._parallel or not delta.index]

    def _add_content(self, text: str) -> list[Piece]:
        if self._after_call:
            body = text.lstrip(" \t\r\n")
            self._newlines.held += text.count("\n", 0, len(text) - len(body))
            if not body:
                return []
            self._newlines.held *= self._has_content
            self._after_call = False
            text = body
        shown = self._newlines.hold_back(text)
        self._has_content |= bool(shown)
        return [shown] if shown else []
