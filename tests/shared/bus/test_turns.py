"""The order of service among tenants, in a real Redis: replicas that read one entry after another, and die."""

import random
from collections import Counter
from collections.abc import Iterable

import pytest
from redis.asyncio import Redis

from shared.bus.keys import ENCODE, GENERATE, Keys
from shared.bus.ownership import Ended
from shared.bus.pipeline_view import read
from shared.bus.records import Records
from shared.bus.work_stream import TURNS_PAGE, Delivery, WorkStream
from shared.messages import BATCH_PRIORITY, Encode, Generate, Media, Output, Request, Sampling, Share

A, B = Share("a"), Share("b")
HIGH, LOW = Share("vip", priority=0), Share("batch", priority=2)


def work(request_id: str, share: Share | None, tokens: int = 100, most: int = 100) -> Generate:
    request = Request(
        id=request_id,
        gateway="g",
        shard=0,
        created=0.0,
        sampling=Sampling(seed=1),
        output=Output(thinking=False),
        share=share,
    )
    return Generate(request, prompt=bytes(4 * tokens), max_tokens=most)


class Line:
    """A work stream with engines at its end."""

    def __init__(self, redis: Redis, keys: Keys, stream: str = GENERATE, group: str = "engine") -> None:
        self.redis = redis
        self.keys = keys
        self.key = keys.stream(stream)
        self.records = Records(redis, keys)
        self._stream = stream
        self._group = group

    async def start(self, name: str) -> WorkStream:
        await self.redis.set(self.keys.replica(self._group, name), "{}")
        stream = WorkStream(self.redis, self.keys, self._stream, self._group, name, max_deliveries=3)
        await stream.join()
        return stream

    async def die(self, name: str) -> None:
        await self.redis.delete(self.keys.replica(self._group, name))

    async def send(self, *requests: Generate | Encode) -> None:
        for request in requests:
            await self.records.submit(self._stream, request)

    async def flood(self, share: Share | None, count: int, prefix: str = "", **cost: int) -> None:
        name = prefix or (share.name if share else "none")
        await self.send(*(work(f"{name}{n}", share, **cost) for n in range(count)))

    async def length(self) -> int:
        return int(await self.redis.xlen(self.key))


def ids(deliveries: Iterable[Delivery]) -> list[str]:
    return [delivery.message.request.id for delivery in deliveries]


async def serve(stream: WorkStream, count: int, tokens: int | None = 100) -> list[str]:
    """Read and end so many entries, one at a time."""
    served = []
    for _ in range(count):
        [delivery] = await stream.read_new(1, 0)
        served += ids([delivery])
        await stream.finish([Ended(delivery.entry_id, delivery.message.request.id, tokens)])
    return served


@pytest.fixture
def line(redis: Redis, keys: Keys) -> Line:
    return Line(redis, keys)


async def test_without_tenants_order_is_that_of_arrival_and_nothing_is_kept(redis: Redis, line: Line) -> None:
    engine = await line.start("e")
    await line.flood(None, 5)
    assert await serve(engine, 5, None) == [f"none{n}" for n in range(5)]
    assert not engine.takes_turns
    assert await redis.keys("*turn*") == []


async def test_one_request_passes_a_flood_of_a_thousand(line: Line) -> None:
    engine = await line.start("e")
    await line.flood(A, 1000)
    await serve(engine, 3)
    await line.send(work("light", B))
    assert await line.length() == 998
    assert await serve(engine, 2) == ["light", "a3"]
    assert await line.length() == 996


async def test_within_a_tenant_first_come_first_served(line: Line) -> None:
    engine = await line.start("e")
    await line.flood(A, 3 * TURNS_PAGE)
    await line.flood(B, 20)
    served = await serve(engine, 3 * TURNS_PAGE + 20)
    for name, count in (("a", 3 * TURNS_PAGE), ("b", 20)):
        assert [each for each in served if each.startswith(name)] == [f"{name}{n}" for n in range(count)]


async def test_weights_are_shares_of_tokens(line: Line) -> None:
    engine = await line.start("e")
    await line.flood(Share("a", weight=1), 150)
    await line.flood(Share("b", weight=10), 150)
    served = Counter(each[0] for each in await serve(engine, 110))
    assert 9 <= served["a"] <= 12


async def test_cost_is_tokens_and_not_requests(line: Line) -> None:
    engine = await line.start("e")
    await line.flood(A, 50, tokens=3000, most=1)
    await line.flood(B, 150, tokens=1000, most=1)
    served = Counter(each[0] for each in await serve(engine, 80, 1))
    assert 18 <= served["a"] <= 22


async def test_answers_longer_than_expected_are_charged(line: Line) -> None:
    engine = await line.start("e")
    await line.flood(A, 100, most=10_000)
    await line.flood(B, 100, most=10_000)
    served: Counter[str] = Counter()
    for _ in range(60):
        [delivery] = await engine.read_new(1, 0)
        name = delivery.message.request.id[0]
        served[name] += 1
        await engine.finish([Ended(delivery.entry_id, delivery.message.request.id, 900 if name == "a" else 250)])
    assert 2.2 < served["b"] / served["a"] < 4.2  # 1900 tokens each against 600


async def test_a_request_that_never_began_costs_nothing(redis: Redis, line: Line) -> None:
    engine = await line.start("e")
    await line.flood(A, 40)
    await line.flood(B, 40)
    await serve(engine, 2)
    for _ in range(10):
        [delivery] = await engine.read_new(1, 0)
        while delivery.message.request.id.startswith("b"):
            await engine.finish([Ended(delivery.entry_id, delivery.message.request.id, 100)])
            [delivery] = await engine.read_new(1, 0)
        await engine.ownership.drop(delivery.entry_id, delivery.message.request.id)
    served = Counter(each[0] for each in await serve(engine, 20))
    assert abs(served["a"] - served["b"]) <= 4


async def test_classes_come_one_after_the_other(line: Line) -> None:
    engine = await line.start("e")
    await line.flood(LOW, 3)
    await line.flood(A, 3)
    await line.flood(HIGH, 3)
    served = await serve(engine, 9)
    # The first was read before anybody knew of turns.
    assert served == ["batch0", "vip0", "vip1", "vip2", "a0", "a1", "a2", "batch1", "batch2"]


async def test_batches_come_last_also_where_nobody_else_is_a_tenant(line: Line) -> None:
    engine = await line.start("e")
    await line.flood(Share("", priority=BATCH_PRIORITY), 3, "line")
    await line.flood(LOW, 2)
    await line.flood(None, 2)
    served = await serve(engine, 7)
    # The first was read before anybody knew of turns.
    assert served == ["line0", "none0", "none1", "batch0", "batch1", "line1", "line2"]


async def test_who_was_idle_has_saved_nothing(line: Line) -> None:
    engine = await line.start("e")
    for n in range(30):  # a is served alone, always at once
        await line.send(work(f"early{n}", A))
        await serve(engine, 1)
    await line.flood(A, 20)
    await line.flood(B, 20)
    served = Counter(each[0] for each in await serve(engine, 20))
    assert abs(served["a"] - served["b"]) <= 3


async def test_requests_without_a_tenant_have_a_turn_among_those_with_one(line: Line) -> None:
    engine = await line.start("e")
    await line.send(work("first", A))
    await serve(engine, 1)
    await line.flood(None, 100)
    await line.send(work("light", A))
    assert "light" in await serve(engine, 3)


async def test_a_stream_that_filled_while_there_was_no_engine(line: Line) -> None:
    await line.flood(A, 200)
    await line.send(work("light", B))
    assert await line.length() == 201
    engine = await line.start("e")
    assert "light" in await serve(engine, 3)
    assert len(await serve(engine, 198)) == 198


async def test_two_engines_share_one_order(line: Line) -> None:
    one, two = await line.start("one"), await line.start("two")
    await line.flood(A, 50)
    await serve(one, 2)
    await two.claim_abandoned(0)
    await serve(two, 2)
    await line.send(work("light", B))
    assert await serve(two, 1) == ["light"]
    assert await serve(one, 1) == ["a4"]


async def test_an_engine_without_news_hears_of_what_waits(line: Line) -> None:
    one, two = await line.start("one"), await line.start("two")
    await line.flood(A, 10)
    await serve(one, 2)  # the second read puts all others among those that wait
    assert (await two.claim_abandoned(0)).left == 0
    assert two.takes_turns
    assert await serve(two, 1) == ["a2"]


async def test_what_a_dead_engine_had_is_claimed_and_what_waits_is_not(redis: Redis, line: Line) -> None:
    one, two = await line.start("one"), await line.start("two")
    await line.flood(A, 10)
    await serve(one, 1)
    held = await one.read_new(2, 0)
    await line.die("one")
    found = await two.claim_abandoned(9)
    assert ids(found.claimed) == ids(held) == ["a1", "a2"]
    assert [delivery.attempts for delivery in found.claimed] == [2, 2]
    [waiting] = [each for each in await redis.xinfo_consumers(line.key, "engine") if each["name"] == b"waiting"]
    assert waiting["pending"] == 7
    rest = await two.read_new(9, 0)
    assert ids(rest) == [f"a{n}" for n in range(3, 10)]
    assert {delivery.attempts for delivery in rest} == {1}


async def test_a_turn_whose_reply_was_lost_is_found_again(line: Line) -> None:
    engine = await line.start("e")
    await line.flood(A, 5)
    await serve(engine, 1)
    await engine._run_turns(2)  # what its reply delivered, nobody has
    assert ids(await engine.read_new(1, 0)) == ["a3"]
    found = await engine.claim_abandoned(9)
    assert ids(found.claimed) == ["a1", "a2"]


async def test_nobody_that_waits_counts_as_lost(line: Line) -> None:
    engine = await line.start("e")
    await line.flood(A, 5)
    await serve(engine, 2)
    names = [f"a{n}" for n in range(5)]
    assert await line.records.lost(names) == set()


async def test_the_view_of_the_pipeline_counts_who_waits(redis: Redis, keys: Keys, line: Line) -> None:
    engine = await line.start("e")
    await line.flood(A, 10)
    await serve(engine, 1)
    await engine.read_new(2, 0)
    queue = (await read(redis, keys)).stage("engine").queue
    assert queue is not None
    assert (queue.length, queue.pending, queue.waiting) == (9, 2, 7)
    assert [consumer.name for consumer in queue.consumers] == ["e"]
    assert queue.waiting_s is not None
    assert queue.oldest_s is not None
    assert queue.waiting_s <= queue.oldest_s


@pytest.mark.parametrize("damage", ["DEL", "SET", "SADD"])
async def test_an_index_that_is_gone_or_damaged_loses_nothing(redis: Redis, line: Line, damage: str) -> None:
    engine = await line.start("e")
    await line.flood(A, 10)
    await line.flood(B, 10)
    await serve(engine, 2)
    for key in await redis.keys("*turn*"):
        await redis.delete(key)
        if damage != "DEL":
            await redis.execute_command(damage, key, "x")
    await line.flood(HIGH, 3)
    assert len(set(await serve(engine, 21))) == 21
    assert await line.length() == 0


async def test_entries_of_a_group_that_was_deleted_are_read_again(redis: Redis, line: Line) -> None:
    engine = await line.start("e")
    await line.flood(A, 6)
    await serve(engine, 2)
    await redis.xgroup_destroy(line.key, "engine")
    assert await serve(engine, 4) == ["a2", "a3", "a4", "a5"]


async def test_places_that_nobody_could_have_written(redis: Redis, line: Line) -> None:
    engine = await line.start("e")
    await line.flood(A, 2)
    await serve(engine, 1)
    for k in ("", "9 1 1 1 x", "1 0 1 1 x", "1 nan 1 1 x", "1 1 1 1 x y", "x\n" * 99, "1 1e999 1 1 x"):
        fields = {**{b"v": b"1", b"m": b"garbage"}, b"k": k}
        await redis.xadd(line.key, fields)
    await line.send(work("last", B))
    served = [ids(await engine.read_new(1, 0)) for _ in range(12)]
    assert {name for names in served for name in names} == {"a1", "last"}
    assert await line.length() == 2


async def test_media_take_turns_as_well(redis: Redis, keys: Keys) -> None:
    line = Line(redis, keys, ENCODE, "mm_encoder")
    encoder = await line.start("m")

    def look(request_id: str, share: Share, kind: str = "image") -> Encode:
        media = Media(kind, "messages[0]", url="http://x")  # type: ignore[arg-type]
        return Encode(work(request_id, share).request, (b"", b""), (media,))

    await line.send(*(look(f"a{n}", A) for n in range(50)))
    [first] = await encoder.read_new(1, 0)
    await line.send(look("light", B))
    assert ids(await encoder.read_new(1, 0)) == ["light"]
    # What is handed on has its place, in the other stream, with the cost of its prompt.
    assert isinstance(first.message, Encode)
    await encoder.ownership.forward(first.entry_id, first.message, work("a0", A, tokens=7, most=9))
    [(_, fields)] = await redis.xrange(keys.stream(GENERATE))
    assert fields[b"k"] == b"1 1 7 9 a"


async def test_what_is_sent_back_keeps_its_tenant_and_is_not_charged(redis: Redis, keys: Keys) -> None:
    line, engines = Line(redis, keys, ENCODE, "mm_encoder"), Line(redis, keys)
    encoder, engine = await line.start("m"), await engines.start("e")
    await line.send(Encode(work("r", A).request, (b"", b""), (Media("image", "p", url="http://x"),)))
    [delivery] = await encoder.read_new(1, 0)
    assert isinstance(delivery.message, Encode)
    await encoder.ownership.forward(delivery.entry_id, delivery.message, work("r", A, tokens=500, most=100))
    [taken] = await engine.read_new(1, 0)
    turns = f"{engines.key}:turns"
    assert float(await redis.hget(turns, "counter:1 a") or 0) == 700
    assert await engine.ownership.send_back(taken.entry_id, "r") == "done"
    assert float(await redis.hget(turns, "counter:1 a") or 0) == 0
    [(_, fields)] = await redis.xrange(line.key)
    assert fields[b"k"] == b"1 1 1 0 a"


async def test_under_kills_and_lost_replies_each_is_served_once_and_counted(redis: Redis, line: Line) -> None:
    """Engines come and die at random, with entries in hand, with replies on their way, and with the index gone."""
    drawn = random.Random(7)
    names = iter(range(1000))
    engines = {name: await line.start(name) for name in (f"e{next(names)}", f"e{next(names)}")}
    held: dict[str, list[Delivery]] = {name: [] for name in engines}
    sent, ended = 0, []
    shares = (A, B, HIGH, LOW, None)
    for _ in range(400):
        name = drawn.choice(list(engines))
        engine = engines[name]
        step = drawn.random()
        if step < 0.35:
            await line.send(work(str(sent), drawn.choice(shares), drawn.randrange(1000), drawn.randrange(1000)))
            sent += 1
        elif step < 0.6:
            held[name] += await engine.read_new(drawn.randrange(1, 4), 0)
        elif step < 0.8 and held[name]:
            done = held[name].pop(drawn.randrange(len(held[name])))
            await engine.finish([Ended(done.entry_id, done.message.request.id, drawn.randrange(999))])
            ended.append(done.message.request.id)
        elif step < 0.9:
            found = await engine.claim_abandoned(9)
            held[name] += [*found.claimed, *found.poisoned]
        elif step < 0.93:
            await engine._run_turns(2)  # its reply is lost
        elif step < 0.97:
            await line.die(name)
            del engines[name], held[name]
            fresh = f"e{next(names)}"
            engines[fresh], held[fresh] = await line.start(fresh), []
        elif keys := await redis.keys("*turn*"):
            await redis.delete(drawn.choice(keys))
        assert await line.length() == sent - len(ended)
        assert await line.records.lost([str(n) for n in range(sent)]) == set()
    name, engine = next(iter(engines.items()))
    for other in set(engines) - {name}:
        await line.die(other)
    while await line.length():
        found = await engine.claim_abandoned(99)
        for done in (*held[name], *found.claimed, *found.poisoned, *(await engine.read_new(9, 0))):
            await engine.finish([Ended(done.entry_id, done.message.request.id, 1)])
            ended.append(done.message.request.id)
        held[name] = []
    assert sorted(ended, key=int) == [str(n) for n in range(sent)]
    consumers = await redis.xinfo_consumers(line.key, "engine")
    assert {each["pending"] for each in consumers} == {0}
