"""Context of an HTTP request: what the edge knows of it, for the handlers behind the application."""

from collections.abc import Callable

import msgspec
from starlette.requests import Request
from starlette.types import Scope, Send

from services.gateway.http.direct import DirectBody
from services.gateway.tenants.limiter import Quota
from shared.tracing import Span

_KEY = "context"


class RequestContext(msgspec.Struct):
    """Identity of a request that the edge has let in, and what the edge says of it in the answer's headers.

    The chat route writes `request_id`, if the body has one, and `warnings`, the limiter the headers of `quota`; nothing
    else is written.
    """

    request_id: str  # X-Request-ID
    owner: str  # name or digest of its API key (Caller.owner); empty if the path needs none
    span: Span | None  # of a request for an answer that is traced
    write: Send  # the server's own, for bodies: once a response has begun, nobody on the way to it looks at them
    body: DirectBody | None = None  # the same without waiting; None: the server has only `write`
    quota: Quota = msgspec.field(default_factory=Quota)  # its tenant, and headers about limits
    warnings: tuple[str, ...] = ()  # X-Millrace-Warning
    # Deadline in unix seconds of a request that no connection waits for, and until when its answer is kept.
    until: float | None = None
    # Writes something into a stream, since its client sends nothing more and may have left; None: no stream has begun.
    ask_client: Callable[[], None] | None = None


def attach_context(scope: Scope, context: RequestContext) -> None:
    """Put the context into an ASGI scope."""
    scope.setdefault("state", {})[_KEY] = context


def detach_context(scope: Scope) -> None:
    """Take the context out of the scope of an answered request: `write` leads back to the scope, a reference cycle."""
    scope.get("state", {}).pop(_KEY, None)


def find_context(scope: Scope) -> RequestContext | None:
    """Return the context that the edge attached, if it has."""
    context: RequestContext | None = scope.get("state", {}).get(_KEY)
    return context


def context_of(request: Request) -> RequestContext:
    """Return the context that the edge attached."""
    context: RequestContext = request.scope["state"][_KEY]
    return context
