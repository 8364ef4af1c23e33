"""One request's way from tokens to an answer: detokenise, split off reasoning and tool calls, find stop strings.

The state is a function of the tokens folded so far, so replaying them rebuilds it, and a delta is a function of the
tokens between it and the one before. Its number is that of the last token that added something, not of the last that
was folded: so the same beginning of the answer has the same number however deltas were taken.

Stop strings are looked for in the reasoning and in the content, each as it is shown (after trimming), never across the
boundary between them or a tool call, and never inside a call. A match ends the answer with the token that made it
certain; what that token adds after the match is cut.
"""

from itertools import groupby
from typing import Literal, TypeVar

import msgspec

from services.postproc.detokenize import Detokenizer, Vocabulary
from services.postproc.reasoning import Reasoning
from services.postproc.stop import Stop
from services.postproc.thought_calls import ThoughtCalls
from services.postproc.tool_calls import Piece, ToolCalls
from services.postproc.usage import usage_of
from shared.errors import Failure, internal
from shared.messages import Begin, Delta, Finish, Request, ShownLogprob, TokenLogprob, ToolDelta

T = TypeVar("T")


class Parsers(msgspec.Struct, frozen=True):
    """Which of the model's conventions the server was told to read."""

    reasoning: bool = True
    tool_calls: bool = True
    tool_calls_in_reasoning: bool = True  # those at its end, if the model forgets </think>


class Answer:
    """The answer to one request, and what of it has not been taken yet."""

    __slots__ = (
        "_calls",
        "_content",
        "_detokenizer",
        "_ending",
        "_ids",
        "_logprobs",
        "_output",
        "_plain",
        "_reached",
        "_reasoned",
        "_reasoning",
        "_request_id",
        "_simple",
        "_sink",
        "_split",
        "_stop_content",
        "_stop_reasoning",
        "_thought_calls",
        "_tool_deltas",
        "_vocabulary",
        "answered",
        "begin",
        "called",
        "count",
        "ended",
        "taken",
        "unasked",
    )

    def __init__(self, request: Request, vocabulary: Vocabulary, parsers: Parsers) -> None:
        output = request.output
        self.begin: Begin | None = None  # what usage needs; the caller's to set before the finish
        self.count = 0  # tokens folded
        self.taken = 0  # the number of the delta taken last
        self.ended = False
        self.answered = False  # it ended well
        self.unasked = False  # it ended without the engine's doing, so the engine has to be told
        self._reached = 0  # tokens up to the last that added something
        self._request_id = request.id
        self._output = output
        self._vocabulary = vocabulary
        self._detokenizer = Detokenizer()
        self._split = Reasoning(output.thinking and parsers.reasoning)
        self._reasoned = 0  # tokens up to and including </think>, or before the first call
        self.called = False  # a call was shown
        self._calls: ToolCalls | None = None
        if output.tools and parsers.tool_calls:
            self._calls = ToolCalls(request.id, output.parallel_tool_calls, vocabulary.spelled_markers)
        self._thought_calls: ThoughtCalls | None = None
        if self._calls and self._split.open and output.functions and parsers.tool_calls_in_reasoning:
            self._thought_calls = ThoughtCalls(frozenset(output.functions), vocabulary.spelled_markers)
        self._stop_reasoning = Stop(output.stop, output.include_stop)
        self._stop_content = Stop(output.stop, output.include_stop)
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._tool_deltas: list[ToolDelta] = []
        self._logprobs: list[ShownLogprob] = []
        self._ids: list[int] = []
        self._ending: Literal["stop", "length", "tool_calls"] | Failure | None = (
            None  # a finish reason or a failure that was not taken yet
        )
        self._sink = self._reasoning if self._split.open else self._content
        # A plain token's text goes straight to the sink while nothing is held back and nobody looks at it.
        self._simple = not (output.stop or output.logprobs or output.return_token_ids)
        self._plain = False
        self._settle()

    # ------------------------------------------------------------------------------------------------ tokens in

    def push(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Fold the next token. After the end it does not count."""
        if self.ended:
            return
        if self._plain and (text := self._vocabulary.plain.get(token)) is not None:
            self.count = self._reached = self.count + 1
            self._sink.append(text)
            return
        self.count += 1
        self._fold(token, logprob)
        self._settle()

    def push_stop_token(self, token: int) -> None:
        """Fold the token that ended the answer: counted, listed among the ids, not shown."""
        if self.ended:
            return
        self.count += 1
        if self._output.return_token_ids:
            self._add(self._ids, token)

    def finish(self, finish: Finish) -> None:
        """The engine's end of the request."""
        if self.ended:
            return
        if finish.reason == "cancelled":
            self.ended = True
        elif finish.reason == "error":
            self.fail(finish.failure or internal("The engine failed to answer this request.").failure)
        else:
            self._flush(cut_off=finish.reason == "length")
            if not self.ended:
                self._end(finish.reason)

    def fail(self, failure: Failure) -> None:
        """The answer ends here, in an error."""
        self.ended = True
        self._ending = failure

    # ------------------------------------------------------------------------------------------------ deltas out

    def take(self) -> Delta | None:
        """What came since the last call; None if there is nothing to show."""
        if self._ending is not None or self._tool_deltas or self._logprobs or self._ids:
            return self._take_all()
        reasoning, content = self._reasoning, self._content
        if not reasoning and not content:
            return None
        start, self.taken = self.taken, self._reached
        delta = Delta(self._request_id, self._reached, "".join(reasoning), "".join(content), start=start)
        reasoning.clear()
        content.clear()
        return delta

    def _take_all(self) -> Delta:
        ending, self._ending = self._ending, None
        start, self.taken = self.taken, self._reached if ending is None else self.count + 1
        delta = Delta(
            self._request_id,
            self.taken,
            start=start,
            reasoning="".join(self._reasoning),
            content="".join(self._content),
            tool_calls=_joined(self._tool_deltas),
            logprobs=tuple(self._logprobs),
            token_ids=tuple(self._ids),
            prompt=self.begin.prompt if self.begin is not None and start == 0 else b"",
        )
        for taken in (self._reasoning, self._content, self._tool_deltas, self._logprobs, self._ids):
            taken.clear()
        if isinstance(ending, Failure):
            return msgspec.structs.replace(delta, failure=ending)
        if ending is None or self.begin is None:
            return delta
        reasoned = self.count if self._split.open else self._reasoned
        usage = usage_of(self.begin, self.count, reasoned)
        return msgspec.structs.replace(delta, finish_reason=ending, usage=usage)

    # ------------------------------------------------------------------------------------------------ in between

    def _settle(self) -> None:
        split, calls = self._split, self._thought_calls if self._split.open else self._calls
        shown_as_is = calls is None or calls.idle
        self._plain = self._simple and shown_as_is and split.idle and self._detokenizer.idle

    def _fold(self, token: int, logprob: TokenLogprob | None) -> None:
        if self._output.logprobs and logprob is not None:
            self._add(self._logprobs, self._shown(token, logprob))
        if self._output.return_token_ids:
            self._add(self._ids, token)
        vocabulary, split, calls, thought_calls = self._vocabulary, self._split, self._calls, self._thought_calls
        if split.open and thought_calls and not thought_calls.holding:
            self._reasoned = self.count - 1
        if split.open and token == vocabulary.think_end:
            self._route(self._detokenizer.flush())
            self._think(thought_calls.release() if thought_calls else "")
            self._end_reasoning()
            self._reasoned = self.count
        elif split.open and thought_calls and token in vocabulary.call_markers:
            self._route(self._detokenizer.flush())
            self._think(thought_calls.marker(vocabulary.call_markers[token]))
        elif calls and not split.open and token in vocabulary.call_markers:
            self._route(self._detokenizer.flush())
            split.said()
            self._show(calls.marker(vocabulary.call_markers[token]))
        else:
            self._route(self._detokenizer.push(vocabulary.bytes_of(token)))

    def _shown(self, token: int, logprob: TokenLogprob) -> ShownLogprob:
        def text_and_bytes(token: int) -> tuple[str, bytes]:
            data = self._vocabulary.bytes_of(token)
            return data.decode("utf-8", "replace"), data

        top = tuple((*text_and_bytes(other), value) for other, value in logprob.top)
        return ShownLogprob(*text_and_bytes(token), logprob.logprob, top)

    def _route(self, text: str) -> None:
        if self._split.open:
            self._think(self._thought_calls.push(text) if self._thought_calls else text)
            return
        text = self._split.say(text)
        if self._calls:
            self._show(self._calls.push(text))
        else:
            self._say(text)

    def _end_reasoning(self) -> None:
        if self.ended:
            return
        self._split.end()
        self._write(self._reasoning, self._stop_reasoning.flush())
        self._sink = self._content

    def _think(self, text: str) -> None:
        self._show_thought(self._split.think(text))

    def _show_thought(self, text: str) -> None:
        self._write(self._reasoning, self._stop_reasoning.push(text))
        if self._stop_reasoning.matched:
            self._end_by_stop_string()

    def _say(self, text: str) -> None:
        self._write(self._content, self._stop_content.push(text))
        if self._stop_content.matched:
            self._end_by_stop_string()

    def _show(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if self.ended:
                return
            if isinstance(piece, str):
                self._say(piece)
            else:
                if piece.name is not None:
                    self._write(self._content, self._stop_content.flush())
                    self.called = True
                self._add(self._tool_deltas, piece)

    def _write(self, sink: list[str], text: str) -> None:
        if text:
            self._add(sink, text)

    def _add(self, sink: list[T], piece: T) -> None:
        sink.append(piece)
        self._reached = self.count

    def _flush(self, cut_off: bool) -> None:
        """Show what was held back; nothing can follow. It may still complete a stop string."""
        self._route(self._detokenizer.flush())
        if self._split.open and self._thought_calls:
            self._flush_thought_calls(self._thought_calls, cut_off)
        if self._split.open:
            self._show_thought(self._split.finish())
            self._write(self._reasoning, self._stop_reasoning.flush())
            return
        if self._calls:
            self._show(self._calls.finish(cut_off))
        self._write(self._content, self._stop_content.flush())

    def _flush_thought_calls(self, thought_calls: ThoughtCalls, cut_off: bool) -> None:
        text, held = (thought_calls.release(), []) if cut_off else thought_calls.finish()
        self._think(text)
        if held and self._calls:
            self._end_reasoning()
            for piece in held:
                self._show(self._calls.marker(piece.text) if piece.is_marker else self._calls.push(piece.text))

    def _end_by_stop_string(self) -> None:
        if not self.ended:
            self.unasked = True
            self._end("stop")

    def _end(self, reason: Literal["stop", "length"]) -> None:
        self.ended = True
        if self.begin is None:
            self.fail(internal("The answer ended before the engine said what the prompt was.").failure)
            return
        self.answered = True
        self._ending = "tool_calls" if reason == "stop" and self.called else reason


def _joined(deltas: list[ToolDelta]) -> tuple[ToolDelta, ...]:
    """Fragments of one call that follow each other become one; the name stays a piece of its own."""
    joined: list[ToolDelta] = []
    for (index, named), group in groupby(deltas, lambda delta: (delta.index, delta.name is not None)):
        same = list(group)
        joined += same if named else [ToolDelta(index, None, None, "".join(delta.arguments for delta in same))]
    return tuple(joined)
