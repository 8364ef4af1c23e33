"""The tool-call parser `ernie-45-vl-thinking`: which of the content is text and which is calls.

After thinking the model writes `<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>`, any number of times:

- A marker is its token where the vocabulary has one, and then ordinary tokens that spell it are text; otherwise it is
  its spelling. A marker always acts, even inside a JSON string. </tool_call> that closes nothing is text. A call that
  is still open when another opens, or when the answer ends, ends there.
- Text before, between and after calls is content. Newlines at the end of the text before a call and whitespace after
  one separate; they are shown (the newlines) only if text comes on both sides.
- The body is read as tool_json says. Of what stands between the end of the object and </tool_call> nothing is shown;
  if </tool_call> does not come, it is content.
- A malformed call is text: marker and body as written. Nothing of it has been shown before that is known.
- A call that a limit cuts off keeps what was shown of it, streamed or not; if its name was not complete, it is text.
- With parallel calls off, the first call is the only one; later ones are read and left out.
"""

from hashlib import blake2b

from services.postproc.text.detokenize import CALL_CLOSE, CALL_OPEN
from services.postproc.text.reasoning import Newlines
from services.postproc.text.stop import Finder, compile_patterns
from services.postproc.text.tool_json import Call
from shared.messages import ToolDelta

Piece = str | ToolDelta  # content, or a part of a call


def call_id(request_id: str, index: int) -> str:
    """The id clients answer a call by; the same whenever the request is replayed."""
    return "call_" + blake2b(f"{request_id}:{index}".encode(), digest_size=12).hexdigest()


class ToolCalls:
    """The calls of one answer. Every method returns what is new, in the order in which it was written."""

    def __init__(self, request_id: str, parallel: bool, spelled: tuple[str, ...]) -> None:
        """`spelled`: the markers that the vocabulary lacks, to be looked for in the text."""
        self._count = 0  # calls with a name, but for those that are left out
        self._request_id = request_id
        self._parallel = parallel
        self._finder = Finder(compile_patterns(spelled)) if spelled else None
        self._newlines = Newlines()
        self._call: Call | None = None
        self._after = False  # since the last call there was only whitespace
        self._content = False  # some content was shown

    @property
    def idle(self) -> bool:
        """Text without a newline at its end would be shown as it is, and nothing need be remembered of it."""
        settled = self._content and not self._after and not self._newlines.held
        return settled and self._call is None and self._finder is None

    def push(self, text: str) -> list[Piece]:
        """Text that comes after thinking."""
        if self._finder is None:
            return self._text(text)
        pieces: list[Piece] = []
        at = 0
        while at < len(text):
            plain, marker, at = self._finder.push(text, at)
            pieces += self._text(plain)
            pieces += self._marker(marker) if marker else []
        return pieces

    def marker(self, marker: str) -> list[Piece]:
        """A marker that came as a token."""
        return self._flush_finder() + self._marker(marker)

    def finish(self, cut_off: bool) -> list[Piece]:
        """The answer is over; `cut_off` by a limit."""
        pieces = self._flush_finder() + self._end_call("", cut_off)
        newlines = "" if self._after else self._newlines.release()
        return [*pieces, newlines] if newlines else pieces

    def _flush_finder(self) -> list[Piece]:
        return self._text(self._finder.flush()) if self._finder else []

    def _marker(self, marker: str) -> list[Piece]:
        if marker == CALL_CLOSE:
            return self._end_call(CALL_CLOSE) if self._call else self._say(CALL_CLOSE)
        pieces = self._end_call("")
        self._call = Call(self._count, call_id(self._request_id, self._count))
        return pieces

    def _text(self, text: str) -> list[Piece]:
        if self._call is None:
            return self._say(text)
        pieces = self._show(self._call, self._call.push(text))
        if self._call.malformed:
            pieces += self._as_text(self._call, "")
            self._call = None
        return pieces

    def _end_call(self, marker: str, cut_off: bool = False) -> list[Piece]:
        """What was open ends, at `marker` if there is one."""
        call, self._call = self._call, None
        if call is None:
            return []
        if call.name is None:
            return self._as_text(call, marker)
        pieces = [] if cut_off else self._show(call, call.end())
        self._after = True
        return pieces if marker else pieces + self._say("".join(call.tail))

    def _as_text(self, call: Call, marker: str) -> list[Piece]:
        return self._say(CALL_OPEN + "".join(call.raw) + marker)

    def _show(self, call: Call, deltas: list[ToolDelta]) -> list[Piece]:
        if call.index and not self._parallel:
            return []
        if any(delta.name for delta in deltas):
            self._count += 1
        return [*deltas]

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
