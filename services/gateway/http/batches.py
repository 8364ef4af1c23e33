"""Routes of batches: create, list, describe and cancel."""

import asyncio
import re
import secrets
import time
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Send

from services.gateway.batches.batch import PREFIX, About, Batch
from services.gateway.batches.files import INPUT
from services.gateway.batches.store import BatchStore, no_batch
from services.gateway.http.answer import json_response, write_json
from services.gateway.http.context import context_of
from services.gateway.http.files import LEAST_KEEP_S, FileRoutes, new_file_id
from services.gateway.http.intake import Intake
from services.gateway.http.paging import listing, read_page
from services.gateway.request.schemas import decode_json
from shared.errors import Failure, RequestError, invalid

MOST_LISTED, DEFAULT_LISTED = 100, 20
MOST_METADATA = 16
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
LONGEST_S = 7 * 86400

_NAME = re.compile(rf"{PREFIX}[0-9a-f]{{24}}")
_WINDOW = r"^([1-9][0-9]{0,5})([smhd])\Z"

Metadata = dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]]


class OutputExpiry(msgspec.Struct, frozen=True):
    """Lifetime of the files of output and errors."""

    anchor: str
    seconds: int


class BatchRequest(msgspec.Struct, frozen=True):
    """The body of POST /v1/batches."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
    completion_window: Annotated[str, Meta(extra_json_schema={"pattern": _WINDOW})]
    metadata: Metadata | None = None
    output_expires_after: OutputExpiry | None = None


_decoder = msgspec.json.Decoder(BatchRequest)


class BatchRoutes(msgspec.Struct, frozen=True):
    """Handlers of the routes."""

    store: BatchStore
    files: FileRoutes
    intake: Intake
    work: asyncio.Event  # set when there is something to do for the worker on batches

    async def create(self, request: Request, _receive: Receive, send: Send) -> None:
        """Create a batch, and describe it.

        Raises:
            RequestError: it is refused.
            ClientDisconnect: the client left in the middle.
        """
        async with self.intake.receive(request) as (body, _):
            asked = decode_json(_decoder, body)
            window_s = _check(asked)
            about = await self._about(asked, window_s, request)
            input_file = await self.files.find(asked.input_file_id, request)
            if input_file.purpose != INPUT:
                raise invalid(f"`input_file_id` names a file whose purpose is {input_file.purpose}.", "input_file_id")
            span = context_of(request).span
            if span is not None:
                span.set({"millrace.batch.id": about.id, "millrace.batch.lines": input_file.lines})
                if input_file.trace is not None:
                    span.link(input_file.trace)
            tenant = context_of(request).quota.tenant
            name, most = ("", None) if tenant is None else (tenant.name, tenant.limits.batch_lines)
            await self.files.store.keep(input_file.id, about.expires_at)
            await self.store.create(about, input_file.lines, name, most)
            self.work.set()
            batch = await self.store.find(about.id, about.owner)
        await write_json(send, msgspec.json.encode(batch.resource()), 200, [])

    async def _about(self, asked: BatchRequest, window_s: int, request: Request) -> About:
        now = int(time.time())
        keep_s = self.files.store.limits.keep_s
        span = context_of(request).span
        return About(
            id=PREFIX + secrets.token_hex(12),
            owner=context_of(request).owner,
            endpoint=asked.endpoint,
            input_file_id=asked.input_file_id,
            output_file_id=new_file_id(),
            error_file_id=new_file_id(),
            completion_window=asked.completion_window,
            created_at=now,
            expires_at=now + window_s,
            output_keep_s=_output_keep_s(asked.output_expires_after, keep_s),
            metadata=asked.metadata,
            trace=None if span is None else span.traceparent,
        )

    async def describe(self, name: str, request: Request) -> Response:
        """Describe a batch.

        Raises:
            RequestError: 404, there is none.
        """
        return json_response((await self._find(name, request)).resource())

    async def list(self, request: Request) -> Response:
        """List batches, newest first.

        Raises:
            RequestError: 400, a parameter is malformed.
        """
        page = read_page(request, MOST_LISTED, DEFAULT_LISTED)
        names = await self.store.listed(context_of(request).owner)
        if page.order == "asc":
            names.reverse()
        places, has_more = page.cut(names)
        found = await self.store.describe([names[place] for place in places])
        return json_response(listing([batch.resource() for batch in found], has_more))

    async def cancel(self, name: str, request: Request) -> Response:
        """Cancel a batch.

        Raises:
            RequestError: 404, there is none; 409, it has ended.
        """
        batch = await self._find(name, request)
        if not await self.store.cancel(batch.about.id):
            batch = await self._find(name, request)
            if batch.ended:
                text = f"The batch is {batch.status}: there is nothing to cancel."
                raise RequestError(Failure(409, text, param="id", code="batch_ended"))
        self.work.set()
        return await self.describe(name, request)

    async def _find(self, name: str, request: Request) -> Batch:
        if not _NAME.fullmatch(name):
            raise no_batch(name)
        return await self.store.find(name, context_of(request).owner)


def _check(asked: BatchRequest) -> int:
    """Check the fields of a body; return the seconds that the batch may take.

    Raises:
        RequestError: 400 naming the field.
    """
    if len(asked.metadata or {}) > MOST_METADATA:
        raise invalid(f"`metadata` has more than {MOST_METADATA} entries.", "metadata")
    window = re.match(_WINDOW, asked.completion_window)
    window_s = 0 if window is None else int(window[1]) * UNITS_S[window[2]]
    if not 0 < window_s <= LONGEST_S:
        text = f"`completion_window` must be a time such as 90s, 30m, 24h or 7d, of {LONGEST_S // 86400}d at most."
        raise invalid(text, "completion_window")
    return window_s


def _output_keep_s(asked: OutputExpiry | None, most: int) -> int:
    if asked is None:
        return most
    if asked.anchor != "created_at" or not LEAST_KEEP_S <= asked.seconds <= most:
        text = f"`output_expires_after`: anchor must be created_at, and seconds a number from {LEAST_KEEP_S} to {most}."
        raise invalid(text, "output_expires_after")
    return asked.seconds
