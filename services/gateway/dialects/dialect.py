"""An API as the rest of the gateway sees it: a body becomes a chat request, and deltas become its answer.

All APIs are thin translations over one pipeline. A request keeps the name of its dialect (`AnswerFormat.dialect`), so
that any gateway can write its answer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from services.gateway.dialects.collected import CollectedChoice
from services.gateway.inflight.request import OpenRequest
from services.gateway.inflight.stored import StoredRequest
from services.gateway.request.statement import Statement
from shared.errors import Failure
from shared.messages import Delta

TextFormat = Callable[[Delta], bytes]


class EventWriter(Protocol):
    """Formatter of one stream of events."""

    @property
    def keep_alive(self) -> bytes:
        """A sign of life."""

    def begin(self) -> bytes:
        """Return the events that come before any delta; nothing if there are none yet."""

    def delta(self, index: int, delta: Delta, skip: int) -> bytes:
        """Return the events of a delta of choice `index`, except the first `skip`, which the client has."""

    def text_format(self, index: int) -> TextFormat:
        """Return what formats the deltas of text of a choice behind its first, without events to skip."""

    def end(self, request: OpenRequest) -> bytes:
        """Return the events behind the last delta: usage, or the failure that ended the request."""


class Dialect(Protocol):
    """One API."""

    @property
    def name(self) -> str:
        """Name that is kept with requests; never changes."""

    @property
    def path(self) -> str:
        """Path of its route, POST."""

    @property
    def schema(self) -> type[msgspec.Struct]:
        """Type of its body, for the description of the routes."""

    def read(self, body: bytes) -> Statement:
        """Understand a body.

        Raises:
            RequestError: 400 naming the field.
        """

    def events(self, request: OpenRequest, fingerprint: str, event_ids: bool) -> EventWriter:
        """Return the writer of a stream. `event_ids`: its events have ids, by which a client can come back."""

    def whole(self, request: OpenRequest, fingerprint: str, choices: Sequence[CollectedChoice]) -> bytes:
        """Return the body of an answer that is not streamed.

        Raises:
            RequestError: 500, it ended without its usage.
        """

    def unfinished(self, request: StoredRequest, fingerprint: str) -> bytes:
        """Return the body that says that an answer is not complete yet."""

    def failure(self, failure: Failure) -> bytes:
        """Return the body of a failure."""


Dialects = Mapping[str, Dialect]  # by name
