"""Reader of this gateway's stream of deltas; it dispatches each message to the open requests."""

import asyncio
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.gateway.inflight.registry import OpenRequests
from shared import log
from shared.bus.keys import Keys
from shared.bus.lua import read_script
from shared.bus.streams import LogReader
from shared.message_codec import to_entry
from shared.messages import Deltas

HERE = Path(__file__).parent  # where the scripts are

BATCH = 256  # entries of one read
BLOCK_MS = 1000
RETRY_S = 0.2
TTL_S = 60  # of the stream, so that one whose gateway died without deleting it expires

_EMPTY = to_entry(Deltas(()))

logger = log.logger(__name__)


class Inbox:
    """The stream `deltas:{gateway}`.

    A gateway's name is new with every process, so its stream starts empty and is read from the beginning.
    """

    def __init__(self, redis: Redis, keys: Keys, gateway: str, open_requests: OpenRequests) -> None:
        self._redis = redis
        self._key = keys.deltas(gateway)
        self._reader = LogReader(redis, {self._key: "0"}, hop="deltas")
        self._keep_stream = redis.register_script(read_script("keep_stream", HERE))
        self._open_requests = open_requests

    async def create(self) -> None:
        """Create the stream, waiting for Redis however long it takes."""
        while True:
            try:
                await self._keep()
            except RedisError as error:
                logger.warning("could not create the stream of deltas; retrying", extra={"error": str(error)})
                await asyncio.sleep(RETRY_S)
            else:
                return

    async def run(self) -> None:
        """Read until cancelled. While Redis cannot be reached the position is kept.

        An unreadable entry is skipped, and does not tell whose it was; that request has a gap, and requests the missing
        deltas again.
        """
        while True:
            try:
                entries = await self._reader.read(BATCH, BLOCK_MS)
            except RedisError as error:
                logger.warning("could not read deltas; retrying", extra={"error": str(error)})
                await asyncio.sleep(RETRY_S)
                continue
            self._open_requests.dispatch([message for _key, _entry_id, message in entries])
            await self._open_requests.request_missing()

    async def watch(self, every_s: float) -> None:
        """Until cancelled, keep the stream from expiring and open requests from waiting in vain.

        A Redis that came back without the stream has lost more than that: then the record of every open request is
        checked.
        """
        while True:
            await asyncio.sleep(every_s)
            try:
                await self._open_requests.check_records(everything=await self._keep())
            except RedisError as error:
                logger.warning("could not check the open requests; retrying", extra={"error": str(error)})

    async def delete(self) -> None:
        """Delete the stream: no process will read it again."""
        await self._redis.delete(self._key)

    async def _keep(self) -> bool:
        """Renew the stream's expiry, trim what was read, and create it if it is gone; True if it was."""
        args: list[str | bytes | int] = [TTL_S, _EMPTY[b"v"], _EMPTY[b"m"], self._reader.positions[self._key]]
        created = bool(await self._keep_stream(keys=[self._key], args=args))
        if created:
            self._reader.positions[self._key] = "0"  # the ids of a new stream may be below the old one's
        return created
