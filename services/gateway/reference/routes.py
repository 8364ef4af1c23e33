"""Routes of the API's reference. The page is public; /openapi.json, which it reads, needs a key if the API does."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

STATIC = Path(__file__).parent / "static"
ASSETS = {
    "/docs": ("reference.html", "text/html; charset=utf-8"),
    "/docs/reference.js": ("reference.js", "text/javascript; charset=utf-8"),
    "/docs/reference.css": ("reference.css", "text/css; charset=utf-8"),
}
# No other origins, nothing inline, and no text that becomes markup.
_POLICY = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


def routes() -> list[BaseRoute]:
    """Build the routes of the page.

    Raises:
        OSError: a file of it is missing in this installation.
    """
    return [Route(path, _file((STATIC / name).read_bytes(), kind)) for path, (name, kind) in ASSETS.items()]


def _file(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def file(_request: Request) -> Response:
        return Response(content, headers={**_HEADERS, "content-type": kind})

    return file
