"""The console: a chat page and a picture of the pipeline, for a browser.

The page and what it is made of are public, as a login form is; what it asks for, answers and the picture, needs a key
where the API does. The files are read once, at the start, and served by name, so that no path leads anywhere else.
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

from services.gateway.console.sightings import Sighting, Sightings
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

FRESH_S = 0.4  # a picture that is younger is given to the next who asks, so that many pages cost no more than one

# Nothing from elsewhere, nothing inline, and no text that becomes markup: what a model writes cannot run.
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
    "cache-control": "no-cache",  # kept, but asked for again: an upgrade shows at once
}


class State(msgspec.Struct, frozen=True):
    """What GET /console/state answers. Times are unix seconds of Redis's clock."""

    problems: list[str]
    pipeline: PipelineView
    requests: list[Sighting]


class Console:
    """The picture, made when somebody asks for it and at no other time."""

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        shards: int,
        blob_redis: Redis | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = redis
        self._blob_redis = blob_redis
        self._keys = keys
        self._sightings = Sightings(redis, keys, shards)
        self._clock = clock
        self._looking = asyncio.Lock()
        self._made = float("-inf")
        self._picture = b""

    async def state(self) -> bytes:
        """A `State` as JSON.

        Raises:
            RedisError: nothing can be seen.
        """
        async with self._looking:
            if self._clock() - self._made >= FRESH_S:
                self._picture = await self._look()
                self._made = self._clock()
            return self._picture

    async def _look(self) -> bytes:
        view = await read(self._redis, self._keys, self._blob_redis, server=False)
        return msgspec.json.encode(State(problems(view), view, await self._sightings.look(view.at)))


def routes(console: Console) -> list[BaseRoute]:
    """The pages and their state.

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
