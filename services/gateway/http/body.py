"""Reading of a request's body, within limits on its size, its time and the memory that all bodies take."""

import asyncio
import io

import msgspec
from starlette.requests import Request

from services.gateway.http.memory import Reservation
from shared.errors import Failure, RequestError

PROGRESS_BYTES = 64 << 10
INLINE_BYTES = 16 << 10  # a larger body is parsed in a thread, so that other streams do not wait for it


class BodyLimits(msgspec.Struct, frozen=True):
    """Limits on one body."""

    max_bytes: int
    timeout_s: float  # for the whole body
    stall_s: float  # for the next PROGRESS_BYTES, or the end: the slowest rate


async def read_body(request: Request, limits: BodyLimits, reservation: Reservation) -> bytes:
    """Read the whole body, of JSON; the reservation grows with it.

    Raises:
        RequestError: 415, it is no JSON, or compressed; 413, too large; 429, no memory for it now; 408, too slow.
        ClientDisconnect: the client left in the middle.
    """
    _check_type(request.headers.get("content-type", ""), "origin" in request.headers)
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        text = f"The header Content-Encoding is {encoding:.50}; request bodies are read as they are, not compressed."
        raise RequestError(Failure(415, text, param="Content-Encoding", code="unsupported_encoding"))
    announced = int(request.headers.get("content-length", "0"))  # its syntax is checked by the HTTP parser
    _check_size(announced, limits.max_bytes)
    reservation.check(announced)
    body = io.BytesIO()  # gives its bytes away without copying them
    try:
        async with asyncio.timeout(limits.timeout_s), asyncio.timeout(limits.stall_s) as stall:
            progress = 0
            async for chunk in request.stream():
                _check_size(body.tell() + len(chunk), limits.max_bytes)
                reservation.grow(len(chunk))
                body.write(chunk)
                progress += len(chunk)
                if progress >= PROGRESS_BYTES:
                    progress = 0
                    stall.reschedule(asyncio.get_running_loop().time() + limits.stall_s)
    except TimeoutError:
        raise RequestError(_too_slow(limits)) from None
    return body.getvalue()


def _check_type(given: str, from_page: bool) -> None:
    """Check that a body is JSON, or does not say what it is, as some clients do.

    Any web page may have a browser send text, a form, or bytes that say nothing, without asking first whether it may.

    Raises:
        RequestError: 415, it says that it is something else.
    """
    media_type = given.partition(";")[0].strip().lower()
    if from_page and not media_type:
        text = "A web page's request needs the header Content-Type: application/json."
        raise RequestError(Failure(415, text, param="Content-Type", code="unsupported_media_type"))
    if media_type and media_type != "application/json" and not media_type.endswith("+json"):
        text = f"The header Content-Type is {media_type:.50}; request bodies are application/json."
        raise RequestError(Failure(415, text, param="Content-Type", code="unsupported_media_type"))


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        text = f"The request body is larger than the limit of {limit} bytes."
        raise RequestError(Failure(413, text, code="request_too_large"))


def _too_slow(limits: BodyLimits) -> Failure:
    text = (
        f"The request body did not arrive in time: it may take {limits.timeout_s:g} s, and {limits.stall_s:g} s for "
        f"each {PROGRESS_BYTES} bytes of it."
    )
    return Failure(408, text, type="timeout_error", code="timeout")
