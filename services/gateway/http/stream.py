"""Writer of the deltas of one stream: at once from the inbox's turn while the connection takes them, else by a task."""

import asyncio
from collections.abc import Sequence

from starlette.types import Send

from services.gateway.dialects.dialect import EventWriter, TextFormat
from services.gateway.dialects.merge import is_text, merge_text
from services.gateway.http.direct import DirectBody
from services.gateway.inflight.request import OpenRequest
from shared.messages import Delta


class StreamWriter:
    """Writer of one stream between its head and its end.

    A token costs the write and little else as long as the client reads: no task is woken for it. The task writes what
    has to wait for something: for the client, for another thread, for the end.
    """

    __slots__ = ("_body", "_events", "_open_request", "_send")

    def __init__(self, open_request: OpenRequest, events: EventWriter, send: Send, body: DirectBody | None) -> None:
        """`send` and `body` are the server's own; without a `body` the task writes everything.

        So it does if the prompt's log-probabilities come, many megabytes at times, for which no stream should wait.
        """
        self._open_request = open_request
        self._events = events
        self._send = send
        self._body = body if body is not None and body.is_chunked else None
        if open_request.answer_format.prompt_logprobs:
            self._body = None

    async def run(self) -> None:
        """Write until the answer has ended."""
        open_request = self._open_request
        while not open_request.done:
            deltas = await open_request.queue.next_deltas(self)
            if deltas:
                if any(one.prompt_logprobs for _, one in deltas):
                    data = await asyncio.to_thread(self._format, deltas)
                else:
                    data = self._format(deltas)
                await self.send(data)
                open_request.mark_client_has_id()
            elif not open_request.done:
                await self.send(self._events.keep_alive)

    def write_now(self, deltas: Sequence[tuple[int, Delta]]) -> bool:
        """Write deltas without waiting, while the task waits for some; return False if that cannot be."""
        if self._body is None or not self._body.is_ready:
            return False
        self._body.write(self._format(deltas))
        self._open_request.mark_client_has_id()
        return True

    def text_writer(self, index: int) -> "ChoiceTextWriter":
        """Return the writer of the text of a choice, behind its first delta."""
        assert self._body is not None
        return ChoiceTextWriter(self._events.text_format(index), self._body)

    async def send(self, data: bytes, more: bool = True) -> None:
        """Write a part of the body once the client has read enough of what was written; `more` follow."""
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    def _format(self, deltas: Sequence[tuple[int, Delta]]) -> bytes:
        open_request, events = self._open_request, self._events
        if len(deltas) == 1:  # nearly always
            [(index, one)] = deltas
            return events.delta(index, one, open_request.events_to_skip(index))
        merged = merge_text(deltas)
        return b"".join(events.delta(index, one, open_request.events_to_skip(index)) for index, one in merged)


class ChoiceTextWriter:
    """Writer of one choice's text while the client reads, in few steps and with few objects: one for each token."""

    __slots__ = ("_body", "_format")

    def __init__(self, format_text: TextFormat, body: DirectBody) -> None:
        self._body = body
        self._format = format_text

    def write(self, delta: Delta) -> bool:
        """Write a delta of text without waiting; return False if it is something else, or the client lags."""
        body = self._body
        if not (body.is_ready and is_text(delta)):
            return False
        body.write(self._format(delta))
        return True
