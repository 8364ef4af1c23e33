"""Outermost ASGI layer: request ids, API keys, metrics and spans. No buffering."""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.console import routes as console
from services.gateway.errors import UNAUTHORIZED, FailureBodies, error_response
from services.gateway.http import spans
from services.gateway.http.context import RequestContext, attach_context
from services.gateway.http.protocol import HEALTH_PATHS
from services.gateway.http.resume import KEPT
from services.gateway.metrics import GatewayMetrics
from services.gateway.reference import routes as reference
from shared.tracing import OFF, Span, Tracing

# All other paths need a key, including those that do not exist.
OPEN_PATHS = HEALTH_PATHS | frozenset(console.ASSETS) | frozenset(reference.ASSETS)
MODEL_PATH = "/v1/models/"

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_CLIENT_LEFT = "499"


class Edge:
    """ASGI middleware around the whole application."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Iterable[str],
        paths: Iterable[str],
        bodies: FailureBodies,
        metrics: GatewayMetrics,
        tracing: Tracing = OFF,
    ) -> None:
        """Wrap `app`. `keys` are the API keys, none for an open server; `paths` are the routes that metrics name."""
        self._app = app
        self._keys = [_digest(key) for key in keys]
        self._paths = frozenset(paths)
        self._bodies = bodies
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        scope["path"] = scope["path"].rstrip("/") or "/"  # both forms are one path, to the rules about keys too
        headers = Headers(scope=scope)
        span = self._start_span(scope, headers)
        context = RequestContext(_request_id(headers), "", span, send)
        status = _CLIENT_LEFT

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
                message = {**message, "headers": [*message["headers"], *_headers(context)]}
            await send(message)

        try:
            owner = self._authenticate(scope["path"], headers)
            if owner is not None:
                context.owner = owner
                attach_context(scope, context)
                await self._app(scope, receive, send_named)
            else:
                form = self._bodies.of(scope["path"])
                await error_response(UNAUTHORIZED, {"www-authenticate": "Bearer"}, form)(scope, receive, send_named)
        finally:
            method, path = _method(scope["method"]), self._metric_path(scope["path"])
            self._metrics.requests.labels(method, path, status).inc()
            self._metrics.duration.labels(method, path).observe(time.perf_counter() - started)
            if span is not None:
                spans.end(span, None if status == _CLIENT_LEFT else status)

    def _start_span(self, scope: Scope, headers: Headers) -> Span | None:
        """Start the span of a chat request; other requests are too short to be traced."""
        if scope["path"] != spans.PATH or scope["method"] != "POST":
            return None
        return self._tracing.serve(spans.NAME, headers.get("traceparent"), spans.INITIAL)

    def _authenticate(self, path: str, headers: Headers) -> str | None:
        """Return a digest of the request's API key, empty if the path needs none; None if the key is not valid."""
        if not self._keys or path in OPEN_PATHS:
            return ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = _digest(given.strip())
        # All keys are compared, and by their digests, so that timing reveals neither which one matched nor how far.
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        return digest.hex() if scheme.lower() == "bearer" and any(matches) else None

    def _metric_path(self, path: str) -> str:
        """Return the path's name in the metrics: one of a bounded set, whatever clients request."""
        if path in self._paths:
            return path
        for kept in KEPT:
            if path.startswith(f"{kept.path}/"):
                below = next((part for part in ("/events", "/cancel") if path.endswith(part)), "")
                return f"{kept.path}/{{name}}{below}"
        return MODEL_PATH + "{model}" if path.startswith(MODEL_PATH) else "other"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _request_id(headers: Headers) -> str:
    """Return the client's id if it is safe in a header and a log line, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def _headers(context: RequestContext) -> list[tuple[bytes, bytes]]:
    warnings = [(b"x-millrace-warning", text.encode()) for text in context.warnings]
    request_id = context.request_id.encode()
    # Under both names: OpenAI's clients read the first, Anthropic's the second.
    return [(b"x-request-id", request_id), (b"request-id", request_id), *warnings]


def _method(method: str) -> str:
    return method if method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH") else "other"
