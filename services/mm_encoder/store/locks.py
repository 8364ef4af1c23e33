"""Of all replicas, one at a time makes the embeddings of a key; the others wait for what it stores.

Whose turn it is stands in Redis and is void once that replica's lease has expired, so a death frees it. Who is done
says so on the control stream; a wait ends after `look_s` anyway, since that word may be lost, or its speaker.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from redis.asyncio import Redis

from shared.bus.keys import Keys
from shared.bus.lua import read_script
from shared.bus.records import CONTROL_LENGTH
from shared.crash_points import crash_point
from shared.messages import Encoded, to_entry

HERE = Path(__file__).parent  # where the scripts are


class EncodeLocks:
    """This replica's part. Within the process a key is asked for once at a time."""

    def __init__(self, redis: Redis, keys: Keys, service: str, name: str, look_s: float) -> None:
        self._key = keys.flights()
        self._control = keys.control()
        self._leases = keys.replica_prefix(service)
        self._name = name
        self._look_s = look_s
        self._take_off = redis.register_script(read_script("take_lock", HERE))
        self._land = redis.register_script(read_script("release_lock", HERE))
        self._sweep = redis.register_script(read_script("sweep_locks", HERE))
        self._waiting: dict[str, asyncio.Event] = {}

    async def begin(self) -> None:
        """Void the turns that a process of our name has left, before this one has any: for others it is alive."""
        await self._sweep(keys=[self._key], args=[self._leases, self._name])

    async def make(self, key: str, stored: Callable[[], Awaitable[bool]], make: Callable[[], Awaitable[None]]) -> None:
        """Return when the embeddings of `key` are stored: by `make`, if it is our turn and they are not there yet."""
        while not await self._ours(key):
            await self._until_landed(key)
        try:
            if not await stored():
                await make()
        finally:
            await self._end(key)

    def encoded(self, message: Encoded) -> None:
        """Wake whoever waits here for this key."""
        if (event := self._waiting.get(message.key)) is not None:
            event.set()

    async def sweep(self) -> None:
        """Void the turns of dead replicas."""
        await self._sweep(keys=[self._key], args=[self._leases, ""])

    async def _ours(self, key: str) -> bool:
        # Before we ask: else the word that it is free might come in between.
        self._waiting.setdefault(key, asyncio.Event()).clear()
        if not await self._take_off(keys=[self._key], args=[key, self._name, self._leases]):
            return False
        self._waiting.pop(key, None)
        crash_point("mm_encoder.take_off.after")
        return True

    async def _until_landed(self, key: str) -> None:
        event = self._waiting[key]
        try:
            async with asyncio.timeout(self._look_s):
                await event.wait()
        except TimeoutError:
            pass
        finally:
            self._waiting.pop(key, None)

    async def _end(self, key: str) -> None:
        crash_point("mm_encoder.land.before")
        entry = to_entry(Encoded(key))
        args: list[str | bytes | int] = [key, self._name, CONTROL_LENGTH, entry[b"v"], entry[b"m"]]
        await self._land(keys=[self._key, self._control], args=args)
        crash_point("mm_encoder.land.after")
