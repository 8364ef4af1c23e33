"""The tool-call parser `ernie-45-vl-thinking`: which of the content is text and which is calls.

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

Calls in reasoning are thought_calls'.
"""

from hashlib import blake2b

from services.postproc.detokenize import CALL_CLOSE, CALL_OPEN
from services.postproc.reasoning import Newlines
from services.postproc.stop import Finder, compile_patterns
from services.postproc.tool_json import Body
from shared.messages import ToolDelta

Piece = str | ToolDelta  # content, or a part of a call


def call_id(request_id: str, index: int) -> str:
    """Make the id clients answer a call by; the same whenever the request is replayed."""
    return "call_" + blake2b(f"{request_id}:{index}".encode(), digest_size=12).hexdigest()


class ToolCalls:
    """The calls of one answer. Every method returns what is new, in the order in which it was written."""

    def __init__(self, request_id: str, parallel: bool, spelled: tuple[str, ...]) -> None:
        """`spelled`: the markers that the vocabulary lacks, to be looked for in the text."""
        self._count = 0  # calls so far, those that are left out included
        self._request_id = request_id
        self._parallel = parallel
        self._finder = Finder(compile_patterns(spelled)) if spelled else None
        self._newlines = Newlines()
        self._body: Body | None = None
        self._after = False  # since the last call there was only whitespace
        self._content = False  # some content was shown

    @property
    def idle(self) -> bool:
        """Text without a newline at its end would be shown as it is, and nothing need be remembered of it."""
        settled = self._content and not self._after and not self._newlines.held
        return settled and self._body is None and self._finder is None

    def push(self, text: str) -> list[Piece]:
        """Read text that comes after thinking."""
        if self._finder is None:
            return self._text(text)
        pieces: list[Piece] = []
        for plain, marker in self._finder.split(text):
            pieces += self._text(plain)
            pieces += self._marker(marker) if marker else []
        return pieces

    def marker(self, marker: str) -> list[Piece]:
        """Read a marker that came as a token."""
        return self._flush_finder() + self._marker(marker)

    def finish(self, cut_off: bool) -> list[Piece]:
        """End the answer; `cut_off` by a limit."""
        pieces = self._flush_finder() + self._end_body("", cut_off)
        newlines = "" if self._after else self._newlines.release()
        return [*pieces, newlines] if newlines else pieces

    def _flush_finder(self) -> list[Piece]:
        return self._text(self._finder.flush()) if self._finder else []

    def _marker(self, marker: str) -> list[Piece]:
        if marker == CALL_CLOSE:
            return self._end_body(CALL_CLOSE) if self._body else self._say(CALL_CLOSE)
        pieces = self._end_body("")
        self._body = Body(self._count, lambda index: call_id(self._request_id, index))
        return pieces

    def _text(self, text: str) -> list[Piece]:
        if self._body is None:
            return self._say(text)
        pieces = self._show(self._body.push(text))
        if self._body.malformed:
            pieces += self._end_body("")
        return pieces

    def _end_body(self, marker: str, cut_off: bool = False) -> list[Piece]:
        """End what was open, at `marker` if there is one."""
        body, self._body = self._body, None
        if body is None:
            return []
        pieces = self._show(body.end(cut_off))
        if not body.names:
            return self._say(CALL_OPEN + body.rest + marker)
        self._count += len(body.names)
        self._after = True
        return pieces if marker else pieces + self._say(body.rest)

    def _show(self, deltas: list[ToolDelta]) -> list[Piece]:
        return [delta for delta in deltas if self._parallel or not delta.index]

    def _say(self, text: str) -> list[Piece]:
        if self._after:
            body = text.lstrip(" \t\r\n")
            self._newlines.held += text.count("\n", 0, len(text) - len(body))
            if not body:
                return []
            self._newlines.held *= self._content
            self._after = False
            text = body
        shown = self._newlines.push(text)
        self._content |= bool(shown)
        return [shown] if shown else []
