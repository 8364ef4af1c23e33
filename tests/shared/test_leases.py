import asyncio

import pytest
from redis.asyncio import Redis

from shared.errors import ConfigError, ProtocolError
from shared.keys import Keys
from shared.leases import Lease, Replica, Shards, live

HOUR_MS = 3_600_000


async def expire(redis: Redis, keys: Keys, name: str) -> None:
    """What time does to a lease that is not renewed."""
    await redis.delete(keys.replica("postproc", name))


async def replica(redis: Redis, keys: Keys, name: str, count: int = 4) -> Shards:
    await Lease(redis, keys, "postproc", name, HOUR_MS).renew("ready")
    return Shards(redis, keys, "postproc", name, count)


async def test_lease_says_who_and_how(redis: Redis, keys: Keys) -> None:
    lease = Lease(redis, keys, "engine", "a", HOUR_MS, "1.0")
    await lease.renew("starting")
    await lease.renew("ready", {"running": 3.0})
    await Lease(redis, keys, "gateway", "g", HOUR_MS).renew("ready")
    assert await live(redis, keys, "engine") == [Replica("engine", "a", "ready", "1.0", {"running": 3.0})]
    assert 0 < await redis.pttl(keys.replica("engine", "a")) <= HOUR_MS


async def test_expired_lease_is_dead_and_pruned(redis: Redis, keys: Keys) -> None:
    for name in ("a", "b"):
        await Lease(redis, keys, "postproc", name, HOUR_MS).renew("ready")
    await expire(redis, keys, "a")
    assert [each.name for each in await live(redis, keys, "postproc")] == ["b"]
    assert await redis.smembers(keys.replicas("postproc")) == {b"b"}


async def test_lease_really_expires(redis: Redis, keys: Keys) -> None:
    await Lease(redis, keys, "postproc", "a", 1).renew("ready")
    async with asyncio.timeout(5):
        while await live(redis, keys, "postproc"):
            pass


async def test_late_renewal_is_found_again(redis: Redis, keys: Keys) -> None:
    lease = Lease(redis, keys, "postproc", "a", HOUR_MS)
    await lease.renew("ready")
    await expire(redis, keys, "a")
    assert await live(redis, keys, "postproc") == []
    await lease.renew("ready")
    assert len(await live(redis, keys, "postproc")) == 1


async def test_release_is_at_once_and_complete(redis: Redis, keys: Keys) -> None:
    lease = Lease(redis, keys, "postproc", "a", HOUR_MS)
    await lease.renew("ready")
    await lease.release()
    assert await live(redis, keys, "postproc") == []
    assert await redis.keys() == []


async def test_unreadable_lease_is_told(redis: Redis, keys: Keys) -> None:
    await redis.sadd(keys.replicas("engine"), "a")
    await redis.set(keys.replica("engine", "a"), "{}")
    with pytest.raises(ProtocolError, match="engine"):
        await live(redis, keys, "engine")


async def test_shards_are_taken_up_to_the_limit(redis: Redis, keys: Keys) -> None:
    a, b = await replica(redis, keys, "a"), await replica(redis, keys, "b")
    assert await a.acquire(3) == {0: 1, 1: 1, 2: 1}
    assert await b.acquire(4) == {3: 1}
    assert await a.acquire(0) == {0: 1, 1: 1, 2: 1}  # what is owned stays owned


async def test_dead_owner_is_replaced_under_a_higher_epoch(redis: Redis, keys: Keys) -> None:
    a, b = await replica(redis, keys, "a"), await replica(redis, keys, "b")
    await a.acquire(2)
    await b.acquire(2)
    await expire(redis, keys, "a")
    assert await b.acquire(4) == {0: 2, 1: 2, 2: 1, 3: 1}
    await Lease(redis, keys, "postproc", "a", HOUR_MS).renew("ready")  # it was only asleep
    assert await a.acquire(4) == {}


async def test_released_shards_go_to_others_and_keep_their_epoch(redis: Redis, keys: Keys) -> None:
    a, b = await replica(redis, keys, "a"), await replica(redis, keys, "b")
    await a.acquire(4)
    await b.release([0])  # not its own
    assert await b.acquire(4) == {}
    await a.release([1, 3])
    assert await b.acquire(4) == {1: 2, 3: 2}
    assert await a.acquire(4) == {0: 1, 2: 1}


async def test_racing_replicas_never_share_a_shard(redis: Redis, keys: Keys) -> None:
    everyone = [await replica(redis, keys, str(i), count=16) for i in range(4)]
    owned = await asyncio.gather(*(shards.acquire(4) for shards in everyone))
    assert sorted(shard for each in owned for shard in each) == list(range(16))


async def test_shard_count_is_one_for_the_deployment(redis: Redis, keys: Keys) -> None:
    await Shards(redis, keys, "postproc", "a", 4).check_count()
    await Shards(redis, keys, "postproc", "b", 4).check_count()
    with pytest.raises(ConfigError, match=r"MILLRACE_SHARDS is 2.* has 4"):
        await Shards(redis, keys, "postproc", "c", 2).check_count()
