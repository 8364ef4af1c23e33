"""What an engine records of a request, by how far it came."""

import asyncio
import time
from typing import Any

import msgspec
from collector import Received, traced
from engine_bench import GatedRunner, Reader, engine, eventually, submit
from engine_cases import SumRunner, generate
from redis.asyncio import Redis

from shared.keys import Keys
from shared.messages import Generate
from shared.records import Records

PARENT = f"{2:016x}"


def asked(request_id: str, *prompt: int, max_tokens: int = 4, sampled: bool = True) -> Generate:
    """In a trace that is named after its first token."""
    message = generate(request_id, prompt, max_tokens)
    trace = f"00-{prompt[0]:032x}-{PARENT}-0{int(sampled)}"
    return msgspec.structs.replace(message, request=msgspec.structs.replace(message.request, trace=trace))


def named(spans: list[Received], request_id: str) -> dict[str, dict[str, Any]]:
    """Attributes by the span's name."""
    mine = [span for span in spans if span.attributes["millrace.request_id"] == request_id]
    assert {span.parent for span in mine} <= {PARENT}
    return {span.name: span.attributes for span in mine}


async def test_one_that_ends_has_three_phases_one_after_the_other(redis: Redis, redis_url: str, keys: Keys) -> None:
    """The prompt takes three steps, and the rest of it no more than a token in the last."""
    with traced("engine") as (tracing, got):
        async with engine(redis, redis_url, tracing=tracing, max_num_batched_tokens=4):
            await submit(redis, keys, asked("r", *range(20, 29), max_tokens=5))
            await submit(redis, keys, asked("unwatched", *range(30, 39), sampled=False), generate("untraced", [40, 41]))
            await Reader(redis, keys).finished("r", "unwatched", "untraced")
    queue, prefill, decode = got.spans()
    assert [queue.name, prefill.name, decode.name] == ["queue", "prefill", "decode"]
    assert (queue.end, prefill.end) == (prefill.start, decode.start)
    assert queue.start < queue.end < prefill.end < decode.end
    about = {"millrace.request_id": "r", "millrace.epoch": 1, "millrace.attempt": 1}
    counts = {"gen_ai.usage.input_tokens": 9, "gen_ai.usage.cache_read.input_tokens": 0, "millrace.resumed_tokens": 0}
    end = {"gen_ai.usage.output_tokens": 5, "gen_ai.response.finish_reasons": ["length"], "millrace.preemptions": 0}
    assert queue.attributes == about
    assert prefill.attributes == about | counts
    assert decode.attributes == about | end


async def test_a_prompt_that_is_known_says_so(redis: Redis, redis_url: str, keys: Keys) -> None:
    with traced("engine") as (tracing, got):
        async with engine(redis, redis_url, tracing=tracing):
            reader = Reader(redis, keys)
            for request_id in ("first", "again"):
                await submit(redis, keys, asked(request_id, *range(20, 29)))
                await reader.finished(request_id)
    assert named(got.spans(), "again")["prefill"]["gen_ai.usage.cache_read.input_tokens"] == 8


async def test_preemptions_are_counted(redis: Redis, redis_url: str, keys: Keys) -> None:
    """Room for one answer and a half."""
    with traced("engine") as (tracing, got):
        async with engine(redis, redis_url, blocks=12, tracing=tracing) as running:
            await submit(redis, keys, asked("a", 20, max_tokens=30), asked("b", 21, max_tokens=30))
            await Reader(redis, keys).finished("a", "b")
            counted = running.metric("num_preemptions_total")
    assert counted > 0
    spans = got.spans()
    assert len(spans) == 6  # a phase that is repeated is still one
    assert sum(named(spans, each)["decode"]["millrace.preemptions"] for each in ("a", "b")) == counted


async def test_cancelled_while_it_runs_and_while_it_waits(redis: Redis, redis_url: str, keys: Keys) -> None:
    runner, reader = GatedRunner(SumRunner(64, 4)), Reader(redis, keys)
    with traced("engine") as (tracing, got):
        async with engine(redis, redis_url, runner, tracing=tracing, max_num_seqs=1) as running:
            await submit(redis, keys, asked("runs", 20, max_tokens=50), asked("waits", 21, max_tokens=50))
            runner.allow(3)
            await reader.reached("runs", 3)
            await eventually(lambda: asyncio.sleep(0, running.held == 2))
            await Records(redis, keys).cancel(["runs", "waits"])
            await running.heard_of_cancelling("runs", "waits")
            runner.allow(1000)
            await reader.finished("runs", "waits")
    runs, waits = named(got.spans(), "runs"), named(got.spans(), "waits")
    assert list(runs) == ["queue", "prefill", "decode"]
    assert runs["decode"]["gen_ai.response.finish_reasons"] == ["cancelled"]
    assert list(waits) == ["queue"]
    assert waits["queue"]["gen_ai.response.finish_reasons"] == ["cancelled"]
    assert not any(span.failed for span in got.spans())


async def test_what_is_lost_to_another_is_an_error_here(redis: Redis, redis_url: str, keys: Keys) -> None:
    runner, reader = GatedRunner(SumRunner(64, 4)), Reader(redis, keys)
    with traced("engine") as (tracing, got):
        async with engine(redis, redis_url, runner, tracing=tracing, lease_ms=100) as running:
            await submit(redis, keys, asked("r", 20, max_tokens=50))
            runner.allow(3)
            await reader.reached("r", 3)
            await redis.flushall()
            await eventually(lambda: asyncio.sleep(0, running.held == 0))
    decode = named(got.spans(), "r")["decode"]
    assert decode["error.type"] == "lost"
    assert "gen_ai.usage.output_tokens" not in decode


async def test_a_resumed_one_waits_since_it_was_taken(redis: Redis, redis_url: str, keys: Keys) -> None:
    """And not since it came into the stream, which was the time of the engine before."""
    runner, reader = GatedRunner(SumRunner(64, 4)), Reader(redis, keys)
    told = {"lease_ms": 200, "drain_s": 0.05}
    async with engine(redis, redis_url, runner, **told) as first:
        await submit(redis, keys, asked("r", 20, max_tokens=9))
        runner.allow(4)
        await reader.reached("r", 4)
        first.task.cancel()
        await asyncio.gather(first.task, return_exceptions=True)
    before = time.time_ns()
    with traced("engine") as (tracing, got):
        async with engine(redis, redis_url, tracing=tracing, name="engine-b", **told):
            await reader.finished("r")
    spans = named(got.spans(), "r")
    assert {attributes["millrace.epoch"] for attributes in spans.values()} == {2}
    assert spans["prefill"]["millrace.resumed_tokens"] >= 4
    assert spans["decode"]["gen_ai.usage.output_tokens"] == 9
    assert got.spans()[0].start >= before
