"""Routes of the console: a chat page and a view of the pipeline, for a browser.

The page and its assets are public, as a login form is; the answers and the state that it requests need a key if the API
does. The files are read once, at startup, and served by name, so that no path leads to any other file.
"""

import asyncio
import hashlib
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import msgspec
from redis.asyncio import Redis
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from services.gateway.console.observer import ObservedRequest, RequestObserver
from services.gateway.console.quarantine import Quarantine, QuarantinedEntry
from services.gateway.http.context import context_of
from shared.bus.keys import Keys
from shared.bus.pipeline_view import PipelineView, problems, read
from shared.errors import invalid
from shared.messages import MediaKind

STATIC = Path(__file__).parent / "static"
PAGE = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".woff2": "font/woff2",
}
# Path -> (file in STATIC, its type): every file there is, each under its own name.
ASSETS = {
    "/" if name == PAGE else f"/console/{name}": (name, _TYPES[path.suffix])
    for path in sorted(STATIC.rglob("*.*"))
    for name in [path.relative_to(STATIC).as_posix()]
}
STATE_PATH = "/console/state"
REQUEST_PATH = "/console/request"
LIMITS_PATH = "/console/limits"
PATHS = ("/", STATE_PATH, REQUEST_PATH, LIMITS_PATH)  # those that metrics name

_REQUEST_ID = re.compile(r"(?:chatcmpl-)?([0-9a-f]{16}(?:-[1-9]\d{0,3})?)")

FRESH_S = 0.4  # age up to which a state is served again, so that many pages cost no more than one
QUARANTINE_FRESH_S = 10.0  # the same of the quarantine's entries, while their number does not change

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
    quarantine: list[QuarantinedEntry]


class Found(msgspec.Struct, frozen=True):
    """Body of GET /console/request."""

    request: ObservedRequest | None  # None: no stage has it, and no answer of it is kept
    quarantined: list[QuarantinedEntry]


class Limits(msgspec.Struct, frozen=True):
    """Body of GET /console/limits: what the server takes of files. Its field names are those of the settings."""

    limit_mm_per_prompt: Mapping[MediaKind, int]
    max_body_bytes: int
    max_media_bytes: int


class Console:
    """State of the pipeline, read when a page requests it and at no other time."""

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        observer: RequestObserver,
        limits: Limits,
        blob_redis: Redis | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = redis
        self._blob_redis = blob_redis
        self._keys = keys
        self._observer = observer
        self.limits = msgspec.json.encode(limits)
        self._quarantine = Quarantine(redis, keys)
        self._quarantined: list[QuarantinedEntry] = []
        self._quarantined_of: tuple[float, ...] = ()  # when, and how many there were: of what `_quarantined` is
        self._clock = clock
        self._reading = asyncio.Lock()
        self._read_at = float("-inf")
        self._state: State | None = None
        self._encoded = b""

    async def state(self, tenant: str | None = None) -> bytes:
        """Return a `State` as JSON: to a tenant, with its own requests alone.

        Raises:
            RedisError: Redis cannot be read.
        """
        async with self._reading:
            if self._state is None or self._clock() - self._read_at >= FRESH_S:
                self._state = await self._read()
                self._encoded = msgspec.json.encode(self._state)
                self._read_at = self._clock()
            if tenant is None:
                return self._encoded
            own = [one for one in self._state.requests if one.tenant == tenant]
            return msgspec.json.encode(msgspec.structs.replace(self._state, requests=own, quarantine=[]))

    async def find(self, request_id: str, tenant: str | None = None) -> bytes:
        """Return a `Found` as JSON: to a tenant, if the request is its own.

        Raises:
            RedisError: Redis cannot be read.
        """
        async with self._reading:
            seconds, micros = await self._redis.time()
            request = await self._observer.find(request_id, seconds + micros / 1e6)
        if tenant is not None and (request is None or request.tenant != tenant):
            return msgspec.json.encode(Found(None, []))
        return msgspec.json.encode(Found(request, await self._quarantine.newest(request_id)))

    async def _read(self) -> State:
        view = await read(self._redis, self._keys, self._blob_redis, server=False)
        observed = await self._observer.observe(view.at)
        return State(problems(view), view, observed, await self._read_quarantine(view))

    async def _read_quarantine(self, view: PipelineView) -> list[QuarantinedEntry]:
        counts = [stage.queue.quarantined for stage in view.stages if stage.queue is not None]
        state = (self._clock() // QUARANTINE_FRESH_S, *counts)
        if state != self._quarantined_of:
            self._quarantined = await self._quarantine.newest() if any(counts) else []
            self._quarantined_of = state
        return self._quarantined


def routes(console: Console) -> list[BaseRoute]:
    """Build the routes of the pages and of their state.

    Raises:
        OSError: a file of the console is missing in this installation.
    """

    async def state(request: Request) -> Response:
        return _json(await console.state(_tenant_of(request)))

    async def request(request: Request) -> Response:
        return _json(await console.find(_read_id(request.query_params.get("id", "")), _tenant_of(request)))

    async def limits(_request: Request) -> Response:
        return _json(console.limits)

    files = [Route(path, _file((STATIC / name).read_bytes(), kind)) for path, (name, kind) in ASSETS.items()]
    return [*files, Route(STATE_PATH, state), Route(REQUEST_PATH, request), Route(LIMITS_PATH, limits)]


def _tenant_of(request: Request) -> str | None:
    """Return the tenant that asks; None if it is nobody's tenant, and may see everything."""
    tenant = context_of(request).quota.tenant
    return None if tenant is None else tenant.name


def _read_id(given: str) -> str:
    """Return a request's id as the stages have it.

    Raises:
        RequestError: 400, no request can have this id.
    """
    match = _REQUEST_ID.fullmatch(given)
    if match is None:
        raise invalid(
            f"An id has 16 digits of 0-9 and a-f, as in chatcmpl-0123456789abcdef; {given!r:.60} has not.", "id"
        )
    return match[1]


def _json(body: bytes) -> Response:
    headers = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
    return Response(body, headers=headers, media_type="application/json")


def _file(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{hashlib.sha256(content).hexdigest()[:24]}"'
    headers = {**_HEADERS, "content-type": kind, "etag": tag}

    async def file(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    return file
