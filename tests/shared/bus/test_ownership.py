"""Each step with an entry is done by whoever has it, at once or not at all."""

import msgspec
import pytest
from redis.asyncio import Redis

from shared.bus.keys import ENCODE, GENERATE, Keys
from shared.bus.ownership import MOST_RETURNS, EntryOwnership, Poison
from shared.bus.records import Records
from shared.bus.streams import send
from shared.bus.work_stream import WorkStream
from shared.errors import Failure, unreadable
from shared.message_codec import from_entry
from shared.messages import (
    Encode,
    Failed,
    Finish,
    Generate,
    MediaSpan,
    Output,
    Request,
    Sampling,
    TokenRun,
    Tokens,
    pack_ids,
)

REQUEST = Request("r", "gw", 1, 0.0, Sampling(seed=1), Output(thinking=False))
SOURCE = Encode(REQUEST, (pack_ids([1]),), ())
SPAN = MediaSpan("image", "cat", 1, 4, (1, 4, 4))
READY = Generate(REQUEST, pack_ids([1, 9, 9, 9, 9]), 5, (SPAN,))
NO = Failed("r", Failure(400, "no"))
LAST = Tokens((), (TokenRun("r", 1, 0, (), None, Finish("cancelled")),))
POISON = Poison(4, "delivered 4 times")


class Case:
    """A request whose entry is ours, until the test gives it to another."""

    def __init__(self, redis: Redis, keys: Keys, stream: str) -> None:
        self.redis = redis
        self.keys = keys
        self.stream = keys.stream(stream)
        self.service = {ENCODE: "mm_encoder", GENERATE: "engine"}[stream]
        self.records = Records(redis, keys)
        self.ours = EntryOwnership(redis, keys, stream, self.service, "me")
        self.entry = ""

    async def begin(self, stream: str, message: Encode | Generate) -> "Case":
        work = WorkStream(self.redis, self.keys, stream, self.service, "me", 3)
        await work.join()
        await self.records.submit(stream, message)
        [delivery] = await work.read_new(1, 0)
        self.entry = delivery.entry_id
        return self

    async def lose(self) -> None:
        await self.redis.xclaim(self.stream, self.service, "other", 0, [self.entry])

    async def messages(self, key: str) -> list[object]:
        return [from_entry(fields) for _, fields in await self.redis.xrange(key)]

    async def ended(self) -> bool:
        pending = (await self.redis.xpending(self.stream, self.service))["pending"]
        assert pending == await self.redis.xlen(self.stream), "acked and deleted together"
        return pending == 0

    async def state(self) -> dict[bytes, object]:
        """All there is in Redis."""
        return {key: await self.redis.dump(key) for key in await self.redis.keys()}


@pytest.fixture
async def encoding(redis: Redis, keys: Keys) -> Case:
    await send(redis, keys.deltas("gw"), NO)
    await redis.xtrim(keys.deltas("gw"), maxlen=0)
    return await Case(redis, keys, ENCODE).begin(ENCODE, SOURCE)


@pytest.fixture
async def generating(redis: Redis, keys: Keys) -> Case:
    return await Case(redis, keys, GENERATE).begin(GENERATE, READY)


async def test_nothing_is_done_with_what_another_has(encoding: Case) -> None:
    await encoding.lose()
    before = await encoding.state()
    ours, entry = encoding.ours, encoding.entry
    assert await ours.owned_entries([entry]) == set()
    await ours.ack([entry])
    assert await ours.raise_epochs([(entry, "r")]) == {}
    await ours.record_progress(entry, "r", 5)
    assert await ours.forward(entry, SOURCE, READY) == "lost"
    assert await ours.forward_ahead(entry, SOURCE, READY) == "lost"
    assert not await ours.end_ahead(entry, "r", NO.failure)
    assert await ours.send_back(entry, "r") == "lost"
    assert not await ours.record_failure(entry, "r", NO.failure)
    assert not await ours.drop(entry, "r")
    assert not await ours.end_with_failed(entry, NO)
    assert not await ours.end_with_tokens(entry, REQUEST, LAST)
    assert not await ours.quarantine(entry, POISON)
    assert await encoding.state() == before


async def test_a_redis_that_forgot_all_is_no_error(encoding: Case) -> None:
    await encoding.redis.flushall()
    await encoding.ours.ack([encoding.entry])
    assert await encoding.ours.raise_epochs([(encoding.entry, "r")]) == {}
    assert await encoding.ours.forward(encoding.entry, SOURCE, READY) == "lost"
    assert await encoding.redis.keys() == []


async def test_a_prompt_goes_ahead_once_and_keeps_its_entry(encoding: Case) -> None:
    ours, entry, generate = encoding.ours, encoding.entry, encoding.keys.stream(GENERATE)
    assert await ours.embeds_state("r") == "gone"
    for _ in range(2):
        assert await ours.forward_ahead(entry, SOURCE, READY) == "done"
    assert await ours.embeds_state("r") == "coming"
    changed = msgspec.structs.replace(READY, spans=(msgspec.structs.replace(SPAN, key="dog"),))
    assert await ours.forward_ahead(entry, SOURCE, changed) == "changed"
    assert await ours.forward(entry, SOURCE, changed) == "changed"
    assert not await encoding.ended()
    assert await ours.forward(entry, SOURCE, READY) == "done"
    assert await encoding.ended()
    assert await encoding.messages(generate) == [READY]
    assert await ours.embeds_state("r") == "gone"
    assert await encoding.records.lost(["r"]) == set()


@pytest.mark.parametrize("gone", ["record", "cancelled", "type"])
async def test_nothing_goes_ahead_for_nobody(encoding: Case, gone: str) -> None:
    if gone == "cancelled":
        await encoding.records.cancel(["r"])
    else:
        await encoding.records.delete(["r"])
    if gone == "type":
        await encoding.redis.set(encoding.keys.request("r"), "oops")
    assert await encoding.ours.forward_ahead(encoding.entry, SOURCE, READY) == "unwanted"
    assert not await encoding.ours.end_ahead(encoding.entry, "r", None), "it is still to be ended"
    assert not await encoding.ended()
    assert await encoding.ours.embeds_state("r") == "gone"


async def test_a_failure_is_left_to_the_engine_that_has_the_prompt(encoding: Case) -> None:
    ours, entry = encoding.ours, encoding.entry
    assert not await ours.end_ahead(entry, "r", NO.failure), "no prompt went ahead"
    await ours.forward_ahead(entry, SOURCE, READY)
    assert await ours.end_ahead(entry, "r", NO.failure, POISON)
    assert await encoding.ended()
    assert await ours.embeds_state("r") == NO.failure
    assert await encoding.redis.xlen(encoding.keys.quarantine(ENCODE)) == 1
    assert await encoding.messages(encoding.keys.deltas("gw")) == []
    await encoding.redis.hset(encoding.keys.request("r"), "failed", b"?")
    assert await ours.embeds_state("r") == unreadable("the failure")


async def test_a_prompt_that_was_sent_back_goes_ahead_no_more(redis: Redis, keys: Keys, encoding: Case) -> None:
    ours, entry = encoding.ours, encoding.entry
    await ours.forward_ahead(entry, SOURCE, READY)
    work = WorkStream(redis, keys, GENERATE, "engine", "e", 3)
    await work.join()
    [taken] = await work.read_new(1, 0)
    assert await work.ownership.send_back(taken.entry_id, "r") == "done"
    assert await ours.forward_ahead(entry, SOURCE, READY) == "done", "its first entry has nothing more to do"
    assert await ours.end_ahead(entry, "r", NO.failure)
    assert not await redis.hexists(keys.request("r"), "failed"), "another entry has the request now"
    [again] = await WorkStream(redis, keys, ENCODE, "mm_encoder", "me", 3).read_new(1, 0)
    assert await ours.forward_ahead(again.entry_id, SOURCE, READY) == "later"
    assert await ours.forward(again.entry_id, SOURCE, READY) == "done"
    assert await encoding.messages(keys.stream(GENERATE)) == [READY]


async def test_owned_and_finish(generating: Case) -> None:
    assert await generating.ours.owned_entries([generating.entry, "0-1"]) == {generating.entry}
    await generating.ours.ack([])
    await generating.ours.ack([generating.entry, "0-1"])
    assert await generating.ended()


async def test_each_claim_raises_the_epoch(generating: Case) -> None:
    entry = (generating.entry, "r")
    assert await generating.ours.raise_epochs([entry]) == {"r": 1}
    assert await generating.ours.raise_epochs([entry]) == {"r": 2}
    assert (await generating.records.get(["r"]))["r"].epoch == 2
    await generating.records.delete(["r"])
    assert await generating.ours.raise_epochs([entry]) == {"r": None}
    assert await generating.ours.raise_epochs([]) == {}
    assert await generating.records.get(["r"]) == {}, "a claim brings nothing back to life"


async def test_progress_counts_deliveries_anew(generating: Case) -> None:
    async def attempts() -> int:
        [pending] = await generating.redis.xpending_range(generating.stream, "engine", "-", "+", 1)
        return int(pending["times_delivered"])

    async def delivered(times: int) -> None:
        entry = [generating.entry]
        await generating.redis.xclaim(generating.stream, "engine", "me", 0, entry, retrycount=times, justid=True)

    for tokens, expected in ((4, 1), (4, 3), (3, 3), (9, 1)):
        await delivered(3)
        await generating.ours.record_progress(generating.entry, "r", tokens)
        assert await attempts() == expected
    assert not await generating.ended()


async def test_hand_on_and_back_and_on_again(encoding: Case, keys: Keys) -> None:
    assert await encoding.ours.forward(encoding.entry, SOURCE, READY) == "done"
    assert await encoding.ended()
    assert await encoding.messages(keys.stream(GENERATE)) == [READY]
    engine = WorkStream(encoding.redis, keys, GENERATE, "engine", "e", 3)
    encoder = WorkStream(encoding.redis, keys, ENCODE, "mm_encoder", "me", 3)
    back = EntryOwnership(encoding.redis, keys, GENERATE, "engine", "e")
    await engine.join()
    for _ in range(MOST_RETURNS):
        [delivery] = await engine.read_new(1, 0)
        assert await back.send_back(delivery.entry_id, "r") == "done"
        assert await back.send_back(delivery.entry_id, "r") == "lost", "a lost reply is asked for again"
        assert await engine.backlog() == 0
        [again] = await encoder.read_new(1, 0)
        assert again.message == SOURCE
        assert await encoding.ours.forward(again.entry_id, SOURCE, READY) == "done"
    [delivery] = await engine.read_new(1, 0)
    assert await back.send_back(delivery.entry_id, "r") == "never"
    assert await engine.backlog() == 1


async def test_what_came_without_media_is_not_sent_back(generating: Case, keys: Keys) -> None:
    assert await generating.ours.send_back(generating.entry, "r") == "never"
    assert not await generating.ended()
    assert not await generating.redis.exists(keys.stream(ENCODE))


@pytest.mark.parametrize("change", ["prompt", "media"])
async def test_a_prompt_that_changed_is_not_handed_on_again(encoding: Case, keys: Keys, change: str) -> None:
    assert await encoding.ours.forward(encoding.entry, SOURCE, READY) == "done"
    await encoding.begin(ENCODE, SOURCE)  # as if it had been sent back
    await encoding.redis.hset(keys.request("r"), "epoch", 1)
    other = MediaSpan("image", "dog", 1, 4, (1, 4, 4))
    changed = {
        "prompt": Generate(REQUEST, pack_ids([2, 9, 9, 9, 9]), 5, (SPAN,)),
        "media": Generate(REQUEST, READY.prompt, 5, (other,)),
    }[change]
    assert await encoding.ours.forward(encoding.entry, SOURCE, changed) == "changed"
    assert not await encoding.ended()
    assert await encoding.messages(keys.stream(GENERATE)) == [READY]


@pytest.mark.parametrize("end", ["cancel", "delete"])
async def test_what_nobody_waits_for_is_not_handed_on(encoding: Case, keys: Keys, end: str) -> None:
    await getattr(encoding.records, end)(["r"])
    assert await encoding.ours.forward(encoding.entry, SOURCE, READY) == "unwanted"
    assert not await encoding.ended()
    assert await encoding.ours.drop(encoding.entry, "r")
    assert await encoding.ended()
    assert await encoding.records.get(["r"]) == {}
    assert not await encoding.redis.exists(keys.stream(GENERATE))


@pytest.mark.parametrize("joined", [False, True])
async def test_refuse(encoding: Case, keys: Keys, joined: bool) -> None:
    if joined:
        await encoding.records.attach(["r"], "gw-2")
        await send(encoding.redis, keys.deltas("gw-2"), NO)
    assert await encoding.ours.end_with_failed(encoding.entry, NO, REQUEST.gateway)
    assert not await encoding.ours.end_with_failed(encoding.entry, NO, REQUEST.gateway)
    assert await encoding.ended()
    assert await encoding.messages(keys.deltas("gw")) == [NO]
    assert await encoding.messages(keys.deltas("gw-2")) == ([NO, NO] if joined else [])
    assert await encoding.records.get(["r"]) == {}


async def test_refusing_tells_no_gateway_that_is_gone(encoding: Case, keys: Keys) -> None:
    await encoding.redis.delete(keys.deltas("gw"))
    assert await encoding.ours.end_with_failed(encoding.entry, NO, REQUEST.gateway)
    assert not await encoding.redis.exists(keys.deltas("gw"))


async def test_a_way_to_end_is_remembered(encoding: Case, keys: Keys) -> None:
    assert await encoding.ours.recorded_failure("r") is None
    assert await encoding.ours.record_failure(encoding.entry, "r", None)
    assert await encoding.ours.recorded_failure("r") is None
    assert await encoding.ours.record_failure(encoding.entry, "r", NO.failure)
    assert await encoding.ours.recorded_failure("r") == NO.failure
    await encoding.records.delete(["r"])
    assert await encoding.ours.record_failure(encoding.entry, "r", NO.failure)
    assert not await encoding.redis.exists(keys.request("r"))


@pytest.mark.parametrize("step", ["refuse", "end", "quarantine"])
async def test_poison_is_kept_for_people_in_the_same_step(encoding: Case, keys: Keys, step: str) -> None:
    if step == "refuse":
        assert await encoding.ours.end_with_failed(encoding.entry, NO, REQUEST.gateway, POISON)
        assert await encoding.messages(keys.deltas("gw")) == [NO]
    elif step == "end":
        assert await encoding.ours.end_with_tokens(encoding.entry, REQUEST, LAST, POISON)
        assert await encoding.messages(keys.tokens(1)) == [LAST]
        assert "r" in await encoding.records.get(["r"]), "postproc ends it"
        assert await encoding.records.lost(["r"]) == set()
    else:
        assert await encoding.ours.quarantine(encoding.entry, POISON)
    assert await encoding.ended()
    [(_, kept)] = await encoding.redis.xrange(keys.quarantine(ENCODE))
    assert (kept[b"reason"], kept[b"attempts"]) == (b"delivered 4 times", b"4")
    assert from_entry(kept) == SOURCE


async def test_an_epoch_that_is_no_number_is_replaced_by_a_higher_one(generating: Case, keys: Keys) -> None:
    await generating.redis.hset(keys.request("r"), "epoch", "garbage")
    first = (await generating.ours.raise_epochs([(generating.entry, "r")]))["r"]
    second = (await generating.ours.raise_epochs([(generating.entry, "r")]))["r"]
    assert first is not None
    assert first > 1_000_000
    assert second == first + 1


async def test_damaged_counters_stop_no_replica(generating: Case, keys: Keys) -> None:
    fields = {"reached": "?", "returned": "?", "encode": b"?"}
    await generating.redis.hset(keys.request("r"), mapping=fields)  # type: ignore[arg-type]
    await generating.ours.record_progress(generating.entry, "r", 3)
    assert await generating.redis.hget(keys.request("r"), "reached") == b"3"
    assert await generating.ours.send_back(generating.entry, "r") == "never"


async def test_a_damaged_failure_is_a_failure(encoding: Case, keys: Keys) -> None:
    await encoding.redis.hset(keys.request("r"), "failed", b"\xc1")
    assert await encoding.ours.recorded_failure("r") == unreadable("the failure")
