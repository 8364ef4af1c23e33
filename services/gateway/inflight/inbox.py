"""Reads this gateway's stream of answers and hands each message to the desk."""

import asyncio
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.gateway.inflight.registry import OpenRequests
from shared import log
from shared.bus.keys import Keys
from shared.bus.lua import read_script
from shared.bus.streams import LogReader
from shared.errors import ProtocolError
from shared.messages import Deltas, to_entry

HERE = Path(__file__).parent  # where the scripts are

BATCH = 256  # entries a read
BLOCK_MS = 1000
RETRY_S = 0.2
TTL_S = 60  # of the stream of a gateway that died without deleting it

_NOTHING = to_entry(Deltas(()))

logger = log.logger(__name__)


class Inbox:
    """The stream `deltas:{gateway}`. A gateway's name is new with every process, so its stream starts empty, and
    reading from the beginning misses nothing."""

    def __init__(self, redis: Redis, keys: Keys, gateway: str, open_requests: OpenRequests) -> None:
        self._redis = redis
        self._key = keys.deltas(gateway)
        self._reader = LogReader(redis, {self._key: "0"}, hop="deltas")
        self._keep = redis.register_script(read_script("keep_stream", HERE))
        self._open_requests = open_requests

    async def create(self) -> None:
        """Make the stream, however long it takes Redis to be there."""
        while True:
            try:
                await self._keep_it()
            except RedisError as error:
                logger.warning("cannot make the stream of answers", extra={"error": str(error)})
                await asyncio.sleep(RETRY_S)
            else:
                return

    async def run(self) -> None:
        """Read until cancelled. While Redis cannot be reached the position is kept.

        Whose answer an unreadable entry held cannot be known; that request has a gap, and asks for what it missed.
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
                self._open_requests.route(message)
            await self._open_requests.catch_up()

    async def watch(self, every_s: float) -> None:
        """Until cancelled, keep the stream from expiring and the desk from waiting in vain.

        A Redis that came back without the stream has lost more than that: then everything open is looked up.
        """
        while True:
            await asyncio.sleep(every_s)
            try:
                await self._open_requests.look(everything=await self._keep_it())
            except RedisError as error:
                logger.warning("cannot look after requests", extra={"error": str(error)})

    async def delete(self) -> None:
        """Remove the stream: nobody will read it again."""
        await self._redis.delete(self._key)

    async def _keep_it(self) -> bool:
        """Renew the stream's expiry, so that it outlives a crash of ours by no more, and cut what was read; True if it
        had to be made anew."""
        args: list[str | bytes | int] = [TTL_S, _NOTHING[b"v"], _NOTHING[b"m"], self._reader.positions[self._key]]
        made = bool(await self._keep(keys=[self._key], args=args))
        if made:
            self._reader.positions[self._key] = "0"  # the ids of a new stream may be below the old one's
        return made
