"""Check that Redis keeps what it is given: a memory that is full may refuse more, and may not take other data instead.

    maxmemory-policy        what it evicts when `maxmemory` is reached      a replica that starts
    noeviction              nothing: it refuses writes (OOM), which wait    starts
    volatile-*              keys with an expiry: leases, uploads,           starts, with a warning
                            embeddings, idempotency keys, stored
                            responses, answers that have ended
    allkeys-*               any: also requests under way, streams, files    ends
                            and batches

Without a `maxmemory` nothing is evicted, whatever the policy. Of a Redis for blobs alone, encoders ask, and warn of any
policy but the first: embeddings are made again, but a request whose upload is evicted fails.
"""

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from shared import log
from shared.errors import ConfigError

ANY_KEY = "allkeys-"
KEEPS_ALL = "noeviction"

_log = log.logger(__name__)


async def check_eviction(redis: Redis) -> None:
    """Check the policy of a Redis.

    Raises:
        ConfigError: it may evict any key.
    """
    if (found := await _evicting(redis)) is None:
        return
    policy, where = found
    if policy.startswith(ANY_KEY):
        raise ConfigError(
            f"{where}: requests under way, files and batches would be lost. Set maxmemory-policy noeviction "
            "(docs/operations.md, 'Redis')"
        )
    _log.warning(f"{where}: idempotency keys, stored responses and uploads may be lost; set noeviction")


async def check_eviction_of_blobs(redis: Redis) -> None:
    """Warn of the policy of a Redis that has blobs alone, if it evicts."""
    if (found := await _evicting(redis)) is not None:
        _log.warning(
            f"blob_redis_url: {found[1]}: a request whose upload it evicts fails; set noeviction, and more memory than "
            "blob_budget_bytes, within which we evict embeddings ourselves"
        )


async def _evicting(redis: Redis) -> tuple[str, str] | None:
    """Return the policy of a Redis that evicts, and what to say of it; None if it does not, or may not be asked."""
    try:
        info = await redis.info("memory")
    except ResponseError as error:  # this user may not INFO, or nobody: some services rename commands away
        _log.info("cannot tell whether Redis evicts: it refuses INFO", extra={"error": str(error)})
        return None
    policy, limit = info.get("maxmemory_policy", KEEPS_ALL), info.get("maxmemory", 0)
    if policy == KEEPS_ALL or not limit:
        return None
    return policy, f"Redis evicts keys when its memory of {limit} bytes is full (maxmemory-policy {policy})"
