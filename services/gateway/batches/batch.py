"""A batch as Redis has it, and as OpenAI's clients read it. Pure.

validating -> in_progress -> finalizing -> completed        cancelling may follow the first two: -> cancelled
    |              |-> expired (also from validating)
    |-> failed
"""

from collections.abc import Mapping

import msgspec

from services.gateway.batches.lines import LineError

PREFIX = "batch_"
VALIDATING, IN_PROGRESS, FINALIZING, CANCELLING = "validating", "in_progress", "finalizing", "cancelling"
COMPLETED, FAILED, EXPIRED, CANCELLED = "completed", "failed", "expired", "cancelled"
# By which statuses each can be reached. Those of a batch that works are written by the holder of its lease.
BEFORE = {
    IN_PROGRESS: (VALIDATING,),
    FINALIZING: (IN_PROGRESS,),
    CANCELLING: (VALIDATING, IN_PROGRESS),
    COMPLETED: (FINALIZING,),
    FAILED: (VALIDATING, IN_PROGRESS, CANCELLING),
    EXPIRED: (VALIDATING, IN_PROGRESS),
    CANCELLED: (CANCELLING,),
}
ENDS = (COMPLETED, FAILED, EXPIRED, CANCELLED)
TIMES = tuple(f"{status}_at" for status in BEFORE)
FIELDS = ("about", "status", "total", "completed", "failed", "expired", "errors", *TIMES)  # of the hash


class About(msgspec.Struct, frozen=True, omit_defaults=True):
    """Part of a batch that never changes. Fields may be added at the end, with defaults."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    output_file_id: str
    error_file_id: str
    completion_window: str
    created_at: int  # unix seconds
    expires_at: int
    output_keep_s: int  # seconds for which output and errors are kept after the end
    metadata: dict[str, str] | None = None
    trace: str | None = None  # traceparent of its creation


class Batch(msgspec.Struct, frozen=True):
    """A batch as it is now."""

    about: About
    status: str
    total: int
    completed: int
    failed: int
    expired: int = 0  # lines of the file of errors that say so
    errors: tuple[LineError, ...] = ()
    times: Mapping[str, int] = {}

    @property
    def ended(self) -> bool:
        return self.status in ENDS

    def resource(self) -> dict[str, object]:
        """Return the batch as OpenAI's clients read it. Its files are named once it has ended, if they have a line."""
        about = self.about
        has_errors = self.ended and bool(self.failed or self.expired)
        errors = {"object": "list", "data": self.errors} if self.errors else None
        return {
            "id": about.id,
            "object": "batch",
            "endpoint": about.endpoint,
            "errors": errors,
            "input_file_id": about.input_file_id,
            "completion_window": about.completion_window,
            "status": self.status,
            "output_file_id": about.output_file_id if self.ended and self.completed else None,
            "error_file_id": about.error_file_id if has_errors else None,
            "created_at": about.created_at,
            "expires_at": about.expires_at,
            **{name: self.times.get(name) for name in TIMES},
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": about.metadata,
        }


_errors = msgspec.json.Decoder(tuple[LineError, ...])


def decode(values: Mapping[str, bytes]) -> Batch:
    """Return a batch from the fields of its hash.

    Raises:
        MsgspecError, ValueError, KeyError: it cannot be read.
    """
    return Batch(
        about=msgspec.json.decode(values["about"], type=About),
        status=str(values["status"], "ascii"),
        total=int(values["total"]),
        completed=int(values.get("completed", 0)),
        failed=int(values.get("failed", 0)),
        expired=int(values.get("expired", 0)),
        errors=_errors.decode(values.get("errors", b"[]")),
        times={name: int(values[name]) for name in TIMES if name in values},
    )
