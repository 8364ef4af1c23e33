import asyncio

import pytest
from machine import PATIENCE_MS, PATIENCE_S
from redis.asyncio import Redis

from shared import metrics
from shared.bus import work_stream
from shared.bus.keys import GENERATE, Keys
from shared.bus.leases import Lease
from shared.bus.streams import LogReader, send
from shared.bus.work_stream import ClaimResult, WorkStream
from shared.message_codec import to_entry
from shared.messages import Cancel, Encode, Failed, Generate, Output, Request, Sampling

NOTHING = ClaimResult([], [], set(), 0)


def work(request_id: str) -> Generate:
    request = Request(
        id=request_id, gateway="g", shard=0, created=0.0, sampling=Sampling(seed=1), output=Output(thinking=False)
    )
    return Generate(request, prompt=b"", max_tokens=1)


class Replicas:
    """Engines by name, with leases that the test gives and takes."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self.redis = redis
        self.keys = keys
        self.key = keys.stream(GENERATE)

    async def start(self, name: str, max_deliveries: int = 3) -> WorkStream:
        await self.redis.set(self.keys.replica("engine", name), "{}")
        stream = WorkStream(self.redis, self.keys, GENERATE, "engine", name, max_deliveries)
        await stream.join()
        return stream

    async def die(self, name: str) -> None:
        await self.redis.delete(self.keys.replica("engine", name))

    async def names(self) -> set[str]:
        return {str(consumer["name"], "ascii") for consumer in await self.redis.xinfo_consumers(self.key, "engine")}


@pytest.fixture
def replicas(redis: Redis, keys: Keys) -> Replicas:
    return Replicas(redis, keys)


@pytest.fixture
def long_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a read wait for as long as it is told to."""
    monkeypatch.setattr(work_stream, "MAX_BLOCK_MS", PATIENCE_MS)


async def test_take_in_order_and_finish(redis: Redis, replicas: Replicas) -> None:
    await send(redis, replicas.key, work("early"))  # before the group exists
    stream = await replicas.start("a")
    await send(redis, replicas.key, work("late"))
    first = await stream.read_new(1, 0)
    second = await stream.read_new(9, 0)
    assert [(d.message.request.id, d.attempts) for d in first + second] == [("early", 1), ("late", 1)]
    assert await stream.backlog() == 2
    await stream.ack([d.entry_id for d in first + second])
    await stream.ack([])
    assert await stream.backlog() == 0
    assert (await redis.xpending(replicas.key, "engine"))["pending"] == 0


async def test_take_without_waiting_returns_at_once(replicas: Replicas) -> None:
    stream = await replicas.start("a")
    async with asyncio.timeout(PATIENCE_S):
        assert await stream.read_new(1, 0) == []
        assert await stream.read_new(1, 1) == []


async def test_waiting_take_gets_what_comes(redis: Redis, replicas: Replicas, long_reads: None) -> None:
    stream = await replicas.start("a")
    taking = asyncio.create_task(stream.read_new(1, PATIENCE_MS))
    await send(redis, replicas.key, work("r"))
    assert [d.message for d in await taking] == [work("r")]


async def test_joining_again_keeps_what_is_there(redis: Redis, replicas: Replicas) -> None:
    stream = await replicas.start("a")
    await send(redis, replicas.key, work("r"))
    await stream.join()
    assert len(await stream.read_new(1, 0)) == 1


async def test_only_the_dead_are_robbed(redis: Redis, replicas: Replicas) -> None:
    a, b = await replicas.start("a"), await replicas.start("b")
    await send(redis, replicas.key, work("r"))
    [delivery] = await a.read_new(1, 0)
    assert await b.claim_abandoned(9) == NOTHING
    await replicas.die("a")
    assert await b.claim_abandoned(0) == ClaimResult([], [], set(), 1), "no room"
    [claimed], poisoned, lost, left = await b.claim_abandoned(9)
    assert (claimed.entry_id, claimed.message, claimed.attempts) == (delivery.entry_id, work("r"), 2)
    assert (poisoned, lost, left) == ([], set(), 0)
    assert await b.claim_abandoned(9) == NOTHING
    assert await replicas.names() == {"b"}


async def test_claims_at_most_count(redis: Redis, replicas: Replicas) -> None:
    a, b, c = [await replicas.start(name) for name in "abc"]
    for i in range(4):
        await send(redis, replicas.key, work(str(i)))
    await a.read_new(3, 0)
    await c.read_new(1, 0)
    await replicas.die("a")
    await replicas.die("c")
    looks = [await b.claim_abandoned(2) for _ in range(3)]
    assert [(len(look.claimed), look.left) for look in looks] == [(2, 2), (2, 0), (0, 0)]


async def test_of_two_claimants_one_wins(redis: Redis, replicas: Replicas) -> None:
    a, b, c = [await replicas.start(name) for name in "abc"]
    for i in range(50):
        await send(redis, replicas.key, work(str(i)))
    await a.read_new(50, 0)
    await replicas.die("a")
    rounds = await asyncio.gather(*(stream.claim_abandoned(7) for stream in [b, c] * 8))
    ids = [d.message.request.id for look in rounds for d in look.claimed]
    assert sorted(ids, key=int) == [str(i) for i in range(50)]
    assert all(d.attempts == 2 for look in rounds for d in look.claimed)


async def test_entry_delivered_too_often_is_poison_until_it_is_answered(
    redis: Redis, keys: Keys, replicas: Replicas
) -> None:
    seen = []
    await send(redis, replicas.key, work("poison"))
    for name in ("1", "2"):
        stream = await replicas.start(name, 2)
        seen += await stream.read_new(1, 0) + (await stream.claim_abandoned(1)).claimed
        await replicas.die(name)
    assert [d.attempts for d in seen] == [1, 2]
    third = await replicas.start("3", 2)
    ours, [poisoned], _, _ = await third.claim_abandoned(1)
    assert ours == []
    assert (poisoned.message, poisoned.attempts) == (work("poison"), 3)
    assert await redis.xlen(keys.quarantine(GENERATE)) == 0
    await replicas.die("3")  # before it answered
    fourth = await replicas.start("4", 2)
    _, [again], _, _ = await fourth.claim_abandoned(1)
    assert (again.entry_id, again.attempts) == (poisoned.entry_id, 4)


async def test_a_replica_that_is_starting_has_nothing(redis: Redis, keys: Keys, replicas: Replicas) -> None:
    """It was killed, and started again under its name before its lease ended."""
    a, b = await replicas.start("a"), await replicas.start("b")
    await send(redis, replicas.key, work("r"))
    await a.read_new(1, 0)
    await Lease(redis, keys, "engine", "a", 60_000).renew("starting")
    [claimed] = (await b.claim_abandoned(9)).claimed
    assert claimed.attempts == 2
    assert await replicas.names() == {"a", "b"}, "it has joined already"


async def test_a_replica_whose_lease_cannot_be_read_is_not_robbed(redis: Redis, keys: Keys, replicas: Replicas) -> None:
    a, b = await replicas.start("a"), await replicas.start("b")
    await send(redis, replicas.key, work("r"))
    await a.read_new(1, 0)
    await redis.set(keys.replica("engine", "a"), b"\xff")
    assert await b.claim_abandoned(9) == NOTHING


async def test_what_is_lost_is_told_once(redis: Redis, replicas: Replicas) -> None:
    a, b = await replicas.start("a"), await replicas.start("b")
    for name in ("taken", "kept", "deleted", "finished"):
        await send(redis, replicas.key, work(name))
    taken, kept, deleted, finished = (delivery.entry_id for delivery in await a.read_new(9, 0))
    await redis.xclaim(replicas.key, "engine", "b", 0, [taken])
    await redis.xdel(replicas.key, deleted)
    await redis.xack(replicas.key, "engine", deleted)
    await a.ack([finished])
    assert (await a.claim_abandoned(0)).lost == {taken, deleted}
    assert (await a.claim_abandoned(0)).lost == set()
    await redis.flushall()
    assert (await a.claim_abandoned(0)).lost == {kept}
    assert await b.claim_abandoned(9) == NOTHING


async def test_what_another_has_is_not_finished(redis: Redis, replicas: Replicas) -> None:
    a = await replicas.start("a")
    await replicas.start("b")
    for name in ("theirs", "ours"):
        await send(redis, replicas.key, work(name))
    theirs, ours = (delivery.entry_id for delivery in await a.read_new(9, 0))
    await redis.xclaim(replicas.key, "engine", "b", 0, [theirs])
    await a.ack([theirs, ours, "0-1"])
    assert [entry_id.decode() for entry_id, _ in await redis.xrange(replicas.key)] == [theirs]
    assert (await redis.xpending(replicas.key, "engine"))["pending"] == 1


async def test_handing_over_is_no_failure(redis: Redis, replicas: Replicas) -> None:
    await send(redis, replicas.key, work("r"))
    attempts = []
    for name in "abcd":
        stream = await replicas.start(name, 1)
        taken = await stream.read_new(1, 0) or (await stream.claim_abandoned(1)).claimed
        attempts += [delivery.attempts for delivery in taken]
        await stream.leave()
        await replicas.die(name)
    assert attempts == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "fields",
    [
        {b"v": b"2", b"m": b"?"},
        {b"v": b"1", b"m": b"\xc1"},
        {b"other": b"field"},
        to_entry(Cancel(("r",))),  # a message, but not work
        to_entry(Encode(work("r").request, (b"",), ())),  # work of another kind
    ],
)
@pytest.mark.parametrize("via", ["take", "claim"])
async def test_unreadable_entry_is_quarantined(
    redis: Redis, keys: Keys, replicas: Replicas, fields: dict[bytes, bytes], via: str
) -> None:
    stream = await replicas.start("a")
    await redis.xadd(replicas.key, fields)  # type: ignore[arg-type]
    await send(redis, replicas.key, work("good"))
    if via == "claim":
        await redis.xreadgroup("engine", "dead", {replicas.key: ">"})
        deliveries, poisoned, _, _ = await stream.claim_abandoned(9)
        assert poisoned == []
    else:
        deliveries = await stream.read_new(9, 0)
    assert [d.message for d in deliveries] == [work("good")]
    assert await stream.backlog() == 1
    [(_, kept)] = await redis.xrange(keys.quarantine(GENERATE))
    assert kept.items() >= fields.items()
    assert kept[b"reason"]
    assert await stream.claim_abandoned(9) == NOTHING


async def test_the_client_of_an_unreadable_entry_is_told_at_once(redis: Redis, keys: Keys, replicas: Replicas) -> None:
    stream = await replicas.start("a")
    await redis.hset(keys.request("r"), mapping={"gateways": "g1 g2", "request": "?"})
    await redis.set(keys.journal("r"), "1234")
    for gateway in ("g1", "g2"):
        await send(redis, keys.deltas(gateway), Cancel(()))
    await redis.xadd(replicas.key, {"v": "1", "m": b"\xc1", "r": "r"})
    assert await stream.read_new(9, 0) == []
    for gateway in ("g1", "g2"):
        reader = LogReader(redis, {keys.deltas(gateway): "0"})
        [_, (_, _, told)] = await reader.read(9, 0)
        assert isinstance(told, Failed)
        assert (told.request_id, told.failure.status, told.failure.code) == ("r", 500, "unreadable_state")
    assert await redis.exists(keys.request("r"), keys.journal("r")) == 0
    assert await redis.xlen(keys.quarantine(GENERATE)) == 1
    assert await stream.backlog() == 0


async def test_unreadable_poison_answers_nobody_but_is_kept(redis: Redis, keys: Keys, replicas: Replicas) -> None:
    stream = await replicas.start("a", max_deliveries=1)
    await redis.xadd(replicas.key, {"v": "2"})
    await redis.xreadgroup("engine", "dead", {replicas.key: ">"})
    assert await stream.claim_abandoned(9) == NOTHING
    assert await redis.xlen(keys.quarantine(GENERATE)) == 1
    assert await stream.backlog() == 0


async def test_a_redis_that_forgot_the_group_is_joined_again(redis: Redis, replicas: Replicas) -> None:
    stream = await replicas.start("a")
    await redis.flushall()
    assert await stream.claim_abandoned(1) == NOTHING
    await send(redis, replicas.key, work("r"))
    deliveries = await stream.read_new(1, 0) or await stream.read_new(1, 0)
    assert [d.message for d in deliveries] == [work("r")]


async def test_group_lost_while_waiting(redis: Redis, replicas: Replicas, long_reads: None) -> None:
    stream = await replicas.start("a")
    taking = asyncio.create_task(stream.read_new(1, PATIENCE_MS))
    while not (await redis.info("clients"))["blocked_clients"]:  # noqa: ASYNC110 - Redis has no event for it
        await asyncio.sleep(0)
    await redis.delete(replicas.key)
    assert await taking == []
    await send(redis, replicas.key, work("r"))
    assert len(await stream.read_new(1, 0)) == 1


async def test_entry_whose_delivery_was_lost_comes_back(redis: Redis, replicas: Replicas) -> None:
    stream = await replicas.start("a")
    for name in ("held", "lost"):
        await send(redis, replicas.key, work(name))
    await stream.read_new(1, 0)
    await redis.xreadgroup("engine", "a", {replicas.key: ">"})  # the reply never reaches the stream
    [again] = (await stream.claim_abandoned(9)).claimed
    assert (again.message.request.id, again.attempts) == ("lost", 2)
    assert await stream.claim_abandoned(9) == NOTHING


async def test_a_process_restarted_under_its_name_finds_its_work(redis: Redis, replicas: Replicas) -> None:
    await send(redis, replicas.key, work("r"))
    await (await replicas.start("a")).read_new(1, 0)
    [again] = (await (await replicas.start("a")).claim_abandoned(9)).claimed
    assert again.attempts == 2


async def test_what_a_waiting_take_is_given_is_not_claimed_as_lost(redis: Redis, replicas: Replicas) -> None:
    stream = await replicas.start("a")
    total, got = 300, []

    async def take() -> None:
        while len(got) < total:
            got.extend(await stream.read_new(3, 1000))

    async def claim() -> None:
        while len(got) < total:
            got.extend((await stream.claim_abandoned(9)).claimed)

    async def produce() -> None:
        for i in range(total):
            await send(redis, replicas.key, work(str(i)))

    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(take(), claim(), produce())
    assert [d.attempts for d in got] == [1] * total
    assert sorted(int(d.message.request.id) for d in got) == list(range(total))


async def test_lost_entry_is_found_while_a_take_waits(redis: Redis, replicas: Replicas, long_reads: None) -> None:
    stream = await replicas.start("a")
    await send(redis, replicas.key, work("lost"))
    await redis.xreadgroup("engine", "a", {replicas.key: ">"})
    taking = asyncio.create_task(stream.read_new(1, PATIENCE_MS))
    await asyncio.sleep(0)
    assert await stream.claim_abandoned(9) == NOTHING  # the waiting take might still bring it
    await send(redis, replicas.key, work("next"))
    await taking
    [again] = (await stream.claim_abandoned(9)).claimed
    assert again.message.request.id == "lost"


async def test_leave(redis: Redis, replicas: Replicas) -> None:
    a, b = await replicas.start("a"), await replicas.start("b")
    await send(redis, replicas.key, work("r"))
    await a.read_new(1, 0)
    await a.leave()
    await b.leave()
    assert await replicas.names() == {"a"}
    await redis.flushall()
    await a.leave()


def hops(stream: str) -> float:
    """Entries whose way through the stream was timed."""
    return metrics.observed(metrics._hops.labels(stream))[1]


async def test_an_entry_is_timed_when_it_is_first_taken(redis: Redis, replicas: Replicas) -> None:
    before = hops(GENERATE)
    dead, heir = [await replicas.start(name) for name in ("dead", "heir")]
    for name in ("x", "y", "z"):
        await send(redis, replicas.key, work(name))
    assert len(await dead.read_new(2, 0)) == 2
    assert hops(GENERATE) == before + 2
    await replicas.die("dead")
    assert len((await heir.claim_abandoned(9)).claimed) == 2
    assert hops(GENERATE) == before + 2
    assert len(await heir.read_new(9, 0)) == 1
    assert hops(GENERATE) == before + 3
