"""Writer of the deltas of one stream: at once from the inbox's turn while the connection takes them, else by a task."""

import asyncio
from collections.abc import Sequence

from starlette.types import Send

from services.gateway.dialects.dialect import EventWriter
from services.gateway.dialects.merge import merge_text
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
        self._body = None if open_request.answer_format.prompt_logprobs else body

    async def run(self) -> None:
        """Write until the answer has ended."""
        open_request = self._open_request
        while not open_request.done:
            deltas = await open_request.next_deltas(self.write_now)
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
        body = self._body
        if body is None or not body.is_ready:
            return False
        body.write(self._format(deltas))
        self._open_request.mark_client_has_id()
        return True

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
