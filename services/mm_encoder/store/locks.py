"""Cross-replica single-flight: one lock per content key in Redis, void when its owner's lease expires.

The owner encodes and stores the embeddings of the key; the other replicas wait for them. A release is broadcast on the
control stream. A wait ends after `recheck_s` in any case, since the message may be lost, or its sender may die.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from redis.asyncio import Redis

from shared.bus.keys import Keys
from shared.bus.lua import read_script
from shared.bus.records import CONTROL_LENGTH
from shared.crash_points import crash_point
from shared.message_codec import to_entry
from shared.message_versions import versioned_write
from shared.messages import Encoded

HERE = Path(__file__).parent  # where the scripts are


class EncodeLocks:
    """One replica's encode locks. Within a process, callers ask for a key one at a time (SingleFlight in cache.py)."""

    def __init__(self, redis: Redis, keys: Keys, service: str, name: str, recheck_s: float) -> None:
        self._key = keys.encode_locks()
        self._control = keys.control()
        self._leases = keys.replica_prefix(service)
        self._name = name
        self._recheck_s = recheck_s
        self._take_lock = redis.register_script(read_script("take_lock", HERE))
        self._release_lock = redis.register_script(read_script("release_lock", HERE))
        self._sweep_locks = redis.register_script(read_script("sweep_locks", HERE))
        self._waiting: dict[str, asyncio.Event] = {}

    async def release_own(self) -> None:
        """Release the locks that an earlier process of this name left: for other replicas their owner is alive.

        Call it before the first `encode_once`.
        """
        await self._sweep_locks(keys=[self._key], args=[self._leases, self._name])

    async def encode_once(
        self, key: str, stored: Callable[[], Awaitable[bool]], encode: Callable[[], Awaitable[None]]
    ) -> None:
        """Return when the embeddings of `key` are stored: by another replica, or by `encode` under our lock."""
        while not await self._acquire(key):
            await self._wait_for_release(key)
        try:
            if not await stored():
                await encode()
        finally:
            await self._release(key)

    async def encode_if_free(self, key: str, encode: Callable[[], Awaitable[None]]) -> None:
        """Call `encode` under the lock of `key`, unless another replica has it."""
        if await self._take(key):
            try:
                await encode()
            finally:
                await self._release(key)

    def encoded(self, message: Encoded) -> None:
        """Wake the task that waits here for this key."""
        if (event := self._waiting.get(message.key)) is not None:
            event.set()

    async def release_dead(self) -> None:
        """Release the locks of dead replicas."""
        await self._sweep_locks(keys=[self._key], args=[self._leases, ""])

    async def _acquire(self, key: str) -> bool:
        # Registered before asking: otherwise the message of a release might arrive in between and be missed.
        self._waiting.setdefault(key, asyncio.Event()).clear()
        if not await self._take(key):
            return False
        self._waiting.pop(key, None)
        crash_point("mm_encoder.take_off.after")
        return True

    async def _take(self, key: str) -> bool:
        return bool(await self._take_lock(keys=[self._key], args=[key, self._name, self._leases]))

    async def _wait_for_release(self, key: str) -> None:
        event = self._waiting[key]
        try:
            async with asyncio.timeout(self._recheck_s):
                await event.wait()
        except TimeoutError:
            pass
        finally:
            self._waiting.pop(key, None)

    @versioned_write
    async def _release(self, key: str) -> None:
        crash_point("mm_encoder.land.before")
        entry = to_entry(Encoded(key))
        args: list[str | bytes | int] = [key, self._name, CONTROL_LENGTH, entry[b"v"], entry[b"m"]]
        await self._release_lock(keys=[self._key, self._control], args=args)
        crash_point("mm_encoder.land.after")
