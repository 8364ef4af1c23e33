"""The engine service on a real Redis: answers, room, cancellation, resumption, poison, failure."""

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from engine_bench import GatedRunner, Reader, Running, Seen, engine, eventually, settings_for, submit
from engine_cases import CONFIG, EOS, FACTS, PATCH, VOCAB, Computed, SumRunner, compile_grammar, continuation, generate
from machine import PATIENCE_S
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from cli.redis_server import RedisServer
from services.engine.__main__ import compose
from services.engine.metrics import EngineMetrics
from services.engine.run.sampler import Sampled
from services.engine.schedule.plan import Plan
from shared.bus.blobs import Blobs
from shared.bus.client import MAX_BLOCK_MS, connect
from shared.bus.keys import ENCODE, GENERATE, Keys
from shared.bus.leases import Lease
from shared.bus.ownership import MOST_RETURNS, EntryOwnership
from shared.bus.records import Records
from shared.bus.streams import send
from shared.bus.work_stream import Delivery, WorkStream
from shared.errors import ConfigError, Failure
from shared.message_codec import from_entry
from shared.messages import Cancel, Encode, Finish, Generate, Media, MediaSpan, TokenLogprob, TokenRun, Tokens, pack_ids
from shared.service import MISCONFIGURED, Life


async def backlog(redis: Redis, keys: Keys) -> int:
    return int(await redis.xlen(keys.stream(GENERATE)))


async def no_backlog(redis: Redis, keys: Keys) -> None:
    async def empty() -> bool:
        return await backlog(redis, keys) == 0

    await eventually(empty)


async def nothing_held(running: Running) -> None:
    await eventually(lambda: asyncio.sleep(0, running.held == 0))


def gated(blocks: int = 64) -> GatedRunner:
    return GatedRunner(SumRunner(blocks, 4))


async def stuck(runner: GatedRunner) -> None:
    """Until the model's thread waits for permission to run a step."""
    assert await asyncio.to_thread(runner.wait_until_stuck)


async def test_requests_are_answered_in_one_stream_a_shard(redis: Redis, redis_url: str, keys: Keys) -> None:
    reader = Reader(redis, keys, shards=2)
    prompts = {f"r{i}": [20 + i, 30, 40 + i] for i in range(6)}
    async with engine(redis, redis_url, shards=2) as running:
        await submit(redis, keys, *(generate(r, p, 5 + i, shard=i % 2) for i, (r, p) in enumerate(prompts.items())))
        seen = await reader.finished(*prompts)
        for i, (made, prompt) in enumerate(zip(seen, prompts.values(), strict=True)):
            assert made.tokens == continuation(prompt, 5 + i)
            assert made.finish == Finish("length")
            assert [(b.epoch, b.index, b.prompt_tokens) for b in made.begins] == [(1, 0, 3)]
        for stream, message in reader.messages:
            runs = [run.request_id for run in message.runs]
            assert len(set(runs)) == len(runs), "one run a sequence and step"
            assert {int(r[1]) % 2 for r in runs} <= {int(stream[-1])}
        await no_backlog(redis, keys)
        await nothing_held(running)
        assert running.metric("generation_tokens_total") == sum(range(5, 11))
        assert running.metric("prompt_tokens_total") == 18
        assert running.metric("num_requests_running") == 0
        assert running.metric("kv_cache_usage_perc") == 0


async def test_a_full_engine_leaves_the_rest_to_others(redis: Redis, redis_url: str, keys: Keys) -> None:
    runner, reader = gated(), Reader(redis, keys)
    names = [f"r{i}" for i in range(8)]
    async with engine(redis, redis_url, runner, max_num_seqs=2) as running:
        await submit(redis, keys, *(generate(name, [20, 30], 3) for name in names))
        await stuck(runner)

        async def taken() -> bool:
            [group] = await redis.xinfo_groups(keys.stream(GENERATE))
            return int(group["pending"]) == 4

        await eventually(taken)
        await eventually(lambda: asyncio.sleep(0, running.held == 4))  # two that run and two that wait
        assert await backlog(redis, keys) == 8
        runner.allow(1000)
        await reader.finished(*names)
        await no_backlog(redis, keys)


async def test_cancelling_frees_everything_whether_it_waits_or_runs(redis: Redis, redis_url: str, keys: Keys) -> None:
    runner, reader, records = gated(), Reader(redis, keys), Records(redis, keys)
    async with engine(redis, redis_url, runner, max_num_seqs=1) as running:
        await submit(redis, keys, generate("runs", [20, 30], 50), generate("waits", [21, 30], 50))
        runner.allow(3)
        await reader.reached("runs", 3)
        await eventually(lambda: asyncio.sleep(0, running.held == 2))
        await records.cancel(["runs", "waits"])
        await running.heard_of_cancelling("runs", "waits")
        runner.allow(1000)
        runs, waits = await reader.finished("runs", "waits")
        assert runs.finish == waits.finish == Finish("cancelled")
        assert len(runs.tokens) < 50
        assert waits.tokens == []
        await no_backlog(redis, keys)
        await nothing_held(running)
        await submit(redis, keys, generate("after", [22], 2))
        await reader.finished("after")
        assert running.metric("kv_cache_usage_perc") == 0


async def test_what_was_cancelled_before_it_was_taken_is_dropped(redis: Redis, redis_url: str, keys: Keys) -> None:
    records = Records(redis, keys)
    await submit(redis, keys, generate("late", [20], 5), generate("gone", [20], 5), generate("fine", [20], 5))
    await records.cancel(["late"])
    await records.delete(["gone"])
    reader = Reader(redis, keys)
    async with engine(redis, redis_url):
        await reader.finished("fine")
        await no_backlog(redis, keys)
    assert set(reader.seen) == {"fine"}
    assert set(await records.get(["late", "gone", "fine"])) == {"fine"}


async def test_cancelling_while_embeddings_load(
    redis: Redis, redis_url: str, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    await Blobs(redis, keys, 60, 1 << 20).put("embeds", "cat", ROWS, json.dumps(META).encode())
    loading, go_on, get = asyncio.Event(), asyncio.Event(), Blobs.get

    async def slow_get(self: Blobs, kind: str, key: str) -> tuple[bytes, bytes] | None:
        loading.set()
        await go_on.wait()
        return await get(self, kind, key)

    monkeypatch.setattr(Blobs, "get", slow_get)
    reader, runner = Reader(redis, keys), SumRunner(64, 4)
    async with engine(redis, redis_url, runner) as running:
        await submit(redis, keys, generate("r", [PATCH + 1, *[PATCH] * 6, PATCH + 2], 200, spans=(SPAN,)))
        await asyncio.wait_for(loading.wait(), PATIENCE_S)
        await Records(redis, keys).cancel(["r"])
        await running.heard_of_cancelling("r")
        go_on.set()
        [seen] = await reader.finished("r")
        assert seen.finish == Finish("cancelled")
        await no_backlog(redis, keys)
        await nothing_held(running)
    assert runner.plans == [], "nothing was computed for it"


async def test_a_cancel_of_a_request_it_does_not_have_is_ignored(redis: Redis, redis_url: str, keys: Keys) -> None:
    reader = Reader(redis, keys)
    async with engine(redis, redis_url):
        await send(redis, keys.control(), Cancel(("nobody",)))
        await submit(redis, keys, generate("r", [20], 2))
        await reader.finished("r")


@pytest.mark.parametrize("cut", range(9))
async def test_a_journal_is_resumed_at_its_end(redis: Redis, redis_url: str, keys: Keys, cut: int) -> None:
    whole = continuation([20, 30], 8)
    records, reader = Records(redis, keys), Reader(redis, keys)
    await submit(redis, keys, generate("r", [20, 30], 8))
    await redis.hincrby(keys.request("r"), "epoch", 1)
    await records.write_journal([("r", 0, whole[:cut])])
    async with engine(redis, redis_url):
        reader.seen["r"] = Seen(whole[:cut])
        await reader.finished("r")
        await no_backlog(redis, keys)
    begins = [begin for _, message in reader.messages for begin in message.begins]
    runs = [run for _, message in reader.messages for run in message.runs]
    assert [(begin.epoch, begin.index) for begin in begins] == [(2, 0), (2, cut)], "announced, then begun"
    assert runs[0].index == min(cut, 7), "what only lacks its end says its last token again"
    assert [token for run in runs for token in run.tokens] == whole[min(cut, 7) :]
    assert runs[-1].finish == Finish("length")


async def test_a_dead_engines_requests_go_on_under_a_higher_epoch(redis: Redis, redis_url: str, keys: Keys) -> None:
    """The first engine stands still in a step while its lease ends, and wakes up when the second is done."""
    runner, reader = gated(), Reader(redis, keys)
    whole = continuation([20, 30], 12)
    async with engine(redis, redis_url, runner, name="engine-a", lease_ms=60_000):
        await submit(redis, keys, generate("r", [20, 30], 12))
        runner.allow(5)
        await reader.reached("r", 5)
        await stuck(runner)
        await Records(redis, keys).write_journal([("r", 0, whole[:2])])
        await Lease(redis, keys, "engine", "engine-a", 1000).release()
        async with engine(redis, redis_url, name="engine-b", lease_ms=60_000):
            [seen] = await reader.finished("r")
            await no_backlog(redis, keys)
        assert seen.tokens == whole
        assert [(begin.epoch, begin.index) for begin in seen.begins] == [(1, 0), (2, 0), (2, 5)]
        before = len(reader.messages)
        runner.allow(1000)
        await reader.until(lambda: any(run.finish for _, m in reader.messages[before:] for run in m.runs))
        late = [run for _, message in reader.messages[before:] for run in message.runs]
        assert {run.epoch for run in late} == {1}, "a reader knows these by their epoch"


async def test_an_answer_whose_end_is_in_the_stream_is_only_acked(redis: Redis, redis_url: str, keys: Keys) -> None:
    await submit(redis, keys, generate("r", [20], 3))
    await redis.hincrby(keys.request("r"), "epoch", 1)
    await send(redis, keys.tokens(0), Tokens((), (TokenRun("r", 1, 0, (10, EOS), None, Finish("stop", EOS)),)))
    async with engine(redis, redis_url):
        await no_backlog(redis, keys)
    reader = Reader(redis, keys)
    [seen] = await reader.finished("r")
    assert sum(len(message.runs) for _, message in reader.messages) == 1
    assert seen.finish == Finish("stop", EOS)


async def test_a_request_submitted_twice_is_run_once(redis: Redis, redis_url: str, keys: Keys) -> None:
    runner, reader = gated(), Reader(redis, keys)
    async with engine(redis, redis_url, runner):
        await submit(redis, keys, generate("r", [20], 6))
        await stuck(runner)
        await submit(redis, keys, generate("r", [20], 6))

        async def one_left() -> bool:
            return await backlog(redis, keys) == 1

        await eventually(one_left)
        runner.allow(1000)
        [seen] = await reader.finished("r")
        assert seen.tokens == continuation([20], 6)
        await no_backlog(redis, keys)


async def delivered_to_the_dead(redis: Redis, keys: Keys, times: int) -> None:
    """As so many engines leave an entry that each die of it."""
    for number in range(times):
        lease = Lease(redis, keys, "engine", f"dead-{number}", 60_000)
        await lease.renew("ready")
        work = WorkStream(redis, keys, GENERATE, "engine", f"dead-{number}", 100)
        await work.join()
        taken = await work.read_new(1, 0) or (await work.claim_abandoned(1)).claimed
        assert len(taken) == 1
        await lease.release()


async def test_an_entry_that_kills_engines_is_answered_with_an_error(redis: Redis, redis_url: str, keys: Keys) -> None:
    await submit(redis, keys, generate("bad", [20], 6))
    await delivered_to_the_dead(redis, keys, 2)
    reader = Reader(redis, keys)
    async with engine(redis, redis_url, max_deliveries=2) as running:
        [seen] = await reader.finished("bad")
        assert seen.finish is not None
        assert seen.finish.failure is not None
        assert (seen.finish.reason, seen.finish.failure.status) == ("error", 500)
        await no_backlog(redis, keys)
        await nothing_held(running)
    assert await Records(redis, keys).lost(["bad"]) == set(), "its gateway waits for postproc, however long"
    [(_, kept)] = await redis.xrange(keys.quarantine(GENERATE))
    assert kept.items() >= {b"reason": b"delivered 3 times", b"attempts": b"3"}.items()
    message = from_entry(kept)
    assert isinstance(message, Generate)
    assert message.request.id == "bad"


@pytest.mark.parametrize("answered", [False, True], ids=["before it answered", "after it answered"])
async def test_poison_is_answered_once_though_who_found_it_dies(
    redis: Redis, redis_url: str, keys: Keys, answered: bool
) -> None:
    await submit(redis, keys, generate("bad", [20], 6))
    await delivered_to_the_dead(redis, keys, 3)
    if answered:
        await redis.hincrby(keys.request("bad"), "epoch", 1)
        failure = Failure(500, "poison")
        await send(
            redis, keys.tokens(0), Tokens((), (TokenRun("bad", 1, 0, (), None, Finish("error", None, failure)),))
        )
    reader = Reader(redis, keys)
    async with engine(redis, redis_url, max_deliveries=2):
        await no_backlog(redis, keys)
        [seen] = await reader.finished("bad")
    assert sum(run.finish is not None for _, message in reader.messages for run in message.runs) == 1
    assert seen.finish is not None
    assert seen.finish.reason == "error"
    assert await redis.xlen(keys.quarantine(GENERATE)) == 1


async def test_a_request_that_got_further_is_counted_anew(redis: Redis, redis_url: str, keys: Keys) -> None:
    """The engine that had it died of another cause."""
    runner, reader, records = gated(), Reader(redis, keys), Records(redis, keys)
    await submit(redis, keys, generate("r", [20, 30], 12))
    await delivered_to_the_dead(redis, keys, 2)
    await redis.hincrby(keys.request("r"), "epoch", 1)
    await records.write_journal([("r", 0, continuation([20, 30], 12)[:4])])

    async def counted_anew() -> bool:
        [pending] = await redis.xpending_range(keys.stream(GENERATE), "engine", "-", "+", 1)
        return (pending["consumer"], pending["times_delivered"]) == (b"engine-a", 1)

    async with engine(redis, redis_url, runner):
        await eventually(counted_anew)
        runner.allow(1000)
        reader.seen["r"] = Seen(continuation([20, 30], 12)[:4])
        await reader.finished("r")


async def test_what_redis_has_lost_is_let_go(redis: Redis, redis_url: str, keys: Keys) -> None:
    runner, reader = gated(), Reader(redis, keys)
    async with engine(redis, redis_url, runner, lease_ms=100, max_num_seqs=1) as running:
        await submit(redis, keys, generate("runs", [20, 30], 50), generate("waits", [21, 30], 50))
        runner.allow(3)
        await reader.reached("runs", 3)
        await eventually(lambda: asyncio.sleep(0, running.held == 2))
        await redis.flushall()
        await nothing_held(running)
        runner.allow(1000)
        await submit(redis, keys, generate("after", [22], 2))
        again = Reader(redis, keys)
        again.seen["runs"] = Seen(reader.seen["runs"].tokens)  # one step may be under way when it hears of it
        await again.finished("after")
        assert again.seen["runs"].finish is None
        assert set(again.seen) == {"after", "runs"}
        assert running.metric("num_requests_running") == 0
        assert running.metric("kv_cache_usage_perc") == 0


@pytest.mark.system
@pytest.mark.parametrize("persistence", [True, False], ids=["kept", "lost"])
async def test_redis_dies_and_comes_back(keys: Keys, persistence: bool) -> None:
    """With what it had, or with nothing; the model computes on meanwhile as far as it may."""
    directory = Path(tempfile.mkdtemp(prefix="millrace-"))
    with RedisServer(directory, persistence=persistence, namespace="test") as server:
        redis = connect(server.url)
        runner, reader = gated(), Reader(redis, keys)
        async with engine(redis, server.url, runner, lease_ms=300) as running:
            await submit(redis, keys, generate("r", [20, 30], 60))
            runner.allow(5)
            await reader.reached("r", 5)
            server.kill()
            runner.allow(20)
            await stuck(runner)
            await asyncio.to_thread(server.start)
            if persistence:
                runner.allow(1000)
                [seen] = await reader.finished("r")
                assert seen.tokens == continuation([20, 30], 60)
            await nothing_held(running)
            runner.allow(1000)
            again = Reader(redis, keys)
            again.seen["r"] = Seen(continuation([20, 30], 60))  # what it had to say before it heard of the loss
            await submit(redis, keys, generate("after", [21], 3))
            [seen] = await again.finished("after")
            assert seen.tokens == continuation([21], 3)
        await redis.aclose()
    shutil.rmtree(directory)


@pytest.mark.parametrize(
    "damaged", ["record", "type", "journal", "type of journal", "foreign journal", "epoch", "prompt"]
)
async def test_damaged_bytes_end_their_own_request(redis: Redis, redis_url: str, keys: Keys, damaged: str) -> None:
    reader = Reader(redis, keys)
    prompt = pack_ids([20, 30]) + (b"x" if damaged == "prompt" else b"")
    bad = msgspec.structs.replace(generate("bad", [20, 30], 8), prompt=prompt)
    await submit(redis, keys, bad, generate("good", [21, 30], 8))
    match damaged:
        case "record":
            await redis.hset(keys.request("bad"), "request", b"\xc1")
        case "type":
            await redis.set(keys.request("bad"), "oops")
        case "type of journal":
            await redis.hincrby(keys.request("bad"), "epoch", 1)
            await redis.sadd(keys.journal("bad"), "oops")
        case "journal" | "foreign journal":
            await redis.hincrby(keys.request("bad"), "epoch", 1)
            await redis.set(keys.journal("bad"), b"12345" if damaged == "journal" else pack_ids([10**6]))
            reader.seen["bad"] = Seen([] if damaged == "journal" else [10**6])
        case "epoch":
            await redis.hset(keys.request("bad"), "epoch", "?")
    async with engine(redis, redis_url) as running:
        seen, other = await reader.finished("bad", "good")
        await no_backlog(redis, keys)
        await nothing_held(running)
    assert other.tokens == continuation([21, 30], 8)
    if damaged == "epoch":
        assert seen.tokens == continuation([20, 30], 8), "the engine gives it another"
        return
    assert seen.finish is not None
    assert seen.finish.failure is not None
    assert seen.finish.failure.status == 500


async def test_a_dead_engines_requests_come_before_new_ones(redis: Redis, redis_url: str, keys: Keys) -> None:
    await submit(redis, keys, generate("old", [20], 4))
    lease = Lease(redis, keys, "engine", "dying", 60_000)
    await lease.renew("ready")
    work = WorkStream(redis, keys, GENERATE, "engine", "dying", 3)
    await work.join()
    runner, reader = gated(), Reader(redis, keys)
    async with engine(redis, redis_url, runner, lease_ms=100, max_num_seqs=1) as running:
        await submit(redis, keys, *(generate(f"new-{i}", [30 + i], 4) for i in range(8)))
        await eventually(lambda: asyncio.sleep(0, running.held == 3))
        assert len(await work.read_new(1, 0)) == 1
        await lease.release()

        async def owed() -> bool:
            return running.service._consumer._unclaimed == 1

        await eventually(owed)
        runner.allow(1000)
        await reader.finished("old", *(f"new-{i}" for i in range(8)))
    begun = list(dict.fromkeys(begin.request_id for _, m in reader.messages for begin in m.begins))
    assert begun.index("old") < begun.index("new-5")


async def test_draining_hands_over_what_it_does_not_finish(redis: Redis, redis_url: str, keys: Keys) -> None:
    runner, reader = gated(), Reader(redis, keys)
    async with engine(redis, redis_url, runner, name="engine-a", drain_s=0.0, lease_ms=60_000) as leaving:
        await submit(redis, keys, generate("r", [20, 30], 12))
        runner.allow(5)
        await reader.reached("r", 5)
        leaving.life.stop.set()
        await eventually(lambda: asyncio.sleep(0, leaving.service._outbox._closed))
        runner.allow(1000)
        assert await leaving.task == 0
    [pending] = await redis.xpending_range(keys.stream(GENERATE), "engine", "-", "+", 1)
    assert pending["times_delivered"] == 0, "it did not fail"
    async with engine(redis, redis_url, name="engine-b"):
        [seen] = await reader.finished("r")
        await no_backlog(redis, keys)
    assert seen.tokens == continuation([20, 30], 12)
    assert await redis.xinfo_consumers(keys.stream(GENERATE), "engine") == []


# ---------------------------------------------------------------------------------------------------- refusals


SPAN = MediaSpan("image", "cat", 1, 6, (1, 4, 6))
META = {"grid": [1, 4, 6], "rows": 6, "hidden": CONFIG.hidden_size, "dtype": "float32"}
ROWS = bytes(6 * CONFIG.hidden_size * 4)


def shown(request_id: str = "sees") -> Encode:
    """Return the `encode` message that the request's media came from."""
    made = generate(request_id, [20]).request
    return Encode(made, (b"", b""), (Media("image", "p", blob=f"{request_id}-0"),))


async def handed_on(redis: Redis, keys: Keys) -> None:
    """As mm_encoder does it, once its entry of `encode` is there."""
    stream = WorkStream(redis, keys, ENCODE, "mm_encoder", "mm-1", 100)
    await Lease(redis, keys, "mm_encoder", "mm-1", 60_000).renew("ready")
    await stream.join()
    taken: list[Delivery] = []
    async with asyncio.timeout(PATIENCE_S):
        while not taken:  # one read waits for less long than an engine may take
            taken = await stream.read_new(1, MAX_BLOCK_MS)
    [delivery] = taken
    assert isinstance(delivery.message, Encode)
    message = generate(delivery.message.request.id, [PATCH + 1, *[PATCH] * 6, PATCH + 2], 3, spans=(SPAN,))
    ownership = EntryOwnership(redis, keys, ENCODE, "mm_encoder", "mm-1")
    assert await ownership.forward(delivery.entry_id, delivery.message, message) == "done"


async def test_embeddings_that_were_evicted_are_made_again(redis: Redis, redis_url: str, keys: Keys) -> None:
    blobs, reader = Blobs(redis, keys, 60, 1 << 20), Reader(redis, keys)
    await blobs.put("media", "sees-0", b"a picture")
    await Records(redis, keys).submit(ENCODE, shown())
    async with engine(redis, redis_url) as running:
        await handed_on(redis, keys)
        await eventually(lambda: redis.xlen(keys.stream(ENCODE)))
        assert await backlog(redis, keys) == 0
        await nothing_held(running)
        assert reader.seen == {}
        await blobs.put("embeds", "cat", ROWS, json.dumps(META).encode())
        await handed_on(redis, keys)
        [seen] = await reader.finished("sees")
        assert (seen.finish, seen.epoch) == (Finish("length"), 2)
        await no_backlog(redis, keys)
    assert await blobs.get("media", "sees-0") is None, "nobody needs it any more"
    assert await redis.xlen(keys.stream(ENCODE)) == 0


async def test_embeddings_of_another_size_are_made_again(redis: Redis, redis_url: str, keys: Keys) -> None:
    blobs, reader = Blobs(redis, keys, 60, 1 << 20), Reader(redis, keys)
    await blobs.put("embeds", "cat", ROWS[: len(ROWS) // 2], json.dumps(META).encode())
    await Records(redis, keys).submit(ENCODE, shown())
    async with engine(redis, redis_url):
        await handed_on(redis, keys)
        await eventually(lambda: redis.xlen(keys.stream(ENCODE)))
        assert await blobs.get("embeds", "cat") is None, "an encoder would find them"
        await blobs.put("embeds", "cat", ROWS, json.dumps(META).encode())
        await handed_on(redis, keys)
        [seen] = await reader.finished("sees")
        assert seen.finish == Finish("length")
        await no_backlog(redis, keys)


async def test_embeddings_are_not_made_again_for_ever(redis: Redis, redis_url: str, keys: Keys) -> None:
    reader = Reader(redis, keys)
    await Records(redis, keys).submit(ENCODE, shown())
    async with engine(redis, redis_url):
        for _ in range(MOST_RETURNS + 1):
            await handed_on(redis, keys)
        [seen] = await reader.finished("sees")
        await no_backlog(redis, keys)
    assert seen.finish is not None
    assert seen.finish.failure is not None
    assert seen.finish.failure.status == 503
    assert await redis.xlen(keys.stream(ENCODE)) == 0


async def test_the_upload_of_a_request_that_another_has_stays(redis: Redis, redis_url: str, keys: Keys) -> None:
    """Of a request that another has now, the upload stays."""
    blobs, reader, runner = Blobs(redis, keys, 60, 1 << 20), Reader(redis, keys), gated()
    await blobs.put("media", "sees-0", b"a picture")
    await blobs.put("embeds", "cat", ROWS, json.dumps(META).encode())
    await Records(redis, keys).submit(ENCODE, shown())
    async with engine(redis, redis_url, runner, lease_ms=600_000) as running:
        await handed_on(redis, keys)
        await stuck(runner)
        [(entry_id, _)] = await redis.xrange(keys.stream(GENERATE))
        await redis.xclaim(keys.stream(GENERATE), "engine", "other", 0, [entry_id])
        runner.allow(1000)
        await reader.finished("sees")
        await nothing_held(running)
        assert await blobs.get("media", "sees-0") is not None
        assert await backlog(redis, keys) == 1


@pytest.mark.parametrize(
    ("stored", "status"),
    [
        (None, 503),
        ((ROWS, META | {"rows": 5}), 500),
        ((ROWS, META | {"hidden": 4}), 500),
        ((ROWS, META | {"grid": [1, 6, 4]}), 500),
        ((ROWS, META | {"dtype": "int8"}), 500),
        ((ROWS[1:], META), 500),
        ((ROWS, {}), 500),
    ],
    ids=["gone", "rows", "hidden", "grid", "dtype", "bytes", "meta"],
)
async def test_media_that_are_not_there_fail_their_request_alone(
    redis: Redis, redis_url: str, keys: Keys, stored: tuple[bytes, dict[str, object]] | None, status: int
) -> None:
    if stored is not None:
        await Blobs(redis, keys, 60, 1 << 20).put("embeds", "cat", stored[0], json.dumps(stored[1]).encode())
    reader = Reader(redis, keys)
    async with engine(redis, redis_url) as running:
        prompt = [PATCH + 1, *[PATCH] * 6, PATCH + 2]
        await submit(redis, keys, generate("sees", prompt, 3, spans=(SPAN,)), generate("reads", [20], 3))
        sees, reads = await reader.finished("sees", "reads")
        assert sees.finish is not None
        assert sees.finish.failure is not None
        assert (sees.finish.reason, sees.finish.failure.status) == ("error", status)
        assert [begin.prompt_tokens for begin in sees.begins] == [8]
        assert reads.finish == Finish("length")
        await no_backlog(redis, keys)
        await nothing_held(running)


async def test_media_that_are_there_are_given_to_the_runner(redis: Redis, redis_url: str, keys: Keys) -> None:
    await Blobs(redis, keys, 60, 1 << 20).put("embeds", "cat", ROWS, json.dumps(META).encode())
    runner, reader = SumRunner(64, 4), Reader(redis, keys)
    async with engine(redis, redis_url, runner):
        await submit(redis, keys, generate("r", [PATCH + 1, *[PATCH] * 6, PATCH + 2], 3, spans=(SPAN,)))
        [seen] = await reader.finished("r")
    assert seen.begins[0].image_tokens == 6
    assert runner.plans[0].chunks[0].sequence.embeds[0].data == ROWS


@pytest.mark.parametrize(
    ("message", "status", "named"),
    [
        (generate("bad", [20] * 600, 5), 400, "messages"),
        (generate("bad", [20], 5, stop_token_ids=(VOCAB,)), 400, "stop_token_ids"),
        (generate("bad", [20] * 100, 400), 400, "max_tokens"),
    ],
    ids=["context", "vocabulary", "blocks"],
)
async def test_what_cannot_run_is_answered(
    redis: Redis, redis_url: str, keys: Keys, message: object, status: int, named: str
) -> None:
    reader = Reader(redis, keys)
    async with engine(redis, redis_url, blocks=64) as running:
        await submit(redis, keys, message)  # type: ignore[arg-type]
        [seen] = await reader.finished("bad")
        assert seen.finish is not None
        assert seen.finish.failure is not None
        assert (seen.finish.failure.status, seen.finish.failure.param) == (status, named)
        await no_backlog(redis, keys)
        await nothing_held(running)


async def test_a_request_past_its_deadline_is_not_begun(redis: Redis, redis_url: str, keys: Keys) -> None:
    message = generate("old", [20], 5)
    reader = Reader(redis, keys)
    late = msgspec.structs.replace(message, request=msgspec.structs.replace(message.request, deadline=1.0))
    async with engine(redis, redis_url):
        await submit(redis, keys, late)
        [seen] = await reader.finished("old")
        assert seen.finish is not None
        assert seen.finish.failure is not None
        assert seen.finish.failure.status == 504


async def test_a_request_that_runs_past_its_deadline_is_ended(redis: Redis, redis_url: str, keys: Keys) -> None:
    runner, reader = gated(), Reader(redis, keys)
    message = generate("slow", [20], 100)
    request = msgspec.structs.replace(message.request, deadline=time.time() + 3600)
    async with engine(redis, redis_url, runner) as running:
        await submit(redis, keys, msgspec.structs.replace(message, request=request))
        runner.allow(3)
        await reader.reached("slow", 3)
        await stuck(runner)
        held = running.service._consumer._requests["slow"]
        held.message = msgspec.structs.replace(message, request=msgspec.structs.replace(request, deadline=1.0))
        await eventually(lambda: asyncio.sleep(0, not running.service._mailbox._queue.empty()))
        runner.allow(2)
        [seen] = await reader.finished("slow")
        assert seen.finish is not None
        assert seen.finish.failure is not None
        assert seen.finish.failure.status == 504
        await no_backlog(redis, keys)


# ---------------------------------------------------------------------------------------------------- life and death


class FailingRunner(SumRunner):
    def launch(self, plan: Plan, meanwhile: Callable[[], None] = lambda: None) -> Computed:
        raise RuntimeError("the device is gone")


async def test_a_failed_step_ends_the_process_and_keeps_the_entry(redis: Redis, redis_url: str, keys: Keys) -> None:
    async with engine(redis, redis_url, FailingRunner(64, 4)) as running:
        await submit(redis, keys, generate("r", [20], 5))
        assert await asyncio.wait_for(running.task, PATIENCE_S) == 1
    assert await backlog(redis, keys) == 1
    reader = Reader(redis, keys)
    async with engine(redis, redis_url, name="engine-b"):
        [seen] = await reader.finished("r")
    assert seen.tokens == continuation([20], 5)
    assert seen.epoch == 2


async def test_a_failed_load_ends_the_process(redis: Redis, redis_url: str) -> None:
    def load() -> tuple[SumRunner, int]:
        raise ConfigError("no memory")

    settings = settings_for(redis_url)
    service = compose(settings, redis, FACTS, compile_grammar, load, EngineMetrics(CollectorRegistry()))
    assert await Life("engine", service, settings, redis).run() == MISCONFIGURED


async def test_draining_finishes_what_is_held_and_takes_no_more(redis: Redis, redis_url: str, keys: Keys) -> None:
    runner, reader = gated(), Reader(redis, keys)
    async with engine(redis, redis_url, runner, max_num_seqs=1) as running:
        names = ("runs", "waits", "waits-too")
        await submit(redis, keys, *(generate(name, [20], 4) for name in names))
        runner.allow(1)
        await reader.reached("runs", 1)
        await eventually(lambda: asyncio.sleep(0, running.held == 3))
        running.life.stop.set()
        await stuck(runner)
        await submit(redis, keys, generate("late", [20], 4))
        runner.allow(1000)
        assert await running.task == 0
        for seen in await reader.finished(*names):
            assert seen.tokens == continuation([20], 4)
    assert await backlog(redis, keys) == 1
    assert "late" not in reader.seen
    [group] = await redis.xinfo_groups(keys.stream(GENERATE))
    assert int(group["consumers"]) == 0, "a drained replica leaves nothing behind"


class LogprobRunner(SumRunner):
    def launch(self, plan: Plan, meanwhile: Callable[[], None] = lambda: None) -> Computed:
        sampled = super().launch(plan, meanwhile).read()
        return Computed([Sampled(s.token, TokenLogprob(-0.5, ((s.token, -0.5),))) for s in sampled])


async def test_logprobs_travel_with_their_tokens(redis: Redis, redis_url: str, keys: Keys) -> None:
    reader = Reader(redis, keys)
    async with engine(redis, redis_url, LogprobRunner(64, 4)):
        await submit(redis, keys, generate("r", [20], 3))
        await reader.finished("r")
    runs = [run for _, message in reader.messages for run in message.runs]
    assert all(run.logprobs == (TokenLogprob(-0.5, ((run.tokens[0], -0.5),)),) for run in runs)
