"""Routes of files: upload, list, describe, read and delete."""

import asyncio
import re
import secrets
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Send

from services.gateway.batches.files import INPUT, PREFIX, About, FileStore, no_file
from services.gateway.batches.upload import FileWriter
from services.gateway.http.answer import json_response
from services.gateway.http.body import PROGRESS_BYTES
from services.gateway.http.context import context_of
from services.gateway.http.form import FormReader, read_form
from services.gateway.http.intake import Intake
from services.gateway.http.memory import Reservation
from services.gateway.http.paging import listing, read_page
from shared.errors import Failure, RequestError, invalid

MOST_LISTED = 10_000  # and as many without `limit`, as OpenAI does
FORM_BYTES = 1 << 20  # of a form, beside its file
LEAST_KEEP_S = 60
MOST_DIGITS = 12  # of a number in a form

_NAME = re.compile(rf"{PREFIX}[0-9a-f]{{24}}")


class FileRoutes(msgspec.Struct, frozen=True):
    """Handlers of the routes."""

    store: FileStore
    intake: Intake
    timeout_s: float  # for a whole upload
    origins: Collection[str]  # of web pages that may upload

    async def upload(self, request: Request) -> Response:
        """Store a file, and describe it.

        Raises:
            RequestError: it is refused; nothing is kept of it.
            ClientDisconnect: the client left in the middle.
        """
        self._check_origin(request)
        self._check_length(request)
        owner, span = context_of(request).owner, context_of(request).span
        reader = FormReader(request.headers.get("content-type", ""))
        await self.store.check_count(owner)
        writer = FileWriter(self.store, new_file_id(), owner)
        with self.intake.admission.arrival(), self.intake.memory.reservation(large=True) as reservation:
            try:
                await self._receive(request, reader, writer, reservation)
                keep_s = self._keep_s(reader.form.fields)
                if not writer.has_stored:
                    reservation.resize(2 * writer.held)  # which `close` copies
                trace = None if span is None else span.traceparent
                about = await writer.close(reader.form.filename or "", keep_s, trace)
            except BaseException:
                await asyncio.shield(writer.discard())
                raise
        if span is not None:
            span.set({"millrace.file.id": about.id, "millrace.file.bytes": about.bytes})
        return json_response(about.resource())

    def _check_length(self, request: Request) -> None:
        """
        Raises:
            RequestError: 413, the body is longer than any file that is accepted.
        """
        limit = self.store.limits.file_bytes
        if int(request.headers.get("content-length", "0")) > limit + FORM_BYTES:
            text = f"The file is larger than the limit of {limit} bytes."
            raise RequestError(Failure(413, text, param="file", code="file_too_large"))

    async def _receive(
        self, request: Request, reader: FormReader, writer: FileWriter, reservation: Reservation
    ) -> None:
        stall_s = self.intake.limits.stall_s
        progress = 0
        try:
            async with asyncio.timeout(self.timeout_s), asyncio.timeout(stall_s) as stall:
                async for content in read_form(request, reader):
                    if not writer.has_stored:  # what the first chunk takes is held until the end: no refusal after it
                        reservation.resize(writer.needs(content))
                    await writer.write(content)
                    progress += len(content)
                    if progress >= PROGRESS_BYTES:
                        progress = 0
                        stall.reschedule(asyncio.get_running_loop().time() + stall_s)
        except TimeoutError:
            text = f"The file did not arrive in time: it may take {self.timeout_s:g} s, and {stall_s:g} s for each "
            text += f"{PROGRESS_BYTES} bytes of it."
            raise RequestError(Failure(408, text, type="timeout_error", code="timeout")) from None

    def _keep_s(self, fields: Mapping[str, str]) -> int:
        """Return the seconds for which an upload is kept.

        Raises:
            RequestError: 400, a field is wrong.
        """
        if fields.get("purpose") != INPUT:
            raise invalid(f"`purpose` must be {INPUT}: files are for batches alone.", "purpose")
        if fields.get("expires_after[anchor]", "created_at") != "created_at":
            raise invalid("`expires_after[anchor]` must be created_at.", "expires_after[anchor]")
        most = self.store.limits.keep_s
        given = fields.get("expires_after[seconds]", str(most))
        is_number = given.isascii() and given.isdigit() and len(given) <= MOST_DIGITS
        if not is_number or not LEAST_KEEP_S <= int(given) <= most:
            text = f"`expires_after[seconds]` must be a number from {LEAST_KEEP_S} to {most}."
            raise invalid(text, "expires_after[seconds]")
        return int(given)

    def _check_origin(self, request: Request) -> None:
        """Refuse the forms of strange web pages, which a browser sends without asking first whether it may.

        Raises:
            RequestError: 403.
        """
        origin = request.headers.get("origin")
        if origin is None or origin in self.origins or "*" in self.origins:
            return
        host = _host(origin)
        if host is None or host != request.headers.get("host"):
            text = f"Web pages of {origin[:64]!r} may not upload files (allowed_origins)."
            raise RequestError(Failure(403, text, param="Origin", code="origin_not_allowed"))

    async def describe(self, name: str, request: Request) -> Response:
        """Describe a file.

        Raises:
            RequestError: 404, there is none.
        """
        return json_response((await self.find(name, request)).resource())

    async def find(self, name: str, request: Request) -> About:
        """Return what a file is.

        Raises:
            RequestError: 404, there is none.
        """
        if not _NAME.fullmatch(name):
            raise no_file(name)
        return await self.store.find(name, context_of(request).owner)

    async def list(self, request: Request) -> Response:
        """List files, newest first unless `order` is asc; with `purpose` those alone.

        Raises:
            RequestError: 400, a parameter is malformed.
        """
        page = read_page(request, MOST_LISTED, MOST_LISTED)
        names = await self.store.listed(context_of(request).owner)
        purpose = request.query_params.get("purpose")
        if purpose is not None:
            names = [about.id for about in await self.store.describe(names) if about.purpose == purpose]
        if page.order == "asc":
            names.reverse()
        places, has_more = page.cut(names)
        found = await self.store.describe([names[place] for place in places])
        return json_response(listing([about.resource() for about in found], has_more))

    async def delete(self, name: str, request: Request) -> Response:
        """Delete a file. A batch that still reads it fails.

        Raises:
            RequestError: 404, there is none.
        """
        about = await self.find(name, request)
        await self.store.delete(about.id)
        return json_response({"id": about.id, "object": "file", "deleted": True})

    async def content(self, name: str, request: Request, _receive: Receive, send: Send) -> None:
        """Write a file's content, chunk by chunk.

        Raises:
            RequestError: 404, there is none.
        """
        about = await self.find(name, request)
        headers = [(b"content-type", b"application/jsonl"), (b"content-length", str(about.bytes).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if request.method != "HEAD":
            async for chunk in self.store.chunks(about.id):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def _host(origin: str) -> str | None:
    """Return host and port of an origin; None if it is none."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


def new_file_id() -> str:
    """Return the id of a file that is yet to be."""
    return PREFIX + secrets.token_hex(12)
