"""Work streams (consumer groups, at least once) and logs (plain XREAD, replayable)."""

from collections.abc import Sequence

import msgspec
from redis.asyncio import Redis

from shared.keys import Keys
from shared.messages import Encode, Generate, Message


class Delivery(msgspec.Struct, frozen=True):
    """One entry of a work stream, ours until acked."""

    entry_id: str
    message: Encode | Generate
    attempts: int  # 1 on first delivery


class WorkStream:
    """One replica's membership in the consumer group of `encode` or `generate`.

    An entry is acked and deleted in one transaction when its work has ended, so XLEN is the stage's backlog: waiting
    plus running. Entries of consumers whose lease has expired are claimed by whoever looks next; idle time is never
    the criterion, since long work is not dead work.
    """

    def __init__(self, redis: Redis, keys: Keys, stream: str, service: str, name: str, max_deliveries: int) -> None:
        raise NotImplementedError

    async def join(self) -> None:
        """Create stream, group (from id 0) and consumer where absent."""
        raise NotImplementedError

    async def take(self, count: int, block_ms: int) -> list[Delivery]:
        """Up to `count` new entries, waiting at most `block_ms` (0: do not wait) for the first.

        An entry that cannot be decoded is quarantined.
        """
        raise NotImplementedError

    async def claim_abandoned(self, count: int) -> tuple[list[Delivery], list[Delivery]]:
        """Take over entries of dead consumers and delete consumers that have none left.

        Returns (ours now, poisoned): the second were delivered more than `max_deliveries` times; they have been moved
        to the quarantine stream and acked, and the caller answers their requests with an error.
        """
        raise NotImplementedError

    async def finish(self, entry_ids: Sequence[str]) -> None:
        """Ack and delete, in one transaction."""
        raise NotImplementedError

    async def leave(self) -> None:
        """Delete our consumer if it owns nothing. (What it still owns is claimed by others once our lease is gone.)"""
        raise NotImplementedError

    async def backlog(self) -> int:
        """Waiting plus running."""
        raise NotImplementedError


async def send(redis: Redis, key: str, message: Message, *, max_len: int | None = None) -> str:
    """XADD one message, trimming approximately to `max_len`; returns the entry id."""
    raise NotImplementedError


class LogReader:
    """Reads one or more plain streams from a position on: `tokens:{shard}`, `deltas:{gateway}`, `control`.

    Reading never consumes: positions live here, and a fresh reader may start anywhere (b"0", b"$", an entry id).
    """

    def __init__(self, redis: Redis, positions: dict[str, str]) -> None:
        raise NotImplementedError

    async def read(self, count: int, block_ms: int) -> list[tuple[str, str, Message]]:
        """(stream key, entry id, message) of at most `count` entries a stream, after the current positions.

        Raises:
            ProtocolError: an entry is of another version.
        """
        raise NotImplementedError
