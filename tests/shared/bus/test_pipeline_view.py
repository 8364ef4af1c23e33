"""The look at the pipeline that `millrace status` and `top`, the autoscaler and the console share: what is read from a
real Redis, and what of it is something to look at."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from machine import PATIENCE_S
from redis.asyncio import Redis

from shared.bus import leases
from shared.bus.blobs import Blobs
from shared.bus.client import command, connect
from shared.bus.keys import ENCODE, GENERATE, Keys
from shared.bus.leases import Lease, Shards
from shared.bus.pipeline_view import FULL, LONG_WAIT_S, BatchesView, BlobsView, PipelineView, RedisView, problems, read
from shared.bus.work_stream import WorkStream
from shared.message_codec import to_entry
from shared.messages import Generate, Output, Request, Sampling

HOUR_MS = 3_600_000


async def lease(redis: Redis, keys: Keys, service: str, name: str, state: str = "ready", **load: float) -> None:
    await Lease(redis, keys, service, name, HOUR_MS, "0.1.0", 1e9).renew(state, load)


async def add_work(redis: Redis, keys: Keys, stream: str, number: int, entry_id: str = "*") -> None:
    request = Request("a", "g", 0, 0.0, Sampling(seed=0), Output(thinking=False))
    for _ in range(number):
        await redis.xadd(keys.stream(stream), to_entry(Generate(request, b"", 1)), id=entry_id)  # type: ignore[arg-type]


async def all_ready(redis: Redis, keys: Keys) -> None:
    for service in ("gateway", "mm_encoder", "engine", "postproc"):
        await lease(redis, keys, service, f"{service}-0")


@asynccontextmanager
async def as_user(redis: Redis, redis_url: str, *rights: str) -> AsyncIterator[Redis]:
    await command(redis, "ACL", "SETUSER", "reader", "reset", "on", ">secret", "~test:*", *rights)
    client = connect(redis_url.replace("unix://", "unix://reader:secret@"))
    try:
        yield client
    finally:
        await client.aclose()
        await command(redis, "ACL", "DELUSER", "reader")
        await redis.acl_log_reset()  # of what it was refused


async def test_nothing_is_there_yet(redis: Redis, keys: Keys) -> None:
    view = await read(redis, keys)
    assert [stage.replicas for stage in view.stages] == [()] * 4
    assert view.shards == ()
    assert problems(view) == ["gateway: no replica is ready", "postproc: no replica is ready"]


async def test_replicas_and_what_they_say(redis: Redis, keys: Keys) -> None:
    await lease(redis, keys, "engine", "engine-1", tokens_per_s=7.5)
    await lease(redis, keys, "engine", "engine-0", "starting")
    await redis.sadd(keys.replicas("engine"), "engine-2")
    await redis.sadd(keys.replicas("engine"), "engine-3")
    await redis.set(keys.replica("engine", "engine-3"), b'{"another": "version"}', px=HOUR_MS)
    view = await read(redis, keys)
    first, second, third, fourth = view.stage("engine").replicas
    assert (first.name, first.state, first.version) == ("engine-0", "starting", "0.1.0")
    assert (second.name, second.state, second.load) == ("engine-1", "ready", {"tokens_per_s": 7.5})
    assert second.up_s == pytest.approx(view.at - 1e9)
    assert 3600 - PATIENCE_S < (second.expires_s or 0) <= 3600
    assert (third.state, fourth.state) == ("gone", "unreadable")
    assert view.stage("engine").ready == (second,)
    assert "engine-3: a lease of another version, which cannot be read" in problems(view)


async def test_a_stream_is_counted_and_dated(redis: Redis, keys: Keys) -> None:
    await lease(redis, keys, "engine", "engine-0")
    stream = WorkStream(redis, keys, GENERATE, "engine", "engine-0", 3)
    await stream.join()
    seconds, microseconds = await redis.time()
    now_ms = seconds * 1000 + microseconds // 1000
    for age_s in (3000, 2000, 1000):
        await add_work(redis, keys, GENERATE, 1, f"{now_ms - 1000 * age_s}-0")
    assert len(await stream.read_new(1, 0)) == 1
    queue = (await read(redis, keys)).stage("engine").queue
    assert queue is not None
    assert (queue.length, queue.pending, queue.waiting, queue.quarantined) == (3, 1, 2, 0)
    assert queue.oldest_s == pytest.approx(3000, abs=PATIENCE_S)
    assert queue.waiting_s == pytest.approx(2000, abs=PATIENCE_S)
    assert [(each.name, each.pending) for each in queue.consumers] == [("engine-0", 1)]


async def test_a_stream_whose_group_nobody_has_made_yet(redis: Redis, keys: Keys) -> None:
    await add_work(redis, keys, ENCODE, 2)
    queue = (await read(redis, keys)).stage("mm_encoder").queue
    assert queue is not None
    assert (queue.length, queue.pending, queue.waiting, queue.consumers) == (2, 0, 2, ())
    assert queue.waiting_s is not None


async def test_shards_and_their_owners(redis: Redis, keys: Keys) -> None:
    await lease(redis, keys, "postproc", "postproc-0")
    await Shards(redis, keys, "postproc", "postproc-0", 3).balance([])
    await redis.hset(keys.shards(), "2", "7 postproc-1")
    await redis.sadd(keys.replicas("postproc"), "postproc-1")  # whose lease has expired
    await redis.xadd(keys.tokens(1), {"v": "1"})
    view = await read(redis, keys)
    assert [(each.shard, each.owner, each.epoch, each.length) for each in view.shards] == [
        (0, "postproc-0", 1, 0),
        (1, "postproc-0", 1, 1),
        (2, None, 7, 0),
    ]
    assert view.shards[1].oldest_s is not None
    assert "tokens:2 has no living owner" in problems(view)


async def test_batches_that_have_not_ended(redis: Redis, keys: Keys) -> None:
    assert (await read(redis, keys)).batches == BatchesView()
    now = float((await redis.time())[0])
    for place, counts in enumerate(({"total": 9, "completed": 2, "failed": 1}, {"total": 5}, {"total": "?"})):
        await redis.hset(keys.batch(f"batch_{place}"), mapping=counts)  # type: ignore[arg-type]
        await redis.zadd(keys.batches(), {f"batch_{place}": now - 100 + place})
    await redis.zadd(keys.batches(), {"batch_gone": now - 500})
    await redis.set(keys.batch_lease("batch_0"), "gateway-0")
    batches = (await read(redis, keys)).batches
    assert (batches.working, batches.waiting, batches.lines, batches.done) == (1, 2, 14, 3)
    assert 100 <= (batches.oldest_s or 0) < 100 + PATIENCE_S
    await redis.delete(keys.batches())
    await redis.set(keys.batches(), "something else")
    assert (await read(redis, keys)).batches.count == 0


async def test_blobs_may_be_elsewhere(redis: Redis, redis_url: str, keys: Keys) -> None:
    elsewhere = connect(f"{redis_url}?db=1")
    await Blobs(redis, keys, 60, 1 << 20).put("media", "a", b"x" * 10)
    await Blobs(elsewhere, keys, 60, 1 << 20).put("media", "b", b"x" * 500)
    assert (await read(redis, keys)).blobs == BlobsView(1, 10)
    assert (await read(redis, keys, elsewhere)).blobs.bytes == 500
    await elsewhere.aclose()


async def test_looking_changes_nothing(redis: Redis, keys: Keys) -> None:
    await all_ready(redis, keys)
    await add_work(redis, keys, GENERATE, 1)
    await redis.sadd(keys.replicas("engine"), "engine-9")
    names = sorted(await redis.keys("*"))
    before = [await redis.dump(name) for name in names]
    await read(redis, keys)
    assert sorted(await redis.keys("*")) == names
    assert [await redis.dump(name) for name in names] == before


async def test_a_user_that_may_not_ask_about_the_server(redis: Redis, redis_url: str, keys: Keys) -> None:
    await all_ready(redis, keys)
    async with as_user(redis, redis_url, "+@all", "-@admin", "-@dangerous") as client:
        view = await read(client, keys)
    assert view.redis is None
    assert problems(view) == []


async def test_who_does_not_ask_about_the_server_is_refused_nothing(redis: Redis, redis_url: str, keys: Keys) -> None:
    await all_ready(redis, keys)
    await command(redis, "ACL", "LOG", "RESET")
    async with as_user(redis, redis_url, "+@all", "-@admin", "-@dangerous") as client:
        assert (await read(client, keys, server=False)).redis is None
    assert await command(redis, "ACL", "LOG") == []


async def test_a_user_that_may_not_read(redis: Redis, redis_url: str, keys: Keys) -> None:
    async with as_user(redis, redis_url, "-@all", "+@connection", "+info") as client:
        with pytest.raises(Exception, match="no permissions"):
            await read(client, keys)


async def test_a_sleeping_stage_is_well_until_there_is_work(redis: Redis, keys: Keys) -> None:
    await all_ready(redis, keys)
    assert problems(await read(redis, keys)) == []
    await Lease(redis, keys, "engine", "engine-0", HOUR_MS).release()
    assert problems(await read(redis, keys)) == []
    await add_work(redis, keys, GENERATE, 2)
    assert problems(await read(redis, keys)) == ["2 requests for engine: no replica is ready"]
    await lease(redis, keys, "engine", "engine-1", "starting")
    assert problems(await read(redis, keys)) == ["2 requests for engine: no replica is ready; one is starting"]
    await lease(redis, keys, "engine", "engine-1")
    assert problems(await read(redis, keys)) == []


async def test_a_stage_that_does_not_answer_is_no_sleeping_one(redis: Redis, keys: Keys) -> None:
    await all_ready(redis, keys)
    stream = WorkStream(redis, keys, GENERATE, "engine", "engine-0", 3)
    await stream.join()
    assert problems(await read(redis, keys)) == []
    await redis.delete(keys.replica("engine", "engine-0"))  # as it expires
    silent = "engine: no replica is ready; engine-0 does not answer"
    assert problems(await read(redis, keys)) == [silent]
    await leases.live(redis, keys, "engine")  # forgets its name
    assert problems(await read(redis, keys)) == [silent]
    await lease(redis, keys, "engine", "engine-1", "starting")
    assert problems(await read(redis, keys)) == [f"{silent}; one is starting"]
    await lease(redis, keys, "engine", "engine-1")
    assert problems(await read(redis, keys)) == []
    await redis.delete(keys.replica("engine", "engine-1"))
    await stream.leave()
    await leases.live(redis, keys, "engine")
    assert problems(await read(redis, keys)) == []


async def test_what_waits_too_long_and_what_was_given_up(redis: Redis, keys: Keys) -> None:
    await all_ready(redis, keys)
    seconds, _ = await redis.time()
    await add_work(redis, keys, ENCODE, 1, f"{int(1000 * (seconds - LONG_WAIT_S - 60))}-0")
    await redis.xadd(keys.quarantine(GENERATE), {"reason": "delivered 4 times"})
    waits, poison = problems(await read(redis, keys))
    found = re.fullmatch(r"mm_encoder: the oldest of 1 has waited for (\d+) s", waits)
    assert found is not None
    assert int(found[1]) == pytest.approx(LONG_WAIT_S + 60, abs=PATIENCE_S)
    assert poison == "quarantine:generate has 1 entries, which ended replica after replica"


async def test_a_redis_that_is_nearly_full(redis: Redis, keys: Keys) -> None:
    await all_ready(redis, keys)
    view = await read(redis, keys)
    assert isinstance(view.redis, RedisView)
    limit = int(view.redis.used_bytes / FULL)

    def with_limit(number: int) -> PipelineView:
        assert view.redis is not None
        return msgspec.structs.replace(view, redis=msgspec.structs.replace(view.redis, max_bytes=number))

    assert problems(with_limit(limit + 100)) == []
    assert problems(with_limit(0)) == []
    assert problems(with_limit(limit - 100)) == ["Redis uses 85% of its memory; full, it refuses"]
