"""The engine service with prompts that are ahead of their embeddings, which a stand-in of mm_encoder makes."""

import asyncio
import json
from pathlib import Path

import msgspec
import pytest
from engine_bench import GatedRunner, Reader, Running, engine, eventually, submit
from engine_cases import CONFIG, PATCH, SumRunner, continuation, generate
from redis.asyncio import Redis

from shared.bus.blobs import Blobs
from shared.bus.keys import ENCODE, GENERATE, Keys
from shared.bus.leases import Lease
from shared.bus.ownership import EntryOwnership
from shared.bus.records import Records
from shared.bus.streams import send
from shared.bus.work_stream import WorkStream
from shared.errors import Failure
from shared.messages import Encode, Encoded, Finish, Media, MediaSpan
from shared.segments import Segments, is_marked, reader_path

ROWS = bytes(6 * CONFIG.hidden_size * 4)
META = {"grid": [1, 4, 6], "rows": 6, "hidden": CONFIG.hidden_size, "dtype": "float32"}
IMAGE = [PATCH + 1, *[PATCH] * 6, PATCH + 2]
PROMPT = [20, 30, *IMAGE, 40, *IMAGE, 50, 60]
FIRST, SECOND = 3, 12  # offsets of the placeholders
SPANS = tuple(MediaSpan("image", key, offset, 6, (1, 4, 6)) for key, offset in (("cat", FIRST), ("dog", SECOND)))


class Encoder:
    """What mm_encoder does, step by step, with the one request that it has taken."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis, self._keys = redis, keys
        self._blobs = Blobs(redis, keys, 60, 1 << 20)
        self._stream = WorkStream(redis, keys, ENCODE, "mm_encoder", "mm-1", 100)
        self._ownership = EntryOwnership(redis, keys, ENCODE, "mm_encoder", "mm-1")
        self._entry_id = ""
        self._source: Encode | None = None
        self.prompt = generate("none", [])

    async def take(self, request_id: str = "sees") -> None:
        """Take a request with two pictures."""
        message = self.prompt = generate(request_id, PROMPT, 5, spans=SPANS)
        media = tuple(Media("image", "p", url=f"http://{span.key}") for span in SPANS)
        await Records(self._redis, self._keys).submit(ENCODE, Encode(message.request, (b"", b"", b""), media))
        await Lease(self._redis, self._keys, "mm_encoder", "mm-1", 60_000).renew("ready")
        await self._stream.join()
        await self.take_again()

    async def take_and_send_ahead(self) -> None:
        await self.take()
        assert await self.send_ahead() == "done"

    async def take_again(self) -> None:
        [delivery] = await self._stream.read_new(1, 0)
        assert isinstance(delivery.message, Encode)
        self._entry_id, self._source = delivery.entry_id, delivery.message

    async def send_ahead(self) -> str:
        assert self._source is not None
        return await self._ownership.forward_ahead(self._entry_id, self._source, self.prompt)

    async def hand_on(self) -> str:
        assert self._source is not None
        return await self._ownership.forward(self._entry_id, self._source, self.prompt)

    async def store(self, key: str, rows: bytes = ROWS, *, tell: bool = True) -> None:
        await self._blobs.put("embeds", key, rows, json.dumps(META).encode())
        if tell:
            await send(self._redis, self._keys.control(), Encoded(key))

    async def fail(self, failure: Failure) -> None:
        assert await self._ownership.end_ahead(self._entry_id, "sees", failure)

    async def evict(self, key: str) -> None:
        await self._blobs.delete("embeds", [key])


@pytest.fixture
def encoder(redis: Redis, keys: Keys) -> Encoder:
    return Encoder(redis, keys)


def computed(runner: SumRunner, request_id: str = "sees") -> int:
    """Return the number of tokens of the prompt that were computed, from the first on."""
    chunks = [chunk for plan in runner.plans for chunk in plan.chunks if chunk.sequence.request_id == request_id]
    stops = [0, *(chunk.stop for chunk in chunks)]
    assert [chunk.start for chunk in chunks] == stops[:-1], "each token once, in order"
    return stops[-1]


async def reached(runner: SumRunner, tokens: int) -> None:
    async def there() -> bool:
        return computed(runner) == tokens

    await eventually(there)


async def nothing_left(redis: Redis, keys: Keys, running: Running) -> None:
    async def nothing() -> bool:
        waits = running.service._handler._embeds._waiting
        used = [running.held, running.metric("num_requests_running"), running.metric("kv_cache_usage_perc")]
        return used == [0, 0, 0] and not waits and await redis.xlen(keys.stream(GENERATE)) == 0

    await eventually(nothing)


async def test_a_prompt_is_computed_as_far_as_its_embeddings_are_there(
    redis: Redis, redis_url: str, keys: Keys, encoder: Encoder
) -> None:
    runner, reader = SumRunner(64, 4), Reader(redis, keys)
    async with engine(redis, redis_url, runner, lease_ms=600_000) as running:
        await encoder.take_and_send_ahead()
        await reached(runner, FIRST)
        await submit(redis, keys, generate("reads", [20, 31], 30))
        [reads] = await reader.finished("reads")
        assert reads.tokens == continuation([20, 31], 30), "others go on"
        await encoder.store("cat")
        await reached(runner, SECOND)
        assert reader.seen["sees"].tokens == []
        await encoder.store("dog")
        [sees] = await reader.finished("sees")
        assert (sees.tokens, sees.finish) == (continuation(PROMPT, 5), Finish("length"))
        await nothing_left(redis, keys, running)


async def test_prompts_that_wait_do_not_keep_others_from_being_read(
    redis: Redis, redis_url: str, keys: Keys, encoder: Encoder
) -> None:
    """The engine holds three requests, and of those that wait for embeddings as many as there are."""
    runner, reader = SumRunner(64, 4), Reader(redis, keys)
    async with engine(redis, redis_url, runner, max_num_seqs=1, lease_ms=300) as running:
        for number in range(4):
            await encoder.take(f"sees {number}")
            assert await encoder.send_ahead() == "done"
        await eventually(lambda: asyncio.sleep(0, running.held == 4))
        await submit(redis, keys, generate("reads", [20, 31], 30))
        await reader.finished("reads")
        await encoder.store("cat")
        await encoder.store("dog")
        seen = await reader.finished(*(f"sees {number}" for number in range(4)))
        assert [each.tokens for each in seen] == [continuation(PROMPT, 5)] * 4
        await nothing_left(redis, keys, running)


async def test_embeddings_may_come_in_any_order_and_unannounced(
    redis: Redis, redis_url: str, keys: Keys, encoder: Encoder
) -> None:
    runner, reader = SumRunner(64, 4), Reader(redis, keys)
    async with engine(redis, redis_url, runner, lease_ms=300) as running:
        await encoder.take_and_send_ahead()
        await reached(runner, FIRST)
        await encoder.store("dog")
        await encoder.store("cat", tell=False)
        [sees] = await reader.finished("sees")
        assert sees.tokens == continuation(PROMPT, 5)
        await nothing_left(redis, keys, running)


async def test_embeddings_that_cannot_be_made_end_the_request(
    redis: Redis, redis_url: str, keys: Keys, encoder: Encoder
) -> None:
    runner, reader, failure = SumRunner(64, 4), Reader(redis, keys), Failure(500, "the tower failed")
    async with engine(redis, redis_url, runner, lease_ms=300) as running:
        await encoder.take_and_send_ahead()
        await encoder.store("cat")
        await reached(runner, SECOND)
        await encoder.fail(failure)
        [sees] = await reader.finished("sees")
        assert (sees.tokens, sees.finish) == ([], Finish("error", failure=failure))
        await nothing_left(redis, keys, running)


async def test_a_failure_from_before_the_engine_took_it_ends_the_request(
    redis: Redis, redis_url: str, keys: Keys, encoder: Encoder
) -> None:
    reader, failure = Reader(redis, keys), Failure(500, "the tower failed")
    await encoder.take_and_send_ahead()
    await encoder.fail(failure)
    async with engine(redis, redis_url) as running:
        [sees] = await reader.finished("sees")
        assert sees.finish == Finish("error", failure=failure)
        await nothing_left(redis, keys, running)


@pytest.mark.parametrize("evicted", ["before", "meanwhile"])
async def test_embeddings_that_nobody_makes_any_more_are_asked_for_again(
    redis: Redis, redis_url: str, keys: Keys, encoder: Encoder, evicted: str
) -> None:
    """Nor does a prompt go ahead again then."""
    runner, reader = SumRunner(64, 4), Reader(redis, keys)
    async with engine(redis, redis_url, runner, lease_ms=300) as running:
        await encoder.take()
        await encoder.send_ahead()
        if evicted == "meanwhile":
            await reached(runner, FIRST)
        assert await encoder.hand_on() == "done"
        await eventually(lambda: redis.xlen(keys.stream(ENCODE)))
        await nothing_left(redis, keys, running)
        await encoder.take_again()
        assert await encoder.send_ahead() == "later"
        await encoder.store("cat")
        await encoder.store("dog")
        assert await encoder.hand_on() == "done"
        [sees] = await reader.finished("sees")
        assert (sees.tokens, sees.epoch) == (continuation(PROMPT, 5), 2)
        await nothing_left(redis, keys, running)


async def test_damaged_embeddings_are_made_again(redis: Redis, redis_url: str, keys: Keys, encoder: Encoder) -> None:
    runner = SumRunner(64, 4)
    async with engine(redis, redis_url, runner, lease_ms=300) as running:
        await encoder.take_and_send_ahead()
        await reached(runner, FIRST)
        await encoder.store("cat", ROWS[1:])
        await nothing_left(redis, keys, running)
    assert await Blobs(redis, keys, 60, 1 << 20).get("embeds", "cat") is None
    assert await redis.hget(keys.request("sees"), "returned") == b"1"


async def test_cancelling_frees_what_a_waiting_prompt_holds(
    redis: Redis, redis_url: str, keys: Keys, encoder: Encoder
) -> None:
    runner, reader = SumRunner(64, 4), Reader(redis, keys)
    async with engine(redis, redis_url, runner, lease_ms=300) as running:
        await encoder.take_and_send_ahead()
        await reached(runner, FIRST)
        await Records(redis, keys).cancel(["sees"])
        [sees] = await reader.finished("sees")
        assert (sees.tokens, sees.finish) == ([], Finish("cancelled"))
        await nothing_left(redis, keys, running)


async def test_a_deadline_ends_a_waiting_prompt(redis: Redis, redis_url: str, keys: Keys, encoder: Encoder) -> None:
    runner, reader = SumRunner(64, 4), Reader(redis, keys)
    async with engine(redis, redis_url, runner, lease_ms=300) as running:
        await encoder.take_and_send_ahead()
        await reached(runner, FIRST)
        held = running.service._consumer._requests["sees"]
        late = msgspec.structs.replace(held.message.request, deadline=1.0)
        held.message = msgspec.structs.replace(held.message, request=late)
        [sees] = await reader.finished("sees")
        assert sees.finish is not None
        assert sees.finish.failure is not None
        assert sees.finish.failure.status == 504
        await nothing_left(redis, keys, running)


async def test_an_engine_takes_over_a_waiting_prompt(
    redis: Redis, redis_url: str, keys: Keys, encoder: Encoder
) -> None:
    runner, reader = SumRunner(64, 4), Reader(redis, keys)
    first = SumRunner(64, 4)
    async with engine(redis, redis_url, first, name="engine-a", lease_ms=60_000):
        await encoder.take_and_send_ahead()
        await reached(first, FIRST)
        await Lease(redis, keys, "engine", "engine-a", 1000).release()
        async with engine(redis, redis_url, runner, name="engine-b", lease_ms=60_000) as running:
            await reached(runner, FIRST)
            await encoder.store("cat")
            await encoder.store("dog")
            [sees] = await reader.finished("sees")
            assert (sees.tokens, sees.epoch) == (continuation(PROMPT, 5), 2)
            await nothing_left(redis, keys, running)


async def test_what_the_prefix_cache_has_needs_no_embeddings(
    redis: Redis, redis_url: str, keys: Keys, encoder: Encoder
) -> None:
    runner, reader = SumRunner(64, 4), Reader(redis, keys)
    async with engine(redis, redis_url, runner, lease_ms=300) as running:
        await encoder.store("cat")
        await encoder.store("dog")
        await submit(redis, keys, generate("before", PROMPT, 5, spans=SPANS))
        await reader.finished("before")
        await encoder.evict("cat")
        await encoder.evict("dog")
        await encoder.take_and_send_ahead()
        [sees] = await reader.finished("sees")
        assert sees.tokens == continuation(PROMPT, 5)
        await nothing_left(redis, keys, running)


async def test_without_chunks_a_prompt_waits_for_all_its_embeddings(
    redis: Redis, redis_url: str, keys: Keys, encoder: Encoder
) -> None:
    """At mm_encoder, as with an engine of an older build, which does not know of such prompts."""
    runner = SumRunner(64, 4)
    whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": 512}
    async with engine(redis, redis_url, runner, **whole) as running:
        await encoder.take()
        await encoder.send_ahead()
        await nothing_left(redis, keys, running)
        await encoder.take_again()
        assert await encoder.send_ahead() == "later"
    assert runner.plans == []


async def test_decoding_overlaps_beside_a_waiting_prompt(
    redis: Redis, redis_url: str, keys: Keys, encoder: Encoder
) -> None:
    inner, reader = SumRunner(64, 4, overlaps=True), Reader(redis, keys)
    runner = GatedRunner(inner)
    async with engine(redis, redis_url, runner, lease_ms=600_000):
        await encoder.take_and_send_ahead()
        runner.allow(1)
        await reached(inner, FIRST)
        await submit(redis, keys, generate("reads", [20, 31], 30))
        runner.allow(100)
        await reader.finished("reads")
        await encoder.store("cat")
        await encoder.store("dog")
        await reader.finished("sees")
    ahead = [c for p in inner.plans for c in p.chunks if c.source is not None and c.sequence.request_id == "reads"]
    assert len(ahead) == 29, "each token but the first was launched before the one before was read"


async def test_embeddings_of_this_host_are_mapped(
    redis: Redis, redis_url: str, keys: Keys, encoder: Encoder, tmp_path: Path
) -> None:
    runner, reader, segments = SumRunner(64, 4), Reader(redis, keys), Segments(tmp_path)
    async with engine(redis, redis_url, runner, lease_ms=300, segments_dir=str(tmp_path), name="e") as running:
        assert is_marked(reader_path(segments, "e"))
        segments.path("cat").write_bytes(ROWS)
        await encoder.store("cat", b"")
        await encoder.store("dog")
        await encoder.take_and_send_ahead()
        [sees] = await reader.finished("sees")
        assert sees.tokens == continuation(PROMPT, 5)
        held = {chunk.sequence.embeds for plan in runner.plans for chunk in plan.chunks}
        assert [type(each.data) for embeds in held for each in (embeds[0], embeds[1])] == [memoryview, bytes]
        await nothing_left(redis, keys, running)
    assert not is_marked(reader_path(segments, "e"))


@pytest.mark.parametrize("gone", ["the segment", "the directory", "some of its bytes"])
async def test_a_segment_that_is_gone_is_made_again(
    redis: Redis, redis_url: str, keys: Keys, encoder: Encoder, tmp_path: Path, gone: str
) -> None:
    runner, segments = SumRunner(64, 4), Segments(tmp_path)
    if gone == "some of its bytes":
        segments.path("cat").write_bytes(ROWS[1:])
    directory = "" if gone == "the directory" else str(tmp_path)
    async with engine(redis, redis_url, runner, lease_ms=300, segments_dir=directory) as running:
        await encoder.take()
        await encoder.store("cat", b"")
        await encoder.store("dog")
        assert await encoder.hand_on() == "done"
        await eventually(lambda: redis.xlen(keys.stream(ENCODE)))
        await nothing_left(redis, keys, running)
    assert await redis.hget(keys.request("sees"), "returned") == b"1"
