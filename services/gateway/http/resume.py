"""Routes for clients that return for an answer: its events from a position on, all of it at once, or its end."""

import re
from typing import Literal, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.types import Receive, Send

from services.gateway.errors import unknown_request
from services.gateway.http.admission import Admission
from services.gateway.http.answer import AnswerWriter
from services.gateway.http.context import context_of
from services.gateway.inflight.headers import read_last_event_id
from services.gateway.inflight.pipeline import Pipeline
from services.gateway.inflight.registry import OpenRequests
from services.gateway.inflight.stored import StoredRequest

_NAME = re.compile(r"([a-z]+-)([0-9a-f]{16})")


class Kept(NamedTuple):
    """Answers that can be read again below a path."""

    path: str
    prefix: str  # of their ids
    dialect: str  # by which they were asked for


KEPT = (Kept("/v1/chat/completions", "chatcmpl-", ""), Kept("/v1/completions", "cmpl-", "completions"))


class Cancellation(msgspec.Struct, frozen=True):
    """Body of the answer to a cancellation."""

    id: str
    status: Literal["cancelled", "completed"]
    object: str = "chat.completion.status"


class Resumption(msgspec.Struct, frozen=True):
    """Handlers of the routes."""

    admission: Admission
    pipeline: Pipeline
    open_requests: OpenRequests
    writer: AnswerWriter

    async def stream(self, kept: Kept, name: str, request: Request, receive: Receive, send: Send) -> None:
        """Stream an answer, after the event that Last-Event-ID names.

        Raises:
            RequestError: 404, there is no such request; 400, it has no such event.
        """
        with self.admission.slot():
            stored = await self._find(kept, name, request)
            positions = read_last_event_id(request.headers, stored.answer_format.n)
            async with self.open_requests.rejoin(stored, stored.answer_format, True, positions) as open_request:
                await self.writer.respond(open_request, context_of(request), receive, send, event_ids=True)

    async def fetch(self, kept: Kept, name: str, request: Request, receive: Receive, send: Send) -> None:
        """Write the whole answer if it is complete, else 202.

        Raises:
            RequestError: 404, there is no such request.
        """
        with self.admission.slot():
            stored = await self._find(kept, name, request)
            if not stored.ended:
                await self.writer.write_unfinished(stored, send)
                return
            async with self.open_requests.rejoin(stored, stored.answer_format, False) as open_request:
                await self.writer.respond(open_request, context_of(request), receive, send)

    async def cancel(self, kept: Kept, name: str, request: Request) -> Cancellation:
        """End the work on a request, whoever waits for it; an answer that is complete stays.

        Raises:
            RequestError: 404, there is no such request.
        """
        stored = await self._find(kept, name, request)
        if stored.ended:
            return Cancellation(name, "completed")
        await self.open_requests.cancel(stored)
        return Cancellation(name, "cancelled")

    async def _find(self, kept: Kept, name: str, request: Request) -> StoredRequest:
        match = _NAME.fullmatch(name)
        if match is None or match[1] != kept.prefix:
            raise unknown_request(name)
        stored = await self.pipeline.find(match[2], context_of(request).owner)
        # An answer that was asked for by another API, perhaps one of a later release, cannot be written here.
        if stored.answer_format.dialect != kept.dialect:
            raise unknown_request(name)
        return stored
