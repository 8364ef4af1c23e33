"""Entries that nobody can read, strewn among those of a running system, and their way into the quarantine."""

import random
from typing import Any

import msgspec
from chaos_system import SHARDS, System
from redis.exceptions import RedisError

from shared.bus.keys import ENCODE, GENERATE
from shared.message_versions import VERSION

MARK = b"garbage of a chaos run"
AT_ONCE = 40


def garbage(rng: random.Random) -> dict[bytes, bytes]:
    """Return the fields of an entry: bytes that are no message, half a message, or one of a version that nobody has.

    It names no request, so it is nobody's failure.
    """
    wrong = {"type": rng.choice(["Generate", "Tokens", "Deltas", "Cancel", "Nothing"]), "mark": MARK}
    m = rng.choice([MARK, msgspec.msgpack.encode(wrong), msgspec.msgpack.encode(wrong)[:20] + MARK])
    return {b"v": rng.choice([b"%d" % VERSION, b"", b"x", b"999999"]), b"m": m}


async def strew(system: System, rng: random.Random) -> None:
    """Append garbage to every stream that is there. A Redis that goes away meanwhile is another fault's doing."""
    keys, redis = system.keys, system.redis
    streams = [keys.stream(ENCODE), keys.stream(GENERATE), keys.control(), *map(keys.tokens, range(SHARDS))]
    try:
        streams += sorted([key.decode() async for key in redis.scan_iter(match=keys.deltas("*"), count=1000)])
        for stream in streams:
            for _ in range(rng.randint(1, AT_ONCE)):
                await redis.xadd(stream, garbage(rng), nomkstream=True)  # type: ignore[arg-type]  # dict is invariant
    except RedisError:
        pass


async def sweep(system: System) -> None:
    """Delete garbage from the quarantine, and nothing else."""
    for stream in (ENCODE, GENERATE):
        quarantine = system.keys.quarantine(stream)
        entries: Any = await system.redis.xrange(quarantine)
        ours = [entry for entry, fields in entries if MARK in fields[b"m"]]
        if ours:
            await system.redis.xdel(quarantine, *ours)
        if await system.redis.exists(quarantine) and not await system.redis.xlen(quarantine):
            await system.redis.delete(quarantine)
