"""Clients of a test's Redis: as the services have them, but for one thing."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from machine import PATIENCE_S
from redis.asyncio import Redis

from cli.redis_users import sign_in
from shared.bus import client as redis_client
from shared.bus.client import connect


def patient(url: str) -> Redis:
    """Return a client that takes nobody who stands still for dead: it would say all again."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(redis_client, "REPLY_S", PATIENCE_S)
        return connect(url)


@asynccontextmanager
async def signed_in(redis: Redis, service: str) -> AsyncIterator[Redis]:
    """Return another client of the same server, with the rights of a service."""
    client = patient(sign_in(f"unix://{redis.connection_pool.connection_kwargs['path']}", service))
    try:
        yield client
    finally:
        await client.aclose()
