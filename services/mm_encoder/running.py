"""State of one request in flight."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Literal

from shared.bus.keys import ENCODE
from shared.bus.ownership import ForwardOutcome, Poison
from shared.bus.work_stream import Delivery
from shared.errors import Failure, ProtocolError
from shared.messages import Encode

Outcome = ForwardOutcome | Literal["over"] | Failure  # over: it has ended, and its answer is kept for some time


@dataclass(slots=True, eq=False)
class RunningRequest:
    """State of one delivered request. Cancel its `work` to stop it; a request without `work` is only being answered."""

    entry_id: str
    message: Encode
    attempts: int
    poison: Poison | None  # the entry was delivered so often that its request is failed without work
    replaces: str | None = None  # the entry under which the request was in flight before
    work: asyncio.Task[Outcome] | None = None
    lost: bool = False  # another replica owns the entry: nothing is left to do
    taken: float = field(default_factory=time.time)  # unix seconds
    prompt_tokens: int | None = None  # once all media have passed their checks; and of these,
    hits: int = 0  # the number whose embeddings were stored already
    is_fetching: bool = False  # links, without a place
    lacks: int = 0  # media whose embeddings are not stored yet

    @property
    def request_id(self) -> str:
        return self.message.request.id

    @property
    def tokens(self) -> int | None:
        """None: what an encoder does has been charged before."""
        return None

    @property
    def uploads(self) -> list[str]:
        """Keys of the blobs that clients uploaded with the request."""
        return [media.blob for media in self.message.media if media.blob is not None]


def running_request(delivery: Delivery, poison: Poison | None) -> RunningRequest:
    """Return the state of a request that was just delivered.

    Raises:
        ProtocolError: the entry is another kind of work.
    """
    if not isinstance(delivery.message, Encode):
        raise ProtocolError(f"a {type(delivery.message).__name__} in the stream {ENCODE}")
    return RunningRequest(delivery.entry_id, delivery.message, delivery.attempts, poison)
