"""A request as Redis has it, for whoever reads its answer at another connection or gateway."""

import math

import msgspec

from services.gateway.request.answer_format import AnswerFormat
from shared.bus.records import Record


class StoredRequest(msgspec.Struct, frozen=True):
    """A request that runs, or whose answer is kept, as its records have it."""

    id: str
    answer_format: AnswerFormat
    records: tuple[Record, ...]  # by choice

    @property
    def created(self) -> float:
        return self.records[0].request.created

    @property
    def deadline(self) -> float:
        return self.records[0].request.deadline or math.inf

    @property
    def ended(self) -> bool:
        return all(record.finish is not None for record in self.records)
