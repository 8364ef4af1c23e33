"""Translation of what Redis holds of requests under way into an older version, for a replica that comes and needs it.

All of it is idempotent, and harmless beside other writers and translators.
"""

import contextlib
from collections.abc import AsyncIterator, Collection

from redis.asyncio import Redis

from shared.bus.client import command
from shared.bus.keys import ENCODE, GENERATE, NEWER, Keys
from shared.bus.lua import read_script
from shared.errors import ProtocolError
from shared.message_codec import record_version, translated_entry, translated_record_value

KINDS = {"request": "Request", "begin": "Begin", "finish": "Finish", "encode": "Encode"}  # by field of a record
GROUPS = {ENCODE: "mm_encoder", GENERATE: "engine"}  # the service that reads a work stream, as its consumer group
PAGE = 1000


async def translate_records(redis: Redis, keys: Keys) -> None:
    """Translate what records and log-probabilities have in a newer version than this process writes now.

    A field that has changed meanwhile stays as it is. So does one that is damaged: whoever reads it ends its request.
    """
    replace = redis.register_script(read_script("replace_fields"))
    async for key, values in _records(redis, keys):
        args: list[str | bytes] = []
        for field, value in values.items():
            with contextlib.suppress(ProtocolError):
                if (after := translated_record_value(KINDS[field], value)) is not None:
                    args += [field, value, after]
        if args:
            await replace(keys=[key], args=args)
    async for key, logprobs in _logprobs(redis, keys):
        for index, value in enumerate(logprobs):
            with contextlib.suppress(ProtocolError):
                if (after := translated_record_value("TokenLogprob", value)) is not None:
                    await command(redis, "LSET", key, index, after)


async def translate_entries(redis: Redis, keys: Keys, service: str, name: str) -> None:
    """Replace work entries of a newer version than is written now, unless another living replica works on them.

    Those that this replica works on are replaced, too: it loses them, and whoever is given them next goes on from the
    tokens that are there, as after a crash.
    """
    replace = redis.register_script(read_script("replace_entry"))
    for stream, group in GROUPS.items():
        consumer = name if group == service else ""
        for raw_id, fields in await command(redis, "XRANGE", keys.stream(stream), "-", "+"):
            with contextlib.suppress(ProtocolError):
                if entry := translated_entry(fields):
                    args = [group, consumer, raw_id, NEWER, keys.replica_prefix(group)]
                    named = [keys.stream(stream), keys.request(entry[b"r"].decode(errors="replace"))]
                    values = [entry[b"v"], entry[b"m"], entry[b"r"], entry.get(b"k", b"")]
                    await replace(keys=named, args=[*args, *values, int(stream == ENCODE)])


async def holds_newer(redis: Redis, keys: Keys, shards: Collection[int], versions: Collection[int]) -> bool:
    """Return whether a record, a work stream or one of these tokens streams has anything of one of these versions."""
    look = redis.register_script(read_script("find_version"))
    for stream in (*map(keys.stream, GROUPS), *map(keys.tokens, shards)):
        after = "-"
        while after:
            found, after = await look(keys=[stream], args=[after, PAGE, *versions])
            if found:
                return True
    async for _, values in _records(redis, keys):
        if any(record_version(value) in versions for value in values.values()):
            return True
    async for _, logprobs in _logprobs(redis, keys):
        if any(record_version(value) in versions for value in logprobs):
            return True
    return False


async def _records(redis: Redis, keys: Keys) -> AsyncIterator[tuple[bytes, dict[str, bytes]]]:
    """Yield the key of each record, and its fields that have a version."""
    async for key in redis.scan_iter(match=keys.request("*"), count=PAGE, _type="hash"):
        values = zip(KINDS, await command(redis, "HMGET", key, *KINDS), strict=True)
        yield key, {field: value for field, value in values if value is not None}


async def _logprobs(redis: Redis, keys: Keys) -> AsyncIterator[tuple[bytes, list[bytes]]]:
    """Yield the key of each list of log-probabilities, and its elements."""
    async for key in redis.scan_iter(match=keys.logprobs("*"), count=PAGE, _type="list"):
        yield key, await command(redis, "LRANGE", key, 0, -1)
