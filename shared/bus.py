"""The only place that builds Redis clients."""

from redis.asyncio import Redis


def connect(url: str) -> Redis:
    """An asyncio client that returns bytes, with hiredis, reconnecting with backoff.

    Raises:
        ConfigError: the URL is malformed.
    """
    raise NotImplementedError
