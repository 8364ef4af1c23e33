import asyncio

import pytest
from machine import PATIENCE_S
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from shared.bus.keys import Keys
from shared.bus.leases import UNREADABLE, Difference, Fence, Lease, Replica, Shards, live
from shared.bus.lua import read_script
from shared.errors import ConfigError, FencedError
from shared.message_fields import GENERATION

HOUR_MS = 3_600_000


async def expire(redis: Redis, keys: Keys, name: str) -> None:
    """What time does to a lease that is not renewed."""
    await redis.delete(keys.replica("postproc", name))


async def replica(redis: Redis, keys: Keys, name: str, count: int = 4) -> Shards:
    await Lease(redis, keys, "postproc", name, HOUR_MS).renew("ready")
    return Shards(redis, keys, "postproc", name, count)


async def test_lease_says_who_and_how(redis: Redis, keys: Keys) -> None:
    lease = Lease(redis, keys, "engine", "a", HOUR_MS, "1.0", 1.5e9)
    await lease.renew("starting")
    await lease.renew("ready", {"running": 3.0})
    await Lease(redis, keys, "gateway", "g", HOUR_MS).renew("ready")
    said = Replica("engine", "a", "ready", "1.0", {"running": 3.0}, 1.5e9, fields=GENERATION)
    assert await live(redis, keys, "engine") == [said]
    assert 0 < await redis.pttl(keys.replica("engine", "a")) <= HOUR_MS


async def test_expired_lease_is_dead_and_pruned(redis: Redis, keys: Keys) -> None:
    for name in ("a", "b"):
        await Lease(redis, keys, "postproc", name, HOUR_MS).renew("ready")
    await expire(redis, keys, "a")
    assert [each.name for each in await live(redis, keys, "postproc")] == ["b"]
    assert await redis.smembers(keys.replicas("postproc")) == {b"b"}


async def test_lease_really_expires(redis: Redis, keys: Keys) -> None:
    await Lease(redis, keys, "postproc", "a", 1).renew("ready")
    async with asyncio.timeout(PATIENCE_S):
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


async def test_a_replica_with_an_unreadable_lease_is_alive_and_not_ready(redis: Redis, keys: Keys) -> None:
    await Lease(redis, keys, "engine", "b", HOUR_MS).renew("ready")
    await redis.sadd(keys.replicas("engine"), "a")
    await redis.set(keys.replica("engine", "a"), b"\xff")
    assert [(each.name, each.state) for each in await live(redis, keys, "engine")] == [
        ("a", UNREADABLE),
        ("b", "ready"),
    ]


async def test_a_replica_alone_owns_all(redis: Redis, keys: Keys) -> None:
    a = await replica(redis, keys, "a")
    assert await a.balance(["a"]) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert await a.balance(["a"], [0, 1, 2, 3]) == {0: 1, 1: 1, 2: 1, 3: 1}


async def test_what_is_ours_and_not_held_starts_under_a_higher_epoch(redis: Redis, keys: Keys) -> None:
    a = await replica(redis, keys, "a")
    await a.balance([])
    assert await a.balance([], [1, 3]) == {0: 2, 1: 1, 2: 2, 3: 1}


async def test_dead_owner_is_replaced_under_a_higher_epoch(redis: Redis, keys: Keys) -> None:
    a, b = await replica(redis, keys, "a"), await replica(redis, keys, "b")
    await a.balance(["b"])
    await b.balance(["a"])
    await expire(redis, keys, "a")
    assert await b.balance([], [2, 3]) == {0: 2, 1: 2, 2: 1, 3: 1}
    await Lease(redis, keys, "postproc", "a", HOUR_MS).renew("ready")  # it was only asleep
    assert await a.balance([], [0, 1]) == {}


async def test_released_shards_go_to_others_and_keep_their_epoch(redis: Redis, keys: Keys) -> None:
    a, b = await replica(redis, keys, "a"), await replica(redis, keys, "b")
    await a.balance([])
    await b.release([0])  # not its own
    assert await b.balance([]) == {}
    await a.release([1, 3])
    assert await b.balance([]) == {1: 2, 3: 2}
    assert await a.balance(["b"], [0, 2]) == {0: 1, 2: 1}


@pytest.mark.parametrize("count", [1, 3, 4, 5, 16])
async def test_shares_are_fair_whoever_comes_and_goes(redis: Redis, keys: Keys, count: int) -> None:
    """Everybody looks in turn until nothing moves. No shard moves but those that someone gains who had too few."""
    owned: dict[str, dict[int, int]] = {}
    shards: dict[str, Shards] = {}
    for who, comes in [("b", True), ("d", True), ("a", True), ("c", True), ("d", False), ("a", False), ("e", True)]:
        if comes:
            shards[who], owned[who] = await replica(redis, keys, who, count), {}
        else:
            await expire(redis, keys, who)
            del shards[who], owned[who]
        moves = 0
        for _ in range(3):
            for name, mine in shards.items():
                now = await mine.balance(shards, owned[name])
                moves += len(now.keys() - owned[name].keys())
                owned[name] = now
        assert sorted(shard for each in owned.values() for shard in each) == list(range(count))
        sizes = sorted(map(len, owned.values()))
        assert sizes[-1] - sizes[0] <= 1
        assert moves <= -(-count // (len(sizes) if comes else len(sizes) + 1))


async def test_racing_replicas_never_share_a_shard(redis: Redis, keys: Keys) -> None:
    everyone = [await replica(redis, keys, str(i), count=16) for i in range(4)]
    owned = await asyncio.gather(*(shards.balance("0123") for shards in everyone))
    assert sorted(shard for each in owned for shard in each) == list(range(16))


async def test_a_fence_lets_only_the_owner_write(redis: Redis, keys: Keys) -> None:
    a, b = await replica(redis, keys, "a"), await replica(redis, keys, "b")
    write = redis.register_script(read_script("fence") + "redis.call('SET', KEYS[2], ARGV[at])")
    await a.balance(["b"])
    await b.balance(["a"])
    mine = Fence(keys, "a", {0: 1, 1: 1})
    await mine.run(write, ["k"], ["mine"])
    assert await redis.get("k") == b"mine"
    for epochs in ({0: 1, 2: 1}, {0: 2}, {0: 0}, {9: 1}):
        with pytest.raises(FencedError, match="shard"):
            await Fence(keys, "a", epochs).run(write, ["k"], ["not mine"])
    await expire(redis, keys, "a")
    await mine.run(write, ["k"], ["nobody has taken it"])
    await b.balance([], [2, 3])
    with pytest.raises(FencedError):
        await mine.run(write, ["k"], ["late"])
    assert await redis.get("k") == b"nobody has taken it"
    await Fence(keys, "", {}).run(write, ["k"], ["nothing to own"])
    assert await redis.get("k") == b"nothing to own"


async def test_an_error_that_is_no_fence_stays_what_it_is(redis: Redis, keys: Keys) -> None:
    await redis.set("k", "text")
    pop = redis.register_script(read_script("fence") + "redis.call('LPOP', KEYS[2])")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await Fence(keys, "", {}).run(pop, ["k"], [])


async def test_after_a_redis_that_forgot_everything_shards_begin_anew(redis: Redis, keys: Keys) -> None:
    a = await replica(redis, keys, "a")
    await a.check_count()
    await a.balance([])
    await redis.flushall()
    lease = Lease(redis, keys, "postproc", "a", HOUR_MS)
    await lease.renew("ready")
    assert [each.name for each in await live(redis, keys, "postproc")] == ["a"]
    assert await a.balance([], [0, 1, 2, 3]) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert await redis.hget(keys.shards(), "count") == b"4"


async def test_the_number_of_shards_changes_when_nothing_is_under_way(redis: Redis, keys: Keys) -> None:
    await Shards(redis, keys, "postproc", "a", 4).check_count()
    await Shards(redis, keys, "postproc", "b", 4).check_count()
    entry = await redis.xadd(keys.stream("generate"), {"v": "1"})
    with pytest.raises(ConfigError, match=r"MILLRACE_SHARDS is 2.* 1 requests .* over 4"):
        await Shards(redis, keys, "postproc", "c", 2).check_count()
    await redis.xdel(keys.stream("generate"), entry)
    await Shards(redis, keys, "postproc", "c", 2).check_count()
    assert await redis.hget(keys.shards(), "count") == b"2"


def fleet_lease(redis: Redis, keys: Keys, service: str, name: str, **facts: str) -> Lease:
    return Lease(redis, keys, service, name, HOUR_MS, facts=facts)


async def test_who_differs_from_the_living_does_not_join(redis: Redis, keys: Keys) -> None:
    first = fleet_lease(redis, keys, "gateway", "g", shards="4", tokenizer="a")
    assert await first.join("starting") == []
    assert await fleet_lease(redis, keys, "engine", "e", shards="4", quantization="wint4").join("starting") == []
    other = fleet_lease(redis, keys, "engine", "x", shards="2", quantization="wint4")
    assert set(await other.join("starting")) == {
        Difference(f"{who}", "shards", "4") for who in ("gateway:g", "engine:e")
    }
    assert [each.name for each in await live(redis, keys, "engine")] == ["e"]
    await first.renew("ready")
    await fleet_lease(redis, keys, "engine", "e").release()
    assert await other.join("starting") == [Difference("gateway:g", "shards", "4")]
    await first.release()
    assert await other.join("starting") == [], "of the old fleet nobody lives"
    assert await first.join("starting") == [Difference("engine:x", "shards", "2")]


async def test_a_former_process_of_ours_does_not_count(redis: Redis, keys: Keys) -> None:
    assert await fleet_lease(redis, keys, "engine", "e", shards="4").join("ready") == []
    await redis.sadd(keys.replicas("engine"), "gone")
    await redis.set(keys.replica("engine", "gone"), b"\xff")
    assert await fleet_lease(redis, keys, "engine", "e", shards="2").join("starting") == []


async def test_a_lease_of_another_type_is_none(redis: Redis, keys: Keys) -> None:
    await replica(redis, keys, "a")
    await replica(redis, keys, "b")
    await redis.delete(keys.replica("postproc", "b"))
    await redis.sadd(keys.replica("postproc", "b"), "oops")
    assert [each.name for each in await live(redis, keys, "postproc")] == ["a"]
    assert await fleet_lease(redis, keys, "engine", "e", shards="4").join("ready") == []
