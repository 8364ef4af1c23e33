"""State of a request outside the model's thread."""

from dataclasses import dataclass, field

from services.engine.loop.step_output import End
from services.engine.schedule.timeline import Timeline
from shared.bus.blobs import upload_keys
from shared.bus.ownership import Poison
from shared.bus.streams import Delivery
from shared.errors import ProtocolError
from shared.messages import Generate


@dataclass(slots=True, eq=False)
class PendingRequest:
    """One delivered entry of `generate`."""

    entry_id: str
    message: Generate
    attempts: int
    poison: Poison | None  # it has ended so many engines that it is only answered
    epoch: int = 0  # ours, once claimed; what ends under another is not this
    lost: bool = False  # it was no longer ours when we claimed it
    replaces: str | None = None  # the entry under which the request was in hand before
    admitted: bool = False  # the model's thread has it
    cancelled: bool = False  # nobody waits for it
    end: End | None = None  # how it ended, once that is said
    timeline: Timeline = field(default_factory=Timeline)

    @property
    def request_id(self) -> str:
        return self.message.request.id

    @property
    def uploads(self) -> list[str]:
        """Blobs that nobody needs when the request has ended."""
        return upload_keys(self.request_id, len(self.message.spans))

    def late(self, now: float) -> bool:
        """`now` in unix seconds."""
        deadline = self.message.request.deadline
        return deadline is not None and now > deadline


def pending_request(delivery: Delivery, poison: Poison | None) -> PendingRequest:
    """Return the state of a request that was just delivered.

    Raises:
        ProtocolError: the entry is another kind of work.
    """
    if not isinstance(delivery.message, Generate):
        raise ProtocolError(f"a {type(delivery.message).__name__} for the engine")
    return PendingRequest(delivery.entry_id, delivery.message, delivery.attempts, poison)
