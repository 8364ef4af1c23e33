"""Outermost ASGI layer: request ids, API keys, metrics and spans. No buffering."""

import re
import secrets
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.console import routes as console
from services.gateway.errors import UNAUTHORIZED, FailureBodies, error_response
from services.gateway.http import spans
from services.gateway.http.context import RequestContext, attach_context, detach_context
from services.gateway.http.direct import take_body
from services.gateway.http.hosts import STRANGE_HOST, KnownHosts
from services.gateway.http.protocol import HEALTH_PATHS
from services.gateway.http.resume import KEPT
from services.gateway.metrics import GatewayMetrics
from services.gateway.reference import routes as reference
from services.gateway.tenants.keyring import Caller, Keyring
from services.gateway.tenants.limiter import Quota
from services.gateway.tenants.metrics import TenantMetrics
from services.gateway.tenants.slots import TenantSlots
from shared.errors import RequestError
from shared.log import logger
from shared.tracing import Span, Tracing

# All other paths need a key, including those that do not exist.
OPEN_PATHS = HEALTH_PATHS | frozenset(console.ASSETS) | frozenset(reference.ASSETS)
MODEL_PATH = "/v1/models/"
# Paths below which things are named, and what may follow the name.
NAMED_BELOW = {
    "/v1/responses/": ("/cancel", "/input_items"),
    "/v1/files/": ("/content",),
    "/v1/batches/": ("/cancel",),
}

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_CLIENT_LEFT = "499"
_EVERYBODY = Caller("")

_log = logger(__name__)


class Edge:
    """ASGI middleware around the whole application."""

    def __init__(
        self,
        app: ASGIApp,
        keyring: Keyring,
        slots: TenantSlots,
        tenant_metrics: TenantMetrics,
        paths: Iterable[str],
        bodies: FailureBodies,
        metrics: GatewayMetrics,
        hosts: KnownHosts,
        tracing: Tracing,
    ) -> None:
        """Wrap `app`. `paths` are the routes that metrics name."""
        self._app = app
        self._hosts = hosts
        self._keyring = keyring
        self._slots = slots
        self._tenant_metrics = tenant_metrics
        self._paths = frozenset(paths)
        self._bodies = bodies
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        scope["path"] = scope["path"].rstrip("/") or "/"  # both forms are one path, to the rules about keys too
        headers = Headers(scope=scope)
        span = self._start_span(scope, headers)
        context = RequestContext(_request_id(headers), "", span, send, take_body(scope))
        status = _CLIENT_LEFT

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
                message = {**message, "headers": _headers(message["headers"], context)}
            await send(message)

        try:
            caller = self._authenticate(scope, headers, context)
            if self._is_rebound(scope, headers):
                form = self._bodies.of(scope["path"])
                await error_response(STRANGE_HOST, None, form)(scope, receive, send_named)
            elif caller is not None:
                context.owner, context.quota = caller.owner, Quota(caller.tenant, caller.share)
                attach_context(scope, context)
                await self._serve(scope, receive, send_named, context)
            else:
                form = self._bodies.of(scope["path"])
                await error_response(UNAUTHORIZED, {"www-authenticate": "Bearer"}, form)(scope, receive, send_named)
        finally:
            detach_context(scope)
            method, path = _method(scope["method"]), self._metric_path(scope["path"])
            self._metrics.requests.labels(method, path, status).inc()
            self._metrics.duration.labels(method, path).observe(time.perf_counter() - started)
            if span is not None:
                spans.end(span, None if status == _CLIENT_LEFT else status)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, context: RequestContext) -> None:
        """Run the application, unless the caller has too many requests here."""
        with ExitStack() as slot:
            try:
                slot.enter_context(self._slots.slot(context.quota.tenant))
            except RequestError as error:
                form = self._bodies.of(scope["path"])
                await error_response(error.failure, None, form)(scope, receive, send)
                return
            await self._app(scope, receive, send)

    def _start_span(self, scope: Scope, headers: Headers) -> Span | None:
        """Start the span of a request for an answer; other requests are too short to be traced."""
        traced = spans.TRACED.get(scope["path"])
        if traced is None or scope["method"] != "POST":
            return None
        return self._tracing.serve(traced.name, headers.get("traceparent"), traced.initial())

    def _authenticate(self, scope: Scope, headers: Headers, context: RequestContext) -> Caller | None:
        """Return the caller that the request's API key names; None, and a line in the log, if there is none.

        The same holds on every path and method; OPEN_PATHS need no key.
        """
        if self._keyring.is_open or scope["path"] in OPEN_PATHS:
            return _EVERYBODY
        given = _given_key(headers)
        caller = None if given is None else self._keyring.find(given)
        if caller is None:
            reason = "missing" if given is None else "unknown"
            self._tenant_metrics.unauthorized.labels(reason).inc()
            fields = {
                "reason": reason,
                "client": (scope.get("client") or ("",))[0],
                "method": scope["method"],
                "path": scope["path"][:128],
                "request_id": context.request_id,
            }
            _log.warning("API key refused", extra=fields)
        return caller

    def _is_rebound(self, scope: Scope, headers: Headers) -> bool:
        """Return True if the request may be a stranger's web page's, which has no key but needs none."""
        if not self._keyring.is_open or scope["path"] in HEALTH_PATHS:
            return False
        return self._hosts.refuses(scope, headers.get("host", ""))

    def _metric_path(self, path: str) -> str:
        """Return the path's name in the metrics: one of a bounded set, whatever clients request."""
        if path in self._paths:
            return path
        for kept in KEPT:
            if path.startswith(f"{kept.path}/"):
                below = next((part for part in ("/events", "/cancel") if path.endswith(part)), "")
                return f"{kept.path}/{{name}}{below}"
        for below, parts in NAMED_BELOW.items():
            if path.startswith(below):
                return below + "{name}" + next((part for part in parts if path.endswith(part)), "")
        return MODEL_PATH + "{model}" if path.startswith(MODEL_PATH) else "other"


def _given_key(headers: Headers) -> str | None:
    """Return the key that a client has sent, as OpenAI's clients do or as Anthropic's; None if it has sent none."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")


def _request_id(headers: Headers) -> str:
    """Return the client's id if it is safe in a header and a log line, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def _headers(given: Sequence[tuple[bytes, bytes]], context: RequestContext) -> list[tuple[bytes, bytes]]:
    """Return the headers of an answer with ours; those about limits replace general ones."""
    limits = context.quota.headers
    kept = [pair for pair in given if pair[0] not in limits] if limits else given
    warnings = [(b"x-millrace-warning", text.encode()) for text in context.warnings]
    request_id = context.request_id.encode()
    # Under both names: OpenAI's clients read the first, Anthropic's the second.
    return [*kept, (b"x-request-id", request_id), (b"request-id", request_id), *limits.items(), *warnings]


def _method(method: str) -> str:
    return method if method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH") else "other"
