"""Reads this gateway's stream of answers and hands each message to the desk."""

import asyncio

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.gateway.desk import Desk
from shared import log
from shared.errors import ProtocolError
from shared.keys import Keys
from shared.streams import LogReader

BATCH = 256  # entries a read
BLOCK_MS = 1000
RETRY_S = 0.2
TTL_S = 3600  # of the stream of a gateway that died without deleting it
TTL_EVERY_S = 600.0

logger = log.logger(__name__)


class Inbox:
    """The stream `deltas:{gateway}`. A gateway's name is new with every process, so its stream starts empty, and
    reading from the beginning misses nothing."""

    def __init__(self, redis: Redis, keys: Keys, gateway: str, desk: Desk) -> None:
        self._redis = redis
        self._key = keys.deltas(gateway)
        self._reader = LogReader(redis, {self._key: "0"})
        self._desk = desk

    async def run(self) -> None:
        """Read until cancelled. While Redis cannot be reached the position is kept.

        Whose answer an unreadable entry held cannot be known; that request ends at its deadline.
        """
        while True:
            try:
                entries = await self._reader.read(BATCH, BLOCK_MS)
            except RedisError as error:
                logger.warning("cannot read answers", extra={"error": str(error)})
                await asyncio.sleep(RETRY_S)
                continue
            except ProtocolError as error:
                logger.error("unreadable answer", extra={"error": str(error)})
                continue
            for _key, _entry_id, message in entries:
                self._desk.route(message)

    async def keep(self) -> None:
        """Renew the stream's expiry until cancelled, so that it outlives a crash of ours by no more than that."""
        while True:
            try:
                await self._redis.expire(self._key, TTL_S)
            except RedisError as error:
                logger.warning("cannot renew the stream", extra={"error": str(error)})
            await asyncio.sleep(TTL_EVERY_S)

    async def delete(self) -> None:
        """Remove the stream: nobody will read it again."""
        await self._redis.delete(self._key)
