"""The outermost layer of every HTTP request: its id, its key, its place in the metrics. Plain ASGI, no buffering."""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.console.routes import ASSETS
from services.gateway.errors import UNAUTHORIZED, error_response
from services.gateway.http import spans
from services.gateway.metrics import GatewayMetrics
from shared.tracing import OFF, Span, Tracing

# Everything else needs a key, routes that do not exist included.
OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/ping", *ASSETS})
MODEL_PATH = "/v1/models/"
CHAT_PATH = "/v1/chat/completions/"

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_CLIENT_LEFT = "499"


class Edge:
    """ASGI middleware around the whole application."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Iterable[str],
        paths: Iterable[str],
        metrics: GatewayMetrics,
        tracing: Tracing = OFF,
    ) -> None:
        """`keys` are the API keys, none for an open server; `paths` the routes that metrics name."""
        self._app = app
        self._keys = [_digest(key) for key in keys]
        self._paths = frozenset(paths)
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope["request_id"] = request_id
        scope["span"] = span = self._span(scope, headers)
        status = _CLIENT_LEFT

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            owner = self._owner(scope["path"], headers)
            if owner is not None:
                scope["owner"] = owner
                await self._app(scope, receive, send_named)
            else:
                await error_response(UNAUTHORIZED, {"www-authenticate": "Bearer"})(scope, receive, send_named)
        finally:
            method, path = _method(scope["method"]), self._label(scope["path"])
            self._metrics.requests.labels(method, path, status).inc()
            self._metrics.duration.labels(method, path).observe(time.perf_counter() - started)
            if span is not None:
                spans.end(span, None if status == _CLIENT_LEFT else status)

    def _span(self, scope: Scope, headers: Headers) -> Span | None:
        """Of a chat request; all else is too short to ask where its time went."""
        if scope["path"] != spans.PATH or scope["method"] != "POST":
            return None
        return self._tracing.serve(spans.NAME, headers.get("traceparent"), spans.ARRIVED)

    def _owner(self, path: str, headers: Headers) -> str | None:
        """Whose the request is: a digest of the key, empty where none is needed; None if it may not come in."""
        if not self._keys or path in OPEN_PATHS:
            return ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = _digest(given.strip())
        # All keys are compared, and digests rather than keys, so that time tells neither which one nor how much.
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        return digest.hex() if scheme.lower() == "bearer" and any(matches) else None

    def _label(self, path: str) -> str:
        """A bounded set of names, whatever clients ask for."""
        if path in self._paths:
            return path
        if path.startswith(CHAT_PATH):
            return CHAT_PATH + ("{name}/events" if path.endswith("/events") else "{name}")
        return MODEL_PATH + "{model}" if path.startswith(MODEL_PATH) else "other"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _request_id(headers: Headers) -> str:
    """The client's, if it may stand in a header and a log line."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def _method(method: str) -> str:
    return method if method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH") else "other"
