"""Of several replicas, one makes the embeddings of a key, and its death or failure hands the turn on."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from machine import PATIENCE_S
from redis.asyncio import Redis

from services.mm_encoder.turns import Turns
from shared.keys import Keys
from shared.leases import Lease
from shared.messages import Landed
from shared.streams import LogReader

LONG_S = 60.0


class Store:
    """What has been stored, and how often it was made."""

    def __init__(self) -> None:
        self.there = False
        self.made = 0
        self.making = asyncio.Event()
        self.go_on = asyncio.Event()

    async def stored(self) -> bool:
        return self.there

    async def make(self) -> None:
        self.made += 1
        self.making.set()
        await self.go_on.wait()
        self.there = True


class Replicas:
    def __init__(self, redis: Redis, keys: Keys) -> None:
        self.redis = redis
        self.keys = keys

    async def start(self, name: str, look_s: float = LONG_S) -> Turns:
        await Lease(self.redis, self.keys, "mm_encoder", name, 600_000).renew("ready")
        return Turns(self.redis, self.keys, "mm_encoder", name, look_s)

    async def die(self, name: str) -> None:
        await Lease(self.redis, self.keys, "mm_encoder", name, 1).release()

    @asynccontextmanager
    async def told(self, *turns: Turns) -> AsyncIterator[None]:
        """They hear what control says, as the service lets them."""
        control = LogReader(self.redis, {self.keys.control(): "$"})
        await control.read(1, 0)

        async def listen() -> None:
            while True:
                for _, _, message in await control.read(10, 1000):
                    assert isinstance(message, Landed)
                    for each in turns:
                        each.landed(message)

        task = asyncio.create_task(listen())
        yield
        task.cancel()


@pytest.fixture
def replicas(redis: Redis, keys: Keys) -> Replicas:
    return Replicas(redis, keys)


async def waiting(turns: Turns) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not turns._waiting:  # noqa: ASYNC110 - the event is in the other task
            await asyncio.sleep(0.001)


async def test_the_others_wait_and_are_woken(replicas: Replicas) -> None:
    a, b = await replicas.start("a"), await replicas.start("b")
    store = Store()
    async with replicas.told(a, b), asyncio.timeout(PATIENCE_S):
        first = asyncio.create_task(a.make("k", store.stored, store.make))
        await store.making.wait()
        second = asyncio.create_task(b.make("k", store.stored, store.make))
        await waiting(b)
        store.go_on.set()
        await asyncio.gather(first, second)
    assert store.made == 1
    assert not await replicas.redis.exists(replicas.keys.flights())


async def test_other_keys_do_not_wait(replicas: Replicas) -> None:
    a, b = await replicas.start("a"), await replicas.start("b")
    slow, fast = Store(), Store()
    fast.go_on.set()
    first = asyncio.create_task(a.make("slow", slow.stored, slow.make))
    await slow.making.wait()
    await b.make("fast", fast.stored, fast.make)
    assert await replicas.redis.hgetall(replicas.keys.flights()) == {b"slow": b"a"}
    slow.go_on.set()
    await first


async def test_what_is_stored_is_not_made(replicas: Replicas) -> None:
    a, store = await replicas.start("a"), Store()
    store.there = True
    await a.make("k", store.stored, store.make)
    assert store.made == 0


async def test_a_death_hands_the_turn_on(replicas: Replicas) -> None:
    a, b = await replicas.start("a"), await replicas.start("b", look_s=0.01)
    dead, store = Store(), Store()
    store.go_on.set()
    first = asyncio.create_task(a.make("k", dead.stored, dead.make))
    await dead.making.wait()
    second = asyncio.create_task(b.make("k", store.stored, store.make))
    await waiting(b)
    assert not second.done()
    await replicas.die("a")
    await asyncio.wait_for(second, PATIENCE_S)
    assert (dead.made, store.made) == (1, 1)
    # It was only paused, and wakes: the turn it ends is not the one that another may have by then.
    await replicas.redis.hset(replicas.keys.flights(), "k", "c")
    dead.go_on.set()
    await first
    assert await replicas.redis.hgetall(replicas.keys.flights()) == {b"k": b"c"}


async def test_a_failure_hands_the_turn_on(replicas: Replicas) -> None:
    a, b = await replicas.start("a"), await replicas.start("b")
    store, started, fail = Store(), asyncio.Event(), asyncio.Event()
    store.go_on.set()

    async def broken() -> None:
        started.set()
        await fail.wait()
        raise ZeroDivisionError

    async with replicas.told(a, b), asyncio.timeout(PATIENCE_S):
        first = asyncio.create_task(a.make("k", store.stored, broken))
        await started.wait()
        second = asyncio.create_task(b.make("k", store.stored, store.make))
        await waiting(b)
        fail.set()
        with pytest.raises(ZeroDivisionError):
            await first
        await second
    assert store.made == 1


async def test_a_replica_started_again_holds_nobody_up(replicas: Replicas) -> None:
    await replicas.redis.hset(replicas.keys.flights(), mapping={"k": "a", "theirs": "b"})
    again, other = await replicas.start("a"), await replicas.start("b")
    await again.begin()
    assert await replicas.redis.hgetall(replicas.keys.flights()) == {b"theirs": b"b"}
    store = Store()
    store.go_on.set()
    await other.make("k", store.stored, store.make)
    assert store.made == 1


async def test_sweeping_leaves_the_living_alone(replicas: Replicas) -> None:
    a = await replicas.start("a")
    await replicas.redis.hset(replicas.keys.flights(), mapping={"theirs": "dead", "ours": "a"})
    await a.sweep()
    assert await replicas.redis.hgetall(replicas.keys.flights()) == {b"ours": b"a"}
