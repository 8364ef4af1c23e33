"""Routes of the console: a chat page and a view of the pipeline, for a browser.

The page and its assets are public, as a login form is; the answers and the state that it requests need a key if the API
does. The files are read once, at startup, and served by name, so that no path leads to any other file.
"""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
from redis.asyncio import Redis
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from services.gateway.console.observer import ObservedRequest, RequestObserver
from shared.bus.keys import Keys
from shared.bus.pipeline_view import PipelineView, problems, read

STATIC = Path(__file__).parent / "static"
ASSETS = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/console/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/console/style.css": ("style.css", "text/css; charset=utf-8"),
    "/console/icon.svg": ("icon.svg", "image/svg+xml"),
}
STATE_PATH = "/console/state"
PATHS = (*ASSETS, STATE_PATH)

FRESH_S = 0.4  # age up to which a state is served again, so that many pages cost no more than one

# No other origins, nothing inline, and no text that becomes markup: the output of a model cannot run.
_POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' blob: data:",
        "media-src 'self' blob: data:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # cached, but revalidated: an upgrade shows at once
}


class State(msgspec.Struct, frozen=True):
    """Body of GET /console/state. Times are unix seconds of Redis's clock."""

    problems: list[str]
    pipeline: PipelineView
    requests: list[ObservedRequest]


class Console:
    """State of the pipeline, read when a page requests it and at no other time."""

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        observer: RequestObserver,
        blob_redis: Redis | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = redis
        self._blob_redis = blob_redis
        self._keys = keys
        self._observer = observer
        self._clock = clock
        self._reading = asyncio.Lock()
        self._read_at = float("-inf")
        self._state = b""

    async def state(self) -> bytes:
        """Return a `State` as JSON.

        Raises:
            RedisError: Redis cannot be read.
        """
        async with self._reading:
            if self._clock() - self._read_at >= FRESH_S:
                self._state = await self._read()
                self._read_at = self._clock()
            return self._state

    async def _read(self) -> bytes:
        view = await read(self._redis, self._keys, self._blob_redis, server=False)
        return msgspec.json.encode(State(problems(view), view, await self._observer.observe(view.at)))


def routes(console: Console) -> list[BaseRoute]:
    """Build the routes of the pages and of their state.

    Raises:
        OSError: a file of the console is missing in this installation.
    """

    async def state(_request: Request) -> Response:
        headers = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
        return Response(await console.state(), headers=headers, media_type="application/json")

    files = [Route(path, _file((STATIC / name).read_bytes(), kind)) for path, (name, kind) in ASSETS.items()]
    return [*files, Route(STATE_PATH, state)]


def _file(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{hashlib.sha256(content).hexdigest()[:24]}"'
    headers = {**_HEADERS, "content-type": kind, "etag": tag}

    async def file(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    return file
