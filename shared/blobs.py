"""Large values in Redis: chunks of about 1 MB, so that no other client waits behind one; TTL; a byte budget."""

from redis.asyncio import Redis

from shared.keys import Keys


class Blobs:
    """A store of immutable values by (kind, key). Kinds: "media" (uploaded bytes), "embeds" (encoder output)."""

    def __init__(self, redis: Redis, keys: Keys, ttl_s: int, budget_bytes: int) -> None:
        raise NotImplementedError

    async def put(self, kind: str, key: str, data: bytes | memoryview, meta: bytes = b"") -> None:
        """Store, overwriting; the blob becomes visible only when its last chunk is in. Evicts the least recently used
        blobs while the budget is exceeded.

        Raises:
            RequestError: `data` alone exceeds the budget (413-like 400 is the caller's to phrase; here a 503).
        """
        raise NotImplementedError

    async def get(self, kind: str, key: str) -> tuple[bytes, bytes] | None:
        """(data, meta), renewing TTL and recency; None if it is absent or any chunk is."""
        raise NotImplementedError

    async def meta(self, kind: str, key: str) -> bytes | None:
        """Only the meta, renewing TTL and recency; None if absent."""
        raise NotImplementedError

    async def delete(self, kind: str, keys: list[str]) -> None:
        raise NotImplementedError
