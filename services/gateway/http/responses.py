"""Routes of stored responses: read, stream again, cancel, delete, and list the input."""

import re
import sys
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Send

from services.gateway.dialects.responses.answered import Answered
from services.gateway.dialects.responses.items import listed_item
from services.gateway.dialects.responses.resource import Head, resource, unanswered
from services.gateway.dialects.responses.responses import ResponsesDialect, make_head, status_of
from services.gateway.errors import CANCELLED
from services.gateway.http.admission import Admission
from services.gateway.http.answer import AnswerWriter, json_response
from services.gateway.http.context import context_of
from services.gateway.http.paging import listing, read_page
from services.gateway.inflight.pipeline import Pipeline
from services.gateway.inflight.registry import OpenRequests
from services.gateway.inflight.stored import StoredRequest
from services.gateway.responses.ends import Ends
from services.gateway.responses.session import ResponseSession
from services.gateway.responses.store import ResponseStore, StoredHead, no_response, request_id_of
from services.gateway.responses.turns import EarlierTurnsReader
from shared.errors import invalid

MAX_LISTED, DEFAULT_LISTED = 100, 20

_NUMBER = re.compile(r"\d{1,15}")


class _Found(msgspec.Struct, frozen=True):
    """A response that is kept, and how it has ended, or its request if it runs."""

    request_id: str
    stored: StoredHead
    end: Answered | StoredRequest

    @property
    def head(self) -> Head:
        return make_head(self.request_id, self.stored.created, self.stored.form)

    def present(self) -> Response:
        """Return the response as it is now."""
        return json_response(_present(self.head, self.end))


class StoredResponses(msgspec.Struct, frozen=True):
    """Handlers of the routes."""

    admission: Admission
    pipeline: Pipeline
    open_requests: OpenRequests
    writer: AnswerWriter
    dialect: ResponsesDialect
    store: ResponseStore
    turns: EarlierTurnsReader

    @property
    def ends(self) -> Ends:
        """The ends of responses."""
        return self.turns.ends

    def session(self) -> ResponseSession:
        """Return what one request of POST /v1/responses needs."""
        return ResponseSession(self.dialect, self.writer, self.ends, self.turns)

    def counting_session(self) -> ResponseSession:
        """Return the same for one that is counted, of which nothing is kept, however long it is."""
        dialect = msgspec.structs.replace(self.dialect, max_stored_bytes=sys.maxsize)
        return ResponseSession(dialect, self.writer, self.ends, self.turns)

    async def retrieve(self, name: str, request: Request) -> Response:
        """Return a response as it is now.

        Raises:
            RequestError: 404, there is none.
        """
        with self.admission.slot():
            return (await self._find_end(name, request)).present()

    async def stream(self, name: str, request: Request, receive: Receive, send: Send) -> None:
        """Stream a response, behind the event that `starting_after` names.

        Raises:
            RequestError: 404, there is none; 400, no number.
        """
        after = _starting_after(request)
        with self.admission.slot():
            found = await self._find_end(name, request)
            dialect = msgspec.structs.replace(self.dialect, after=after)
            session = ResponseSession(dialect, self.writer, self.ends, self.turns)
            if isinstance(found.end, Answered):
                await session.write_end(found.head, found.stored.form.logprobs, found.end, send, stream=True)
                return
            async with self.open_requests.rejoin(found.end, found.end.answer_format, True) as open_request:
                await session.respond(open_request, context_of(request), receive, send)

    async def cancel(self, name: str, request: Request) -> Response:
        """Cancel a response; one that has ended stays as it is.

        Raises:
            RequestError: 404, there is none.
        """
        with self.admission.slot():
            found = await self._find_end(name, request)
            if isinstance(found.end, StoredRequest):
                # First, so that no reader finds a response that has ended without a reason.
                end = Answered(cancelled=True)
                await self.store.put_end(found.request_id, found.stored.owner, end)
                await self._end(found.end)
                found = msgspec.structs.replace(found, end=end)
            return found.present()

    async def delete(self, name: str, request: Request) -> Response:
        """Delete a response; one that runs is cancelled.

        Raises:
            RequestError: 404, there is none.
        """
        with self.admission.slot():
            found = await self._find_end(name, request)
            if isinstance(found.end, StoredRequest):
                await self._end(found.end)
            else:
                await self.pipeline.drop(found.request_id)
            await self.store.delete(found.request_id)
            return json_response({"id": name, "object": "response", "deleted": True})

    async def input_items(self, name: str, request: Request) -> Response:
        """List the input items of a response, newest first unless `order` is asc.

        Raises:
            RequestError: 404, there is none; 400, a parameter is malformed.
        """
        page = read_page(request, MAX_LISTED, DEFAULT_LISTED)
        with self.admission.slot():
            request_id, _ = await self._find(name, request)
            given = await self.store.items(request_id)
        if given is None:
            raise no_response(name)
        raw: list[dict[str, Any]] = msgspec.json.decode(given)
        items = [listed_item(item, f"{request_id}-{index}") for index, item in enumerate(raw)]
        if page.order == "desc":
            items.reverse()
        places, has_more = page.cut([item["id"] for item in items])
        return json_response(listing([items[place] for place in places], has_more))

    async def _end(self, stored: StoredRequest) -> None:
        await self.open_requests.cancel(stored)
        await self.pipeline.tell(stored, CANCELLED)

    async def _find_end(self, name: str, request: Request) -> _Found:
        request_id, stored = await self._find(name, request)
        return _Found(request_id, stored, await self.ends.find(request_id, stored))

    async def _find(self, name: str, request: Request) -> tuple[str, StoredHead]:
        request_id = request_id_of(name)
        stored = None if request_id is None else await self.store.head(request_id, context_of(request).owner)
        if request_id is None or stored is None:
            raise no_response(name)
        return request_id, stored


def is_stream(request: Request) -> bool:
    """Return whether a GET asks for events.

    Raises:
        RequestError: 400, it says neither true nor false.
    """
    given = request.query_params.get("stream", "false").lower()
    if given not in ("true", "false"):
        raise invalid(f"`stream` must be true or false, not {given!r:.50}.", "stream")
    return given == "true"


def _present(head: Head, found: Answered | StoredRequest) -> dict[str, Any]:
    return resource(head, found) if isinstance(found, Answered) else unanswered(head, status_of(found))


def _starting_after(request: Request) -> int:
    given = request.query_params.get("starting_after")
    if given is None:
        return -1
    if not _NUMBER.fullmatch(given):
        raise invalid("`starting_after` must be the sequence number of an event.", "starting_after")
    return int(given)
