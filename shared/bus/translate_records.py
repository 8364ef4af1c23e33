"""Translation of the records of requests under way into an older version, for a replica that comes and needs it."""

from redis.asyncio import Redis

from shared.bus.client import command
from shared.bus.keys import Keys
from shared.bus.lua import read_script
from shared.messages import translated_record_value

KINDS = {"request": "Request", "begin": "Begin", "finish": "Finish", "encode": "Encode"}  # by field of a record
PAGE = 1000


async def translate_records(redis: Redis, keys: Keys) -> None:
    """Translate what records and log-probabilities have in a newer version than this process writes now.

    Idempotent, and harmless beside other writers: a field that has changed meanwhile stays as it is.
    """
    replace = redis.register_script(read_script("replace_fields"))
    async for key in redis.scan_iter(match=keys.request("*"), count=PAGE, _type="hash"):
        values = dict(zip(KINDS, await command(redis, "HMGET", key, *KINDS), strict=True))
        args: list[str | bytes] = []
        for field, value in values.items():
            if value is not None and (after := translated_record_value(KINDS[field], value)) is not None:
                args += [field, value, after]
        if args:
            await replace(keys=[key], args=args)
    async for key in redis.scan_iter(match=keys.logprobs("*"), count=PAGE, _type="list"):
        for index, value in enumerate(await command(redis, "LRANGE", key, 0, -1)):
            if (after := translated_record_value("TokenLogprob", value)) is not None:
                await command(redis, "LSET", key, index, after)
