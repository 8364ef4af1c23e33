"""Reader of the quarantine for the console: which requests, why and when, and nothing of what their clients wrote."""

from pathlib import Path

import msgspec
from redis.asyncio import Redis

from shared.bus.keys import Keys
from shared.bus.lua import read_script
from shared.bus.pipeline_view import QUEUES

HERE = Path(__file__).parent  # where the script is

MAX_LISTED = 20  # newest entries of each stream


class QuarantinedEntry(msgspec.Struct, frozen=True):
    """Dead letter. Its field names are those of GET /console/state."""

    stream: str
    entry: str  # its id in the quarantine; `millrace quarantine show STREAM/ENTRY` shows it
    request_id: str  # as the stages have it; empty if the entry does not say
    reason: str
    attempts: int  # deliveries
    at: float  # unix seconds at which it was quarantined


class Quarantine:
    """Quarantine streams of one deployment."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._keys = keys
        self._entries = redis.register_script(read_script("quarantine_entries", HERE))

    async def newest(self, request_id: str = "") -> list[QuarantinedEntry]:
        """Return the newest entries, of one request if its id is given, the newest first.

        Raises:
            RedisError: Redis cannot be read.
        """
        found = [await self._of(stream, request_id) for stream in QUEUES.values()]
        return sorted((each for part in found for each in part), key=lambda each: each.at, reverse=True)

    async def _of(self, stream: str, request_id: str) -> list[QuarantinedEntry]:
        found = await self._entries(keys=[self._keys.quarantine(stream)], args=[MAX_LISTED, request_id])
        return [_entry(stream, *(str(field, "utf-8", "replace") for field in each)) for each in found]


def _entry(stream: str, entry: str, request_id: str, reason: str, attempts: str) -> QuarantinedEntry:
    count = int(attempts) if attempts.isdecimal() else 0
    return QuarantinedEntry(stream, entry, request_id, reason, count, int(entry.partition("-")[0]) / 1000)
