"""State of a request on the event loop, outside the model's thread."""

from dataclasses import dataclass, field

from services.engine.loop.step_output import End
from services.engine.schedule.timeline import Timeline
from shared.bus.blobs import upload_keys
from shared.bus.ownership import Poison
from shared.bus.work_stream import Delivery
from shared.errors import ProtocolError
from shared.messages import Generate


@dataclass(slots=True, eq=False)
class PendingRequest:
    """One delivered entry of `generate`."""

    entry_id: str
    message: Generate
    attempts: int
    poison: Poison | None  # it has crashed so many engines that it is only failed
    epoch: int = 0  # fencing token, once raised by this engine; an End under another epoch is not of this delivery
    lost: bool = False  # another engine owned the entry when this one raised the epoch
    replaces: str | None = None  # the entry under which the request was in flight before
    admitted: bool = False  # handed over to the model's thread
    lacking: bool = False  # the model's thread has it, and waits for embeddings
    cancelled: bool = False  # no client waits for it
    end: End | None = None  # once its Finish is in the stream
    timeline: Timeline = field(default_factory=Timeline)

    @property
    def request_id(self) -> str:
        return self.message.request.id

    @property
    def log_fields(self) -> dict[str, str]:
        """Its ids, as a line of a log has them."""
        return self.message.request.log_fields

    @property
    def uploads(self) -> list[str]:
        """Keys of the blobs to delete when the request has ended."""
        return upload_keys(self.request_id, len(self.message.spans))

    @property
    def tokens(self) -> int | None:
        """Tokens of the answer, once it has ended; None if no tenant is charged for them."""
        return None if self.end is None or self.message.request.share is None else self.end.generated

    def late(self, now: float) -> bool:
        """Return whether the deadline has passed at `now`, in unix seconds."""
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
