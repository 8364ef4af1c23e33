"""Times of a request's steps through this engine."""

import time
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Timeline:
    """Unix seconds; None: not yet. The model's thread writes all but `taken` and `ended`."""

    taken: float = field(default_factory=time.time)  # the entry was delivered
    scheduled: float | None = None  # its first step began
    first_token: float | None = None  # its first token here was drawn
    ended: float | None = None
    resumed_tokens: int = 0  # generated before, elsewhere
    cached_tokens: int = 0  # of the prompt, in the prefix cache when it was scheduled
    preemptions: int = 0
