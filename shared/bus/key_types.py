"""Names of keys of ours that somebody else has written. WRONGTYPE, which Redis answers then, does not tell them."""

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from shared.bus.keys import Keys
from shared.log import logger
from shared.redis_errors import Action, action_for, is_wrong_type

_ABSENT = "none"

_log = logger(__name__)


async def check_types(redis: Redis, keys: Keys) -> None:
    """
    Raises:
        ResponseError: keys that all share hold values of other types. It begins as that of Redis, and names them.
    """
    types = keys.types()
    async with redis.pipeline(transaction=False) as pipe:
        for key in types:
            pipe.type(key)
        found = [kind.decode() for kind in await pipe.execute()]
    wrong = [
        f"{key} is a {kind} and not a {types[key]}"
        for key, kind in zip(types, found, strict=True)
        if kind not in (_ABSENT, types[key])
    ]
    if wrong:
        raise ResponseError(
            f"WRONGTYPE {', '.join(wrong)}: something else than this deployment has written it; delete it, or choose "
            "another namespace"
        )


async def tell_of_wrong_types(redis: Redis, keys: Keys) -> None:
    """Log an error that names such keys. What needs them waits until they are deleted, and all else goes on."""
    try:
        await check_types(redis, keys)
    except ResponseError as error:
        if is_wrong_type(error):
            _log.error("keys of ours hold something else", extra={"reason": str(error)})
        elif action_for(error) is not Action.END:  # else this user may not ask
            raise
