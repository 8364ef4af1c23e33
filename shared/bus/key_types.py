"""Names of keys of ours that somebody else has written. WRONGTYPE, which Redis answers then, does not tell them."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from shared.bus.keys import Keys
from shared.log import logger
from shared.redis_errors import Action, action_for, is_wrong_type

REMEDY = "something else than this deployment has written it; delete it, or choose another namespace"

_ABSENT = "none"

_log = logger(__name__)


async def wrong_types(redis: Redis, keys: Keys, blob_redis: Redis | None) -> list[str]:
    """Describe each key that all share and that holds a value of another type: what it is, and should be.

    `blob_redis`: where the blobs are, if that is another Redis.
    """
    types, elsewhere = keys.types(), {} if blob_redis is None else keys.blob_types()
    wrong = await _wrong(redis, {key: kind for key, kind in types.items() if key not in elsewhere})
    return wrong if blob_redis is None else wrong + await _wrong(blob_redis, elsewhere)


async def _wrong(redis: Redis, types: Mapping[str, str]) -> list[str]:
    async with redis.pipeline(transaction=False) as pipe:
        for key in types:
            pipe.type(key)
        found = [kind.decode() for kind in await pipe.execute()]
    return [
        f"{key} is a {kind} and not a {types[key]}"
        for key, kind in zip(types, found, strict=True)
        if kind not in (_ABSENT, types[key])
    ]


async def check_types(redis: Redis, keys: Keys, blob_redis: Redis | None = None) -> None:
    """Look at the types of the keys that all share.

    Raises:
        ResponseError: some hold values of other types. It begins as that of Redis, and names them.
    """
    if wrong := await wrong_types(redis, keys, blob_redis):
        raise ResponseError(f"WRONGTYPE {', '.join(wrong)}: {REMEDY}")


@asynccontextmanager
async def naming_wrong_types(redis: Redis, keys: Keys, blob_redis: Redis | None) -> AsyncIterator[None]:
    """Have an error of a wrong type within name its key.

    Raises:
        ResponseError: as it was within, but for that.
    """
    try:
        yield
    except ResponseError as error:
        if is_wrong_type(error):
            await check_types(redis, keys, blob_redis)
        raise


async def tell_of_wrong_types(redis: Redis, keys: Keys) -> None:
    """Log an error that names such keys. What needs them waits until they are deleted, and all else goes on."""
    try:
        await check_types(redis, keys)
    except ResponseError as error:
        if is_wrong_type(error):
            _log.error("keys of ours hold something else", extra={"reason": str(error)})
        elif action_for(error) is not Action.END:  # else this user may not ask
            raise
