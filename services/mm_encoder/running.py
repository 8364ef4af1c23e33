"""One request in hand."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Literal

from shared.bus.ownership import HandedOn
from shared.errors import Failure

Outcome = HandedOn | Literal["over"] | Failure  # over: it has ended, and its answer is kept for a while


@dataclass(slots=True, eq=False)
class Running:
    """`work` may be cancelled by anyone; without it, the request is only being answered."""

    entry_id: str
    attempts: int
    work: asyncio.Task[Outcome] | None = None
    lost: bool = False  # the entry is not ours any more: nothing is left to do
    taken: float = field(default_factory=time.time)  # unix seconds
    prompt_tokens: int | None = None  # once all media have passed their checks; and of these,
    hits: int = 0  # how many had their embeddings already
