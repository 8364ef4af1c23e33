"""Context of an HTTP request: what the edge knows of it, for the handlers behind the application."""

import msgspec
from starlette.requests import Request
from starlette.types import Scope, Send

from shared.tracing import Span

_KEY = "context"


class RequestContext(msgspec.Struct):
    """Identity of a request that the edge has let in, and what the edge says of it in the answer's headers.

    The chat route writes `request_id`, if the body has one, and `warnings`; nothing else is written.
    """

    request_id: str  # X-Request-ID
    owner: str  # digest of its API key; empty if the path needs none
    span: Span | None  # of a chat request that is traced
    write: Send  # the server's own, for bodies: once a response has begun, nobody on the way to it looks at them
    warnings: tuple[str, ...] = ()  # X-Millrace-Warning


def attach_context(scope: Scope, context: RequestContext) -> None:
    """Put the context into an ASGI scope."""
    scope.setdefault("state", {})[_KEY] = context


def context_of(request: Request) -> RequestContext:
    """Return the context that the edge attached."""
    context: RequestContext = request.scope["state"][_KEY]
    return context
