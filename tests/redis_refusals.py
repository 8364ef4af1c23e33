"""Ways to make a real Redis refuse, each undone by itself: what an operator, a full disk or a failover would do."""

import asyncio
import resource
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

from machine import PATIENCE_S
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from cli.redis_server import RedisServer
from shared.redis_errors import code_of

Refusal = Callable[[RedisServer, Redis], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def full_disk(server: RedisServer, redis: Redis) -> AsyncIterator[None]:
    """Let its append-only file grow no further (MISCONF)."""
    assert server.persistence
    assert server.pid is not None
    size = max(file.stat().st_size for file in server.directory.glob("appendonlydir/*.incr.aof"))
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        with suppress(ResponseError):  # from the first write on that it cannot append, which it puts off while it syncs
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    await redis.set("fills the disk", 1, px=1)
                    await asyncio.sleep(0.01)
        yield
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def configured(name: str, value: str, before: str) -> Refusal:
    """Set a directive."""

    @asynccontextmanager
    async def refusal(_: RedisServer, redis: Redis) -> AsyncIterator[None]:
        await redis.config_set(name, value)
        try:
            yield
        finally:
            await redis.config_set(name, before)

    return refusal


@asynccontextmanager
async def demoted(_: RedisServer, redis: Redis) -> AsyncIterator[None]:
    """Make it a replica of a server that does not answer (READONLY, UNBLOCKED)."""
    await redis.replicaof("127.0.0.1", 1)
    try:
        yield
    finally:
        await redis.replicaof("NO", "ONE")


@asynccontextmanager
async def orphaned(server: RedisServer, redis: Redis) -> AsyncIterator[None]:
    """The same, and it answers nothing any more (MASTERDOWN)."""
    await redis.config_set("replica-serve-stale-data", "no")
    try:
        async with demoted(server, redis):
            yield
    finally:
        await redis.config_set("replica-serve-stale-data", "yes")


@asynccontextmanager
async def busy(_: RedisServer, redis: Redis) -> AsyncIterator[None]:
    """Run a script that does not end, until it is killed (BUSY)."""
    await redis.config_set("busy-reply-threshold", 1)
    looping = asyncio.ensure_future(redis.eval("while true do end", 0))
    while not await _is_busy(redis):
        pass
    try:
        yield
    finally:
        await redis.script_kill()
        await asyncio.wait([looping])
        await _calm_down(redis)
        assert isinstance(looping.exception(), ResponseError)


async def _calm_down(redis: Redis) -> None:
    """Give scripts as long as before. Until then a script of anybody's that takes a millisecond refuses that, too."""
    while True:
        try:
            await redis.config_set("busy-reply-threshold", 5000)
            return
        except ResponseError as error:
            if code_of(error) != "BUSY":
                raise
            await asyncio.sleep(0.01)


async def _is_busy(redis: Redis) -> bool:
    try:
        await redis.ping()
    except ResponseError as error:
        return code_of(error) == "BUSY"
    return False


REFUSALS: Mapping[str, Refusal] = {
    "MISCONF": full_disk,
    "OOM": configured("maxmemory", "1", "0"),
    "NOREPLICAS": configured("min-replicas-to-write", "1", "0"),
    "READONLY": demoted,
    "MASTERDOWN": orphaned,
    "BUSY": busy,
}
