"""Events of a streamed response, with sequence numbers that are a function of the answer alone.

An event of text (reasoning, content, arguments) has the number of its last character, every other event the next
number: so numbers grow by one, or by the characters of a delta. Deltas may be cut or merged on their way, and they are,
for readers that lag or come back; the same number always stands for the same beginning of the answer. Whoever has read
up to a number gets exactly what follows it, of a text from the next character on, wherever the answer is read.

Items come in the order of `answered.py`: what the model says behind its first call is held until the end.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from services.gateway.dialects.chat_events import DONE, quote
from services.gateway.dialects.dialect import TextFormat
from services.gateway.dialects.responses.answered import (
    Answered,
    Call,
    as_delta,
    call_item,
    content_logprobs,
    failed,
    message_id,
    message_item,
    output_items,
    reasoning_item,
    reasoning_part,
    text_part,
)
from services.gateway.dialects.responses.resource import Head, resource, unanswered
from services.gateway.errors import SHUTTING_DOWN
from services.gateway.inflight.request import OpenRequest
from shared.errors import Failure, internal
from shared.messages import Delta, ShownLogprob, ToolDelta, Usage

NO_USAGE = internal("An answer ended without its usage.").failure

_json = msgspec.json.Encoder()
# Some clients take these characters for line ends and would cut the event in two.
_LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


class NumberedEvents:
    """Numbers events, and leaves out those that the reader has."""

    def __init__(self, after: int) -> None:
        """`after`: the number up to which the reader has the stream; -1: nothing."""
        self._after = after
        self._next = 0
        self.written: list[bytes] = []

    @property
    def last(self) -> int:
        """The number of the newest event."""
        return self._next - 1

    def skip(self) -> None:
        """Let the next event be new to the reader: nobody knows how far an answer was that has failed."""
        self._next = max(self._next, self._after + 1)

    def add(self, kind: str, fields: dict[str, Any]) -> None:
        """Append an event."""
        number, self._next = self._next, self._next + 1
        if number > self._after:
            self.written.append(_event(kind, number, _one_line(fields)[1:-1]))

    def add_text(self, kind: str, place: bytes, text: str) -> None:
        """Append an event of text; `place`, its other fields, is JSON without braces."""
        first, self._next = self._next, self._next + len(text)
        if self.last <= self._after:
            return
        rest = text[max(0, self._after + 1 - first) :]
        self.written.append(_event(kind, self.last, place + b',"delta":' + quote(rest)))

    def take(self) -> bytes:
        """Return the events since the last call."""
        written = b"".join(self.written)
        self.written.clear()
        return written


class ItemWords(msgspec.Struct, frozen=True):
    """Names in the events of an item with one part."""

    text: str  # of its text's events, without .delta and .done
    part: str = ""  # of its part's events, without .added and .done; empty: a call, which has none
    index: str = ""  # the field with the part's index


MESSAGE = ItemWords("response.output_text", "response.content_part", "content_index")
REASONING = ItemWords("response.reasoning_text", "response.content_part", "content_index")
SUMMARY = ItemWords("response.reasoning_summary_text", "response.reasoning_summary_part", "summary_index")
CALL = ItemWords("response.function_call_arguments")


class OpenItem:
    """An output item that is being written."""

    def __init__(self, index: int, item: dict[str, Any], words: ItemWords) -> None:
        self.index = index
        self.item = item
        self.words = words
        self._text: list[str] = []
        where: dict[str, Any] = {"item_id": item["id"], "output_index": index}
        self.where = {**where, words.index: 0} if words.index else where
        self.place = _one_line(self.where)[1:-1]

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._text)

    def append(self, text: str) -> None:
        """Append to its text."""
        self._text.append(text)


class ResponseEvents:
    """Writer of one response's events."""

    def __init__(
        self,
        head: Head,
        logprobs: bool,
        after: int,
        ended: Callable[[Answered], None],
        known: Answered | None = None,
    ) -> None:
        """`logprobs`: they are wanted, and known at the end only. `ended` is told the answer when it is complete.
        `known`: the answer, if that has ended before."""
        self._known = known
        self._head = head
        self._form = head.form
        self._wants_logprobs = logprobs
        self._ended = ended
        self._events = NumberedEvents(after)
        self._count = 0  # items so far
        self._reasoning: OpenItem | None = None
        self._message: OpenItem | None = None
        self._calls: dict[int, tuple[OpenItem, Call]] = {}
        self._open: list[OpenItem] = []  # in their order
        self._later: list[str] = []
        self._logprobs: list[ShownLogprob] = []
        self._finish: str | None = None
        self._usage: Usage | None = None

    @property
    def keep_alive(self) -> bytes:
        """A comment."""
        return b": keep-alive\n\n"

    def begin(self) -> bytes:
        """Return the events that come before any token."""
        started = {"response": unanswered(self._head, "in_progress")}
        self._events.add("response.created", started)
        self._events.add("response.in_progress", started)
        return self._events.take()

    def text_format(self, index: int) -> TextFormat:
        """Return the formatter of any delta: events are numbered."""
        return partial(self.delta, index)

    def delta(self, _index: int, delta: Delta, _skip: int = 0) -> bytes:
        """Return the events of a delta."""
        self._logprobs += delta.logprobs
        if delta.reasoning:
            self._add_reasoning(delta.reasoning)
        end = 0 if self._calls else len(delta.content) - delta.later
        if end > 0:
            self._add_content(delta.content[:end])
        for piece in delta.tool_calls:
            self._add_call(piece)
        self._later.append(delta.content[end:])
        if delta.finish_reason is not None:
            self._finish, self._usage = delta.finish_reason, delta.usage
            self._finish_items()
        return self._events.take()

    def end(self, request: OpenRequest) -> bytes:
        """Return the last event."""
        if request.failure is SHUTTING_DOWN:
            return self._interrupted(request.failure)
        failure = request.failure
        if failure is None and self._usage is None:
            failure = NO_USAGE
        if failure is not None:
            return self.last(failed(failure))
        answered = self._known or self.answered(int(time.time()))
        self._ended(answered)
        return self.last(answered)

    def last(self, answered: Answered) -> bytes:
        """Return the event of an answer's end, and the mark of the end."""
        kind = answered.status
        if kind not in ("completed", "incomplete"):
            kind = "failed"
            self._events.skip()
        self._events.add(f"response.{kind}", {"response": resource(self._head, answered)})
        return self._events.take() + DONE

    def answered(self, completed_at: int) -> Answered:
        """Return the answer that has ended."""
        content = self._message.text if self._message else ""
        return Answered(
            reasoning=self._reasoning.text if self._reasoning else "",
            content=content,
            calls=tuple(_call(*self._calls[index]) for index in sorted(self._calls)),
            later="".join(self._later),
            logprobs=content_logprobs(tuple(self._logprobs), self._usage, content),
            finish_reason=self._finish,
            usage=self._usage,
            completed_at=completed_at,
        )

    # ------------------------------------------------------------------------------------------------ items

    def _add_reasoning(self, text: str) -> None:
        if self._reasoning is None:
            summarized = self._form.summarized
            item = reasoning_item(self._head.request_id, None, self._form, "in_progress")
            part = reasoning_part("", summarized)
            self._reasoning = self._begin_item(item, part, SUMMARY if summarized else REASONING)
        self._add_text(self._reasoning, text)

    def _add_content(self, text: str) -> None:
        if self._message is None:
            self._begin_message()
        assert self._message is not None
        self._add_text(self._message, text)

    def _begin_message(self) -> None:
        self._close_items("reasoning")
        item = message_item(message_id(self._head.request_id), None, (), "in_progress")
        self._message = self._begin_item(item, text_part("", ()), MESSAGE)

    def _add_call(self, piece: ToolDelta) -> None:
        if piece.index not in self._calls:
            # The log-probabilities of a message are known at the end.
            self._close_items("reasoning", "function_call", *(() if self._wants_logprobs else ("message",)))
            call = Call(piece.id or "", piece.name or "", "")
            item = call_item(self._head.request_id, piece.index, call, self._form.spaces, "in_progress")
            self._calls[piece.index] = (self._begin_item(item, None, CALL), call)
        if piece.arguments:
            self._add_text(self._calls[piece.index][0], piece.arguments)

    def _finish_items(self) -> None:
        if self._message is None and not self._calls and self._finish != "length":
            self._begin_message()
        later = "".join(self._later)
        answered = self._known or self.answered(0)
        statuses = {item["id"]: item["status"] for item in output_items(self._head.request_id, answered, self._form)}
        for opened in list(self._open):
            self._close(opened, statuses[opened.item["id"]], answered.logprobs)
        if later:
            item = message_item(message_id(self._head.request_id, later=True), None, (), "in_progress")
            opened = self._begin_item(item, text_part("", ()), MESSAGE)
            self._add_text(opened, later)
            self._close(opened, statuses[item["id"]])

    def _begin_item(self, item: dict[str, Any], part: dict[str, Any] | None, words: ItemWords) -> OpenItem:
        opened = OpenItem(self._count, item, words)
        self._count += 1
        self._open.append(opened)
        self._events.add("response.output_item.added", {"output_index": opened.index, "item": item})
        if part is not None:
            self._events.add(f"{words.part}.added", {**opened.where, "part": part})
        return opened

    def _add_text(self, opened: OpenItem, text: str) -> None:
        opened.append(text)
        # OpenAI's has the key always. Ours are known at the end only, where the answer does not depend on its deltas.
        place = opened.place + b',"logprobs":[]' if opened.item["type"] == "message" else opened.place
        self._events.add_text(f"{opened.words.text}.delta", place, text)

    def _close_items(self, *kinds: str) -> None:
        for opened in list(self._open):
            if opened.item["type"] in kinds:
                self._close(opened, "completed")

    def _close(self, opened: OpenItem, status: str, logprobs: Sequence[ShownLogprob] = ()) -> None:
        self._open.remove(opened)
        text, item, words = opened.text, opened.item, opened.words
        if item["type"] == "function_call":
            done = {**item, "status": status, "arguments": text}
            fields = {**opened.where, "name": item["name"], "arguments": text}
            self._events.add(f"{words.text}.done", fields)
        elif item["type"] == "reasoning":
            done = reasoning_item(self._head.request_id, text, self._form, status)
            self._events.add(f"{words.text}.done", {**opened.where, "text": text})
            part = reasoning_part(text, self._form.summarized)
            self._events.add(f"{words.part}.done", {**opened.where, "part": part})
        else:
            part = text_part(text, tuple(logprobs))
            done = {**item, "status": status, "content": [part]}
            fields = {**opened.where, "text": text, "logprobs": part["logprobs"]}
            self._events.add(f"{words.text}.done", fields)
            self._events.add(f"{words.part}.done", {**opened.where, "part": part})
        self._events.add("response.output_item.done", {"output_index": opened.index, "item": done})

    def _interrupted(self, failure: Failure) -> bytes:
        """Return an error that ends this stream and not the response. It takes no number: the stream goes on after it.

        The number it shows is that of the last event, so that a client asks for the right rest.
        """
        fields = {"code": failure.code, "message": failure.message, "param": failure.param}
        return _event("error", self._events.last, _one_line(fields)[1:-1]) + DONE


def replay(head: Head, logprobs: bool, answered: Answered, after: int) -> bytes:
    """Return the events of an answer that has ended, from the one behind the number `after` on."""
    events = ResponseEvents(head, logprobs, after, lambda _: None, answered)
    written = events.begin()
    if answered.status in ("completed", "incomplete"):
        written += events.delta(0, as_delta(answered))
    return written + events.last(answered)


def _call(opened: OpenItem, call: Call) -> Call:
    return Call(call.id, call.name, opened.text)


def _event(kind: str, number: int, fields: bytes) -> bytes:
    name = kind.encode()
    return b'event: %b\ndata: {"type":"%b","sequence_number":%d,%b}\n\n' % (name, name, number, fields)


def _one_line(value: Any) -> bytes:
    encoded = _json.encode(value)
    for raw, escaped in _LINE_ENDS:
        encoded = encoded.replace(raw, escaped)
    return encoded
