"""Consumer with a handler that only records its calls, on a real Redis."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
from machine import PATIENCE_S
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from shared.bus import retry
from shared.bus.consumer import Consumer
from shared.bus.keys import GENERATE, Keys
from shared.bus.ownership import Poison
from shared.bus.streams import send
from shared.bus.work_stream import Delivery, WorkStream
from shared.messages import Cancel, Encoded, Generate, Message, Output, Request, Sampling

CLAIM_EVERY_S = 0.01
SERVICE = "engine"


@dataclass(eq=False)
class Job:
    """State of one delivered request."""

    entry_id: str
    request_id: str
    attempts: int
    poison: Poison | None
    replaces: str | None = None


@dataclass
class Recorder:
    """Handler that starts nothing."""

    started: list[Job] = field(default_factory=list)
    abandoned: list[Job] = field(default_factory=list)
    cancelled: list[Job] = field(default_factory=list)
    control: list[Message] = field(default_factory=list)
    called: asyncio.Event = field(default_factory=asyncio.Event)

    def new_request(self, delivery: Delivery, poison: Poison | None) -> Job:
        return Job(delivery.entry_id, delivery.message.request.id, delivery.attempts, poison)

    def start(self, requests: Sequence[Job]) -> None:
        self.started += requests
        self.called.set()

    def abandon(self, request: Job) -> None:
        self.abandoned.append(request)
        self.called.set()

    def cancel(self, request: Job) -> None:
        self.cancelled.append(request)
        self.called.set()

    def on_control(self, message: Message) -> None:
        self.control.append(message)
        self.called.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return when a call has made `condition` true."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self.called.clear()
                await self.called.wait()


class Replica:
    """A consumer of `generate` under a name, with a lease that only the test ends."""

    def __init__(self, redis: Redis, keys: Keys, name: str = "me", capacity: int = 4) -> None:
        self.redis = redis
        self.keys = keys
        self.name = name
        self.key = keys.stream(GENERATE)
        self.handler = Recorder()
        self.stream = WorkStream(redis, keys, GENERATE, SERVICE, name, max_deliveries=2)
        self.consumer: Consumer[Job] = Consumer(
            redis, keys, SERVICE, self.stream, self.handler, capacity, CLAIM_EVERY_S
        )

    async def join(self) -> "Replica":
        await self.redis.set(self.keys.replica(SERVICE, self.name), '{"state": "ready"}')
        await self.consumer.join()
        return self

    async def die(self) -> None:
        await self.redis.delete(self.keys.replica(SERVICE, self.name))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run all loops."""
        self.consumer.start_reading()
        loops = (self.consumer.read_entries, self.consumer.claim_entries, self.consumer.listen_control)
        tasks = [asyncio.create_task(loop()) for loop in loops]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(error, asyncio.CancelledError) for error in ended), ended

    async def submit(self, *request_ids: str) -> list[str]:
        return [await send(self.redis, self.key, generate(request_id)) for request_id in request_ids]

    async def started(self, *request_ids: str) -> list[Job]:
        """Return the requests that were started, once there are as many as named; they must be these, in order."""
        await self.handler.until(lambda: len(self.handler.started) >= len(request_ids))
        assert [job.request_id for job in self.handler.started] == list(request_ids)
        return self.handler.started

    async def pending(self) -> int:
        return int((await self.redis.xpending(self.key, SERVICE))["pending"])


def generate(request_id: str) -> Generate:
    request = Request(request_id, "gw", 0, 0.0, Sampling(seed=1), Output(thinking=False))
    return Generate(request, prompt=b"", max_tokens=1)


@pytest.fixture
async def replica(redis: Redis, keys: Keys) -> Replica:
    return await Replica(redis, keys).join()


async def looked(replica: Replica, times: int = 2) -> None:
    """Return when `times` claims have begun after now and the first of them has ended."""
    asked, seen = replica.stream.claim_abandoned, asyncio.Semaphore(0)

    async def count(room: int) -> object:
        seen.release()
        return await asked(room)

    replica.stream.claim_abandoned = count  # type: ignore[assignment,method-assign]
    async with asyncio.timeout(PATIENCE_S):
        for _ in range(times):
            await seen.acquire()
    replica.stream.claim_abandoned = asked  # type: ignore[method-assign]


# ------------------------------------------------------------------------------------------------------ new entries


async def test_a_request_is_in_flight_until_it_is_released(replica: Replica) -> None:
    [entry_id] = await replica.submit("r")
    async with replica.running():
        [job] = await replica.started("r")
        assert (job.entry_id, job.attempts, job.poison, job.replaces) == (entry_id, 1, None, None)
        assert replica.consumer.holds(job)
        assert replica.consumer.get("r") is job
        assert list(replica.consumer.requests) == [job]
        await replica.consumer.ack([job.entry_id])
        assert replica.consumer.release([job]) == [job]
        assert replica.consumer.release([job]) == []
        await replica.consumer.wait_until_empty()
    assert await replica.redis.xlen(replica.key) == 0
    assert replica.handler.abandoned == []


async def test_no_more_are_read_than_there_are_slots(redis: Redis, keys: Keys) -> None:
    replica = await Replica(redis, keys, capacity=2).join()
    await replica.submit("a", "b", "c", "d")
    async with replica.running():
        a, b = (await replica.started("a", "b"))[:2]
        assert replica.consumer.free_slots == 0
        await looked(replica)
        assert len(replica.handler.started) == 2
        replica.consumer.release([b])
        await replica.started("a", "b", "c")
        replica.consumer.release([a])
        await replica.started("a", "b", "c", "d")


async def test_nothing_is_read_before_start_or_after_stop(replica: Replica) -> None:
    await replica.submit("r")
    reading = asyncio.create_task(replica.consumer.read_entries())
    claiming = asyncio.create_task(replica.consumer.claim_entries())
    await looked(replica)
    assert replica.handler.started == []
    replica.consumer.start_reading()
    [job] = await replica.started("r")
    reading.cancel()
    with suppress(asyncio.CancelledError):
        await reading
    replica.consumer.stop_reading()
    assert replica.consumer.free_slots == 0
    replica.consumer.release([job])
    await looked(replica)  # a claim that began before the stop has ended
    await replica.redis.xgroup_createconsumer(replica.key, SERVICE, "dead")
    await replica.submit("left by the dead")
    await replica.redis.xreadgroup(SERVICE, "dead", {replica.key: ">"})
    await looked(replica)
    assert len(replica.handler.started) == 1
    claiming.cancel()
    with suppress(asyncio.CancelledError):
        await claiming


async def test_a_read_that_failed_does_not_read_more_than_there_are_slots(
    redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """COUNT 0 means no limit to Redis, so a read must keep its slots while it is retried."""
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.0)
    replica = await Replica(redis, keys, capacity=2).join()
    dead = await Replica(redis, keys, "dead").join()
    await dead.submit("x", "y", "z")
    assert len(await dead.stream.read_new(2, 0)) == 2
    read, failed, retried = replica.stream.read_new, asyncio.Event(), asyncio.Event()

    async def fail_first(count: int, block_ms: int) -> list[Delivery]:
        if not failed.is_set():
            failed.set()
            await dead.die()
            await looked(replica)
            raise RedisConnectionError
        deliveries = await read(count, block_ms)
        retried.set()
        return deliveries

    monkeypatch.setattr(replica.stream, "read_new", fail_first)
    async with replica.running():
        async with asyncio.timeout(PATIENCE_S):
            await retried.wait()
        await looked(replica)
        assert len(replica.consumer) == 2
        replica.consumer.release(list(replica.consumer.requests))
        await replica.handler.until(lambda: len(replica.handler.started) == 3)
    assert sorted(job.request_id for job in replica.handler.started) == ["x", "y", "z"]


async def test_entries_whose_read_was_cancelled_are_found_again(replica: Replica) -> None:
    await replica.submit("r")
    await replica.redis.xreadgroup(SERVICE, "me", {replica.key: ">"})  # a reply that never arrived
    async with replica.running():
        [job] = await replica.started("r")
        assert job.attempts == 2


# --------------------------------------------------------------------------------------------- entries of the dead


async def test_entries_of_the_dead_come_before_new_ones(redis: Redis, keys: Keys) -> None:
    dead = await Replica(redis, keys, "dead").join()
    await dead.submit("old 1", "old 2")
    await dead.stream.read_new(2, 0)
    replica = await Replica(redis, keys, capacity=1).join()
    await replica.submit("first")
    async with replica.running():
        [first] = await replica.started("first")
        await dead.die()
        await looked(replica)
        await replica.submit("new")
        replica.consumer.release([first])
        one = (await replica.started("first", "old 1"))[1]
        assert (one.attempts, one.poison) == (2, None)
        replica.consumer.release([one])
        two = (await replica.started("first", "old 1", "old 2"))[2]
        replica.consumer.release([two])
        await replica.started("first", "old 1", "old 2", "new")


async def test_a_lost_reply_is_not_starved_by_new_entries(redis: Redis, keys: Keys) -> None:
    """With all slots taken by new entries, an entry that no reply delivered must still get the next free slot."""
    replica = await Replica(redis, keys, capacity=1).join()
    await replica.submit("busy", "lost", "new")
    async with replica.running():
        [busy] = await replica.started("busy")
        await redis.xreadgroup(SERVICE, "me", {replica.key: ">"}, count=1)
        await looked(replica, 3)
        replica.consumer.release([busy])
        lost = (await replica.started("busy", "lost"))[1]
        replica.consumer.release([lost])
        await replica.started("busy", "lost", "new")


async def test_what_was_delivered_too_often_comes_with_poison(redis: Redis, keys: Keys) -> None:
    replica = await Replica(redis, keys).join()
    await replica.submit("r")
    await redis.xreadgroup(SERVICE, "dead", {replica.key: ">"})
    [(entry_id, _)] = await redis.xrange(replica.key)
    await redis.xclaim(replica.key, SERVICE, "dead", 0, [entry_id])
    async with replica.running():
        [job] = await replica.started("r")
        assert job.poison == Poison(3, "delivered 3 times")
        assert await replica.pending() == 1


# --------------------------------------------------------------------------------- lost and replaced deliveries


async def test_a_request_whose_entry_another_claimed_is_abandoned(replica: Replica) -> None:
    [entry_id] = await replica.submit("r")
    async with replica.running():
        [job] = await replica.started("r")
        await replica.redis.set(replica.keys.replica(SERVICE, "other"), '{"state": "ready"}')
        await replica.redis.xclaim(replica.key, SERVICE, "other", 0, [entry_id])
        await replica.handler.until(lambda: replica.handler.abandoned == [job])
        assert not replica.consumer.holds(job)
        await replica.consumer.ack([entry_id])  # changes nothing
        assert await replica.pending() == 1


async def test_an_entry_that_comes_again_after_it_was_lost_is_a_new_delivery(replica: Replica) -> None:
    """Between two looks another replica may claim an entry and die."""
    [entry_id] = await replica.submit("r")
    async with replica.running():
        [first] = await replica.started("r")
        await replica.redis.xclaim(replica.key, SERVICE, "dead", 0, [entry_id])
        _, again = await replica.started("r", "r")
        assert replica.handler.abandoned == [first]
        assert replica.consumer.get("r") is again
        assert again.entry_id == entry_id
        again.replaces = again.entry_id
        await replica.consumer.ack_replaced([again])
        assert await replica.pending() == 1, "its own entry stays"


async def test_the_newest_entry_of_a_request_replaces_the_older(replica: Replica) -> None:
    older, newer = await replica.submit("r", "r")
    async with replica.running():
        first, second = await replica.started("r", "r")
        assert (first.entry_id, second.entry_id, second.replaces) == (older, newer, older)
        assert replica.handler.abandoned == [first]
        assert replica.consumer.get("r") is second
        assert replica.consumer.release([first]) == [], "a former delivery releases nothing"
        replica.consumer.abandon(first)
        assert replica.consumer.holds(second)
        await replica.consumer.ack_replaced([first, second])
        assert [entry_id.decode() for entry_id, _ in await replica.redis.xrange(replica.key)] == [newer]


async def test_a_request_is_abandoned_once(replica: Replica) -> None:
    await replica.submit("r")
    async with replica.running():
        [job] = await replica.started("r")
        replica.consumer.abandon(job)
        replica.consumer.abandon(job)
        assert replica.handler.abandoned == [job]
        await replica.consumer.wait_until_empty()


async def test_an_entry_whose_end_is_under_way_is_not_lost(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis may have removed an entry for us before we have its reply: that is no other replica's doing."""
    await replica.submit("r")
    ownership = replica.stream.ownership
    script, removed, answer = ownership._ack, asyncio.Event(), asyncio.Event()

    async def slow(keys: list[str], args: list[str]) -> object:
        reply = await script(keys=keys, args=args)
        removed.set()
        await answer.wait()
        return reply

    monkeypatch.setattr(ownership, "_ack", slow)
    async with replica.running():
        [job] = await replica.started("r")
        acking = asyncio.create_task(replica.consumer.ack([job.entry_id]))
        async with asyncio.timeout(PATIENCE_S):
            await removed.wait()
        await looked(replica)
        assert replica.consumer.holds(job)
        answer.set()
        await acking
        await looked(replica)
        assert replica.consumer.holds(job)
        assert replica.handler.abandoned == []


async def test_entries_beside_an_unreadable_one_survive_an_outage(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.0)
    await replica.submit("r")
    await replica.redis.xadd(replica.key, {"v": "0", "m": ""})
    quarantine, calls = replica.stream.ownership.quarantine, 0

    async def fail_first(entry_id: str, poison: Poison) -> bool:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RedisConnectionError
        return await quarantine(entry_id, poison)

    monkeypatch.setattr(replica.stream.ownership, "quarantine", fail_first)
    async with replica.running():
        await replica.started("r")
    assert await replica.redis.xlen(replica.keys.quarantine(GENERATE)) == 1


# ------------------------------------------------------------------------------------------------------------ control


async def test_control_reaches_the_handler(replica: Replica) -> None:
    await replica.submit("r")
    async with replica.running():
        [job] = await replica.started("r")
        control = replica.keys.control()
        await send(replica.redis, control, Cancel(("unknown", "r")))
        await replica.redis.xadd(control, {"v": "0", "m": ""})  # of another version
        await send(replica.redis, control, Encoded("k"))
        await replica.handler.until(lambda: bool(replica.handler.control))
        assert replica.handler.cancelled == [job]
        assert replica.handler.control == [Encoded("k")]
        assert replica.consumer.holds(job), "ending a cancelled request is the handler's part"


async def test_leaving_gives_entries_back_without_an_attempt(replica: Replica, redis: Redis, keys: Keys) -> None:
    await replica.submit("r")
    async with replica.running():
        await replica.started("r")
    await replica.consumer.leave()
    await replica.die()
    heir = await Replica(redis, keys, "heir").join()
    async with heir.running():
        [job] = await heir.started("r")
        assert job.attempts == 1


async def test_an_empty_consumer_is_deleted_when_it_leaves(replica: Replica) -> None:
    await replica.consumer.leave()
    assert await replica.redis.xinfo_consumers(replica.key, SERVICE) == []
