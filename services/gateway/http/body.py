"""Reading of a request's body, within limits on its size and time."""

import asyncio

from starlette.requests import Request

from shared.errors import Failure, RequestError


async def read_body(request: Request, limit: int, timeout_s: float) -> bytes:
    """Read the whole body.

    Raises:
        RequestError: 415, it is compressed; 413, larger than `limit` bytes; 408, slower than `timeout_s`.
        ClientDisconnect: the client left in the middle.
    """
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        text = f"The header Content-Encoding is {encoding:.50}; request bodies are read as they are, not compressed."
        raise RequestError(Failure(415, text, param="Content-Encoding", code="unsupported_encoding"))
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        text = f"The request body did not arrive within {timeout_s:g} s."
        raise RequestError(Failure(408, text, type="timeout_error", code="timeout")) from None
    return bytes(body)


def _too_large(limit: int) -> RequestError:
    text = f"The request body is larger than the limit of {limit} bytes."
    return RequestError(Failure(413, text, code="request_too_large"))
