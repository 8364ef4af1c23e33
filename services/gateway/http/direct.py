"""Body of a response, written without waiting: what a server offers beside the `send` of ASGI."""

from typing import Protocol

from starlette.types import Scope

_KEY = "body"


class DirectBody(Protocol):
    """Body of one response, beside the `send` of ASGI, which may wait."""

    @property
    def is_ready(self) -> bool:
        """True if the client is there and does not lag: what is written goes out at once."""

    @property
    def is_chunked(self) -> bool:
        """True if the head was sent, and said that the body comes in chunks."""

    def write(self, data: bytes) -> None:
        """Write a part of a body in chunks without waiting, behind all that was sent, while `is_ready`."""

    def abort(self) -> None:
        """Close the connection of a client that does not read, without what it has not read."""


def attach_body(scope: Scope, body: DirectBody) -> None:
    """Put a response's body into the ASGI scope of its request."""
    scope.setdefault("state", {})[_KEY] = body


def take_body(scope: Scope) -> DirectBody | None:
    """Return the body that the server attached, if it has, and take it out of the scope, to which it leads back."""
    body: DirectBody | None = scope.get("state", {}).pop(_KEY, None)
    return body
