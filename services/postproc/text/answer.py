"""Fold one request's tokens into an answer: detokenise, split off reasoning and tool calls, find stop strings.

The state is a function of the tokens folded so far, so replaying them rebuilds it, and a delta is a function of the
tokens between it and the one before. Its number is that of the last token that added something, not of the last that
was folded: so the same beginning of the answer has the same number however deltas were taken.

Stop strings are looked for in the content, and in the reasoning if the request says so, each as it is shown (after
trimming), never across the boundary between them or a tool call, and never inside a call. A match ends the answer with
the token that made it certain; what that token adds after the match is cut.
"""

from enum import Enum
from itertools import groupby
from typing import Literal, TypeVar

import msgspec

from services.postproc.text.detokenize import Detokenizer, Vocabulary
from services.postproc.text.reasoning import ReasoningSplit
from services.postproc.text.reasoning_calls import ReasoningCalls
from services.postproc.text.stop import StopStrings
from services.postproc.text.tool_calls import Piece, ToolCalls
from services.postproc.text.usage import usage_of
from shared.errors import Failure, internal
from shared.messages import Begin, Delta, Finish, Request, ShownLogprob, TokenLogprob, ToolDelta, Usage

T = TypeVar("T")


class Parsers(msgspec.Struct, frozen=True):
    """The model's conventions that are parsed; what is not parsed is content."""

    reasoning: bool = True
    tool_calls: bool = True
    tool_calls_in_reasoning: bool = True  # those at its end, if the model forgets </think>


class AnswerState(Enum):
    """State of an answer. Only `Answer` writes it, and it leaves OPEN once: by a token that completes a stop string
    (`push_token`), by the engine's finish (`apply_finish`), or by an error of postproc's own (`fail`).
    """

    OPEN = "open"
    FINISHED = "finished"  # the engine finished it: a stop token or a limit
    STOPPED = "stopped"  # a stop string ended it, of which the engine has to be told
    CANCELLED = "cancelled"  # its readers have left: there is no last delta
    FAILED = "failed"  # the last delta carries a failure


_OPEN = AnswerState.OPEN  # looked up for every token


class Answer:
    """The answer to one request, and the part of it that no delta has carried yet."""

    __slots__ = (
        "_bytes_of",
        "_calls",
        "_content",
        "_detokenizer",
        "_ending",
        "_fallback",
        "_ids",
        "_later",
        "_logprobs",
        "_output",
        "_plain",
        "_plain_text",
        "_reached",
        "_reasoned",
        "_reasoning",
        "_reasoning_calls",
        "_reasons",
        "_request_id",
        "_shows_reasoning",
        "_simple",
        "_split",
        "_stop_content",
        "_stop_found",
        "_stop_reasoning",
        "_tool_deltas",
        "_touched",
        "_usage_due",
        "_vocabulary",
        "begin",
        "called",
        "count",
        "state",
        "taken",
    )

    def __init__(self, request: Request, vocabulary: Vocabulary, parsers: Parsers) -> None:
        output = request.output
        self.begin: Begin | None = None  # its counts go into the usage; set by the caller, before the finish
        self.count = 0  # tokens folded
        self.taken = 0  # sequence number of the delta that was taken last
        self.state = AnswerState.OPEN
        self._reached = 0  # tokens up to the last that added something
        self._request_id = request.id
        self._output = output
        self._vocabulary = vocabulary
        self._bytes_of = vocabulary.bytes_or_name_of if output.special_tokens else vocabulary.bytes_of
        self._detokenizer = Detokenizer()
        self._split = ReasoningSplit(output.thinking and parsers.reasoning and output.separate_reasoning)
        self._shows_reasoning = output.include_reasoning
        # The reasoning so far, to be the content if there is none; None if it is not wanted as that, or not any more.
        self._fallback: list[str] | None = [] if output.force_nonempty_content else None
        self._reasoned = 0  # tokens up to and including </think>, or before the first call
        self.called = False  # a tool call was shown
        self._calls: ToolCalls | None = None
        if output.tools and parsers.tool_calls:
            self._calls = ToolCalls(request.id, output.parallel_tool_calls, vocabulary.spelled_markers)
        self._reasoning_calls: ReasoningCalls | None = None
        if self._calls and self._split.open and output.functions and parsers.tool_calls_in_reasoning:
            self._reasoning_calls = ReasoningCalls(frozenset(output.functions), vocabulary.spelled_markers)
        self._stop_reasoning = StopStrings(output.stop if output.stop_in_reasoning else (), output.include_stop)
        self._stop_content = StopStrings(output.stop, output.include_stop)
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._tool_deltas: list[ToolDelta] = []
        self._logprobs: list[ShownLogprob] = []
        self._ids: list[int] = []
        self._later = 0  # characters at the end of the content that stand behind the first call
        # A finish reason or a failure that no delta has carried yet.
        self._ending: Literal["stop", "length", "tool_calls"] | Failure | None = None
        self._reasons = self._split.open  # a plain token is reasoning
        # The text of a plain token is shown as it is while no parser holds text back or waits for some.
        details = output.logprobs or output.return_token_ids or output.force_nonempty_content
        self._simple = not (output.stop or details)
        self._plain = False
        # The text of plain tokens that no delta has carried yet. The rest is looked at only if something else came.
        self._plain_text = ""
        self._touched = False
        self._usage_due = output.first_usage or output.continuous_usage
        self._stop_found = ""
        self._update_plain()

    @property
    def ended(self) -> bool:
        return self.state is not _OPEN

    @property
    def succeeded(self) -> bool:
        """True if the answer ended with a finish reason."""
        return self.state in (AnswerState.FINISHED, AnswerState.STOPPED)

    # ------------------------------------------------------------------------------------------------ tokens in

    def push_token(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Fold the next token. After the end it does not count."""
        if self.state is not _OPEN:
            return
        if self._plain and (text := self._vocabulary.plain.get(token)) is not None:
            self.count = self._reached = self.count + 1
            self._plain_text += text
            return
        self._touch()
        self.count += 1
        self._fold(token, logprob)
        self._update_plain()

    def push_stop_token(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Fold the token that ended the answer: it is counted and listed among the ids, not shown."""
        if self.ended:
            return
        self._touch()
        self.count += 1
        if self._output.return_token_ids:
            self._add(self._ids, token)
        if self._output.logprobs and self._output.complete_logprobs and logprob is not None:
            self._add(self._logprobs, self._shown(token, logprob))

    def apply_finish(self, finish: Finish) -> None:
        """End the answer as the engine says, unless it has ended before."""
        if self.ended:
            return
        self._touch()
        if finish.reason == "cancelled":
            self.state = AnswerState.CANCELLED
        elif finish.reason == "error":
            self.fail(finish.failure or internal("The engine failed to answer this request.").failure)
        else:
            self._flush(cut_off=finish.reason == "length")
            if not self.ended:
                self._succeed(AnswerState.FINISHED, finish.reason)

    def fail(self, failure: Failure) -> None:
        """End the answer in an error."""
        self._touch()
        self.state = AnswerState.FAILED
        self._ending = failure

    # ------------------------------------------------------------------------------------------------ deltas out

    def take_delta(self) -> Delta | None:
        """Return what was added since the last call; None if there is nothing to show."""
        text = self._plain_text
        if self._touched or (self._usage_due and text):
            self._touch()
            self._touched = False
            shown = self._reasoning or self._content or self._tool_deltas or self._logprobs or self._ids
            return self._take_all() if shown or self._later or self._ending is not None else None
        if not text:
            return None
        self._plain_text = ""
        start, self.taken = self.taken, self._reached
        if self._reasons:
            return Delta(self._request_id, self._reached, text, start=start)
        return Delta(self._request_id, self._reached, "", text, start=start)

    def _touch(self) -> None:
        """Put the text of plain tokens before what comes now, which is something else."""
        self._touched = True
        if self._plain_text:
            (self._reasoning if self._reasons else self._content).append(self._plain_text)
            self._plain_text = ""

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
            prompt_logprobs=self.begin.prompt_logprobs if self.begin is not None and start == 0 else None,
            later=self._later,
        )
        self._later = 0
        for taken in (self._reasoning, self._content, self._tool_deltas, self._logprobs, self._ids):
            taken.clear()
        if isinstance(ending, Failure):
            return msgspec.structs.replace(delta, failure=ending)
        if self.begin is None or (ending is None and not self._usage_due):
            return delta
        self._usage_due = self._output.continuous_usage
        usage = self._usage(self.begin, self._reached if ending is None else self.count)
        stop = "" if ending is None else self._stop_found
        return msgspec.structs.replace(delta, finish_reason=ending, usage=usage, stop=stop)

    def _usage(self, begin: Begin, count: int) -> Usage:
        """Return the usage of the first `count` tokens."""
        return usage_of(begin, count, count if self._split.open else min(count, self._reasoned))

    # ------------------------------------------------------------------------------------------------ in between

    def _update_plain(self) -> None:
        split, calls = self._split, self._reasoning_calls if self._split.open else self._calls
        shown_as_is = calls is None or calls.idle
        shown_as_is = shown_as_is and (self._shows_reasoning or not split.open)
        self._plain = self._simple and not self.called and shown_as_is and split.idle and self._detokenizer.idle

    def _fold(self, token: int, logprob: TokenLogprob | None) -> None:
        if self._output.logprobs and logprob is not None and (self._shows_reasoning or not self._split.open):
            self._add(self._logprobs, self._shown(token, logprob))
        if self._output.return_token_ids:
            self._add(self._ids, token)
        vocabulary, split, calls, reasoning_calls = self._vocabulary, self._split, self._calls, self._reasoning_calls
        if split.open and reasoning_calls and not reasoning_calls.holding:
            self._reasoned = self.count - 1
        if split.open and token == vocabulary.think_end:
            self._route(self._detokenizer.flush())
            self._add_reasoning(reasoning_calls.release() if reasoning_calls else "")
            self._end_reasoning()
            self._reasoned = self.count
        elif split.open and reasoning_calls and token in vocabulary.call_markers:
            self._route(self._detokenizer.flush())
            self._add_reasoning(reasoning_calls.read_marker(vocabulary.call_markers[token]))
        elif calls and not split.open and token in vocabulary.call_markers:
            self._route(self._detokenizer.flush())
            split.begin_content()
            self._show_pieces(calls.read_marker(vocabulary.call_markers[token]))
        else:
            self._route(self._detokenizer.decode(self._bytes_of(token)))

    def _shown(self, token: int, logprob: TokenLogprob) -> ShownLogprob:
        """Return a token's log-probability with the texts and bytes of the tokens in it."""

        def text_and_bytes(token: int) -> tuple[str, bytes]:
            data = self._bytes_of(token)
            named = self._vocabulary.bytes_or_name_of(token) if self._output.complete_logprobs else data
            return named.decode("utf-8", "replace"), data

        top = tuple((*text_and_bytes(other), value) for other, value in logprob.top)
        return ShownLogprob(*text_and_bytes(token), logprob.logprob, top)

    def _route(self, text: str) -> None:
        """Append text to the part of the answer that is open: reasoning, or content and calls."""
        if self._split.open:
            self._add_reasoning(self._reasoning_calls.read_text(text) if self._reasoning_calls else text)
            return
        text = self._split.add_content(text)
        if self._calls:
            self._show_pieces(self._calls.read_text(text))
        else:
            self._show_content(text)

    def _end_reasoning(self) -> None:
        if self.ended:
            return
        self._split.end_reasoning()
        self._write_reasoning(self._stop_reasoning.flush())
        self._reasons = False

    def _add_reasoning(self, text: str) -> None:
        self._show_reasoning(self._split.add_reasoning(text))

    def _show_reasoning(self, text: str) -> None:
        self._write_reasoning(self._stop_reasoning.filter(text))
        if self._stop_reasoning.matched:
            self._end_by_stop_string(self._stop_reasoning.matched)

    def _show_content(self, text: str) -> None:
        self._write_content(self._stop_content.filter(text))
        if self._stop_content.matched:
            self._end_by_stop_string(self._stop_content.matched)

    def _show_pieces(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if self.ended:
                return
            if isinstance(piece, str):
                self._show_content(piece)
            else:
                if piece.name is not None:
                    self._write_content(self._stop_content.flush())
                    self.called = True
                self._add(self._tool_deltas, piece)

    def _write_reasoning(self, text: str) -> None:
        if self._fallback is not None:
            self._fallback.append(text)
        if self._shows_reasoning:
            self._write(self._reasoning, text)

    def _write_content(self, text: str) -> None:
        if text.strip():
            self._fallback = None
        if self.called:
            self._later += len(text)
        self._write(self._content, text)

    def _write(self, sink: list[str], text: str) -> None:
        if text:
            self._add(sink, text)

    def _add(self, sink: list[T], piece: T) -> None:
        sink.append(piece)
        self._reached = self.count

    def _flush(self, cut_off: bool) -> None:
        """Show the text that was held back, since none can follow. It may still complete a stop string."""
        self._route(self._detokenizer.flush())
        if self._split.open and self._reasoning_calls:
            self._flush_reasoning_calls(self._reasoning_calls, cut_off)
        if self._split.open:
            self._show_reasoning(self._split.release_reasoning())
            self._write_reasoning(self._stop_reasoning.flush())
            return
        if self._calls:
            self._show_pieces(self._calls.end_answer(cut_off))
        self._write_content(self._stop_content.flush())

    def _flush_reasoning_calls(self, reasoning_calls: ReasoningCalls, cut_off: bool) -> None:
        text, held = (reasoning_calls.release(), []) if cut_off else reasoning_calls.end_answer()
        self._add_reasoning(text)
        if held and self._calls:
            self._end_reasoning()
            for piece in held:
                self._show_pieces(
                    self._calls.read_marker(piece.text) if piece.is_marker else self._calls.read_text(piece.text)
                )

    def _end_by_stop_string(self, stop: str) -> None:
        if not self.ended:
            self._stop_found = stop
            self._succeed(AnswerState.STOPPED, "stop")

    def _succeed(self, state: AnswerState, reason: Literal["stop", "length"]) -> None:
        if self.begin is None:
            self.fail(internal("The answer ended before the engine said what the prompt was.").failure)
            return
        self.state = state
        if self._fallback is not None and not self.called:
            self._write_content("".join(self._fallback).strip("\n"))
        called = self.called and not self._output.named_tool
        self._ending = "tool_calls" if reason == "stop" and called else reason


def _joined(deltas: list[ToolDelta]) -> tuple[ToolDelta, ...]:
    """Join fragments of one call that follow each other; a call's name stays a piece of its own."""
    joined: list[ToolDelta] = []
    for (index, named), group in groupby(deltas, lambda delta: (delta.index, delta.name is not None)):
        same = list(group)
        joined += same if named else [ToolDelta(index, None, None, "".join(delta.arguments for delta in same))]
    return tuple(joined)
