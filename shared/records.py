"""What Redis knows of one request: its record (a hash) and its token journal (a string of uint32).

The record is born with the request's first work entry, in one transaction, and dies with the request. A stage that
takes an entry and finds no record, or a cancelled one, drops the entry.
"""

import msgspec
from redis.asyncio import Redis

from shared.keys import Keys
from shared.messages import Encode, Generate, Request


class Record(msgspec.Struct, frozen=True):
    """A request as its record has it now."""

    request: Request
    epoch: int
    cancelled: bool


class Records:
    """All reading and writing of records and journals."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        raise NotImplementedError

    async def submit(self, stream: str, message: Encode | Generate) -> None:
        """Create the record and append the work entry to `stream`, in one transaction (gateway)."""
        raise NotImplementedError

    async def hand_on(self, message: Generate, stream_done: str, entry_id: str, group: str) -> bool:
        """Append `message` to `generate` and ack and delete the `encode` entry, in one transaction (mm_encoder).

        Returns False, and only acks and deletes, when the record is gone or cancelled.
        """
        raise NotImplementedError

    async def claim(self, request_id: str) -> Record | None:
        """Become the request's owner: raise its epoch by one and return it; None if the record is gone (engine)."""
        raise NotImplementedError

    async def get(self, request_ids: list[str]) -> dict[str, Record]:
        """The records that exist, in one round trip (postproc)."""
        raise NotImplementedError

    async def cancel(self, request_ids: list[str]) -> None:
        """Mark existing records cancelled and broadcast `Cancel`."""
        raise NotImplementedError

    async def write_journal(self, writes: list[tuple[str, int, list[int]]]) -> None:
        """(request id, index, tokens): idempotent writes at their place, in one round trip."""
        raise NotImplementedError

    async def read_journal(self, request_id: str) -> list[int]:
        """The generated tokens journaled so far. (The tail may still be in the tokens stream only.)"""
        raise NotImplementedError

    async def delete(self, request_ids: list[str]) -> None:
        """Remove record and journal."""
        raise NotImplementedError
