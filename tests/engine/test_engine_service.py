"""The engine service on a real Redis: answers, room, cancellation, resumption, poison, failure."""

import asyncio
import json
from collections.abc import Callable
from collections.abc import Callable

import msgspec
import pytest
from engine_bench import GatedRunner, Reader, Seen, engine, eventually, settings_for, submit
from engine_cases import CONFIG, EOS, FACTS, PATCH, VOCAB, SumRunner, continuation, generate
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from services.engine.metrics import EngineMetrics
from services.engine.sampler import Sampled
from services.engine.scheduler import Plan
from services.engine.service import EngineService
from shared.blobs import Blobs
from shared.errors import ConfigError
from shared.keys import GENERATE, Keys
from shared.leases import Lease
from shared.messages import Cancel, Finish, MediaSpan, TokenLogprob, TokenRun, Tokens
from shared.records import Records
from shared.service import MISCONFIGURED, Life
from shared.streams import WorkStream, send


async def backlog(redis: Redis, keys: Keys) -> int:
    return int(await redis.xlen(keys.stream(GENERATE)))


async def no_backlog(redis: Redis, keys: Keys) -> None:
    async def empty() -> bool:
        return await backlog(redis, keys) == 0

    await eventually(empty)


def gated(blocks: int = 64) -> GatedRunner:
    return GatedRunner(SumRunner(blocks, 4))


async def stuck(runner: GatedRunner) -> None:
    """Until the model's thread waits for permission to run a step."""
    assert await asyncio.to_thread(runner.waiting.wait, 20)


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
        assert running.held == 0
        assert running.metric("generation_tokens_total") == sum(range(5, 11))
        assert running.metric("prompt_tokens_total") == 18
        assert running.metric("num_requests_running") == 0
        assert running.metric("gpu_cache_usage_perc") == 0


async def test_a_full_engine_leaves_the_rest_to_others(redis: Redis, redis_url: str, keys: Keys) -> None:
    runner, reader = gated(), Reader(redis, keys)
    names = [f"r{i}" for i in range(8)]
    async with engine(redis, redis_url, runner, max_num_seqs=2) as running:
        await submit(redis, keys, *(generate(name, [20, 30], 3) for name in names))
        await stuck(runner)

        async def taken() -> bool:
            [group] = await redis.xinfo_groups(keys.stream(GENERATE))
            return int(group["pending"]) == 4

        await eventually(taken)  # two that run and two that wait
        assert running.held == 4
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
        runner.allow(1000)
        runs, waits = await reader.finished("runs", "waits")
        assert runs.finish == waits.finish == Finish("cancelled")
        assert len(runs.tokens) < 50
        assert waits.tokens == []
        await no_backlog(redis, keys)
        assert running.held == 0
        await submit(redis, keys, generate("after", [22], 2))
        await reader.finished("after")
        assert running.metric("gpu_cache_usage_perc") == 0


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
        await asyncio.wait_for(loading.wait(), 20)
        await Records(redis, keys).cancel(["r"])
        await eventually(lambda: asyncio.sleep(0, running.service._inbox._requests["r"].cancelled))
        go_on.set()
        [seen] = await reader.finished("r")
        assert seen.finish == Finish("cancelled")
        await no_backlog(redis, keys)
        assert running.held == 0
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
    await records.claim("r")
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
        async with engine(redis, redis_url, name="engine-b", lease_ms=200):
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
    records = Records(redis, keys)
    await submit(redis, keys, generate("r", [20], 3))
    await records.claim("r")
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


async def test_an_entry_that_kills_engines_is_answered_with_an_error(redis: Redis, redis_url: str, keys: Keys) -> None:
    await submit(redis, keys, generate("bad", [20], 6))
    for name in ("dead-1", "dead-2"):
        lease = Lease(redis, keys, "engine", name, 60_000)
        await lease.renew("ready")
        work = WorkStream(redis, keys, GENERATE, "engine", name, 2)
        await work.join()
        taken = [*await work.take(1, 0), *(await work.claim_abandoned(1))[0]]
        assert len(taken) == 1
        await lease.release()
    reader = Reader(redis, keys)
    async with engine(redis, redis_url, max_deliveries=2) as running:
        [seen] = await reader.finished("bad")
        assert seen.finish is not None
        assert seen.finish.failure is not None
        assert (seen.finish.reason, seen.finish.failure.status) == ("error", 500)
        await no_backlog(redis, keys)
        assert running.held == 0
    assert int(await redis.xlen(keys.quarantine(GENERATE))) == 1


# ---------------------------------------------------------------------------------------------------- refusals


SPAN = MediaSpan("image", "cat", 1, 6, (1, 4, 6))
META = {"grid": [1, 4, 6], "rows": 6, "hidden": CONFIG.hidden_size, "dtype": "float32"}
ROWS = bytes(6 * CONFIG.hidden_size * 4)


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
        assert running.held == 0


async def test_media_that_are_there_are_given_to_the_runner(redis: Redis, redis_url: str, keys: Keys) -> None:
    await Blobs(redis, keys, 60, 1 << 20).put("embeds", "cat", ROWS, json.dumps(META).encode())
    runner, reader = SumRunner(64, 4), Reader(redis, keys)
    async with engine(redis, redis_url, runner):
        await submit(redis, keys, generate("r", [PATCH + 1, *[PATCH] * 6, PATCH + 2], 3, spans=(SPAN,)))
        [seen] = await reader.finished("r")
    assert seen.begins[0].image_tokens == 6
    assert [e.data for e in runner.plans[0].chunks[0].sequence.embeds] == [ROWS]


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
        assert running.held == 0


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


# ---------------------------------------------------------------------------------------------------- life and death


class FailingRunner:
    def execute(self, plan: Plan, meanwhile: Callable[[], None] = lambda: None) -> list[Sampled]:
        raise RuntimeError("the device is gone")


async def test_a_failed_step_ends_the_process_and_keeps_the_entry(redis: Redis, redis_url: str, keys: Keys) -> None:
    async with engine(redis, redis_url, FailingRunner()) as running:
        await submit(redis, keys, generate("r", [20], 5))
        assert await asyncio.wait_for(running.task, 20) == 1
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
    service = EngineService(settings, redis, FACTS, load, EngineMetrics(CollectorRegistry()))
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
    def execute(self, plan: Plan, meanwhile: Callable[[], None] = lambda: None) -> list[Sampled]:
        return [Sampled(s.token, TokenLogprob(-0.5, ((s.token, -0.5),))) for s in super().execute(plan, meanwhile)]


async def test_logprobs_travel_with_their_tokens(redis: Redis, redis_url: str, keys: Keys) -> None:
    reader = Reader(redis, keys)
    async with engine(redis, redis_url, LogprobRunner(64, 4)):
        await submit(redis, keys, generate("r", [20], 3))
        await reader.finished("r")
    runs = [run for _, message in reader.messages for run in message.runs]
    assert all(run.logprobs == (TokenLogprob(-0.5, ((run.tokens[0], -0.5),)),) for run in runs)
