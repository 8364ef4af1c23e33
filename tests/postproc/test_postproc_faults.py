"""Gaps, damaged bytes, and a Redis that forgets or does not answer."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from machine import PATIENCE_S
from postproc_stand_in import Shown, request
from postproc_system import TOKENS, System, whole
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis_refusals import configured

from shared.bus import retry as patience
from shared.bus.keys import Keys
from shared.bus.leases import Fence
from shared.bus.records import TOKEN_BYTES, Records
from shared.bus.streams import LogReader
from shared.message_versions import VERSION
from shared.messages import (
    Cancel,
    Finish,
    TokenLogprob,
    TokenRun,
)


async def test_a_start_waits_for_a_redis_that_takes_no_writes(system: System, caplog: pytest.LogCaptureFixture) -> None:
    worker = await system.worker()
    refusal = configured("min-replicas-to-write", "1", "0")
    async with asyncio.timeout(PATIENCE_S), refusal(None, system.redis):  # type: ignore[arg-type]
        starting = asyncio.create_task(worker.startup())
        while "Redis is unavailable; retrying" not in caplog.text:
            assert not starting.done()
            await asyncio.sleep(0)
    async with asyncio.timeout(PATIENCE_S):
        await starting


async def test_a_gap_ends_the_request_in_an_error(system: System) -> None:
    await system.submit(request(), request("r2"))
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1", "r2")
    await system.generate("r1", 0, 5)
    await system.generate("r1", 6, 9)
    await system.generate("r2", 0, 9)
    await worker.run_turn()
    deltas = {delta.request_id: delta for delta in await system.deltas()}
    failure = deltas["r1"].failure
    assert failure is not None
    assert (failure.status, deltas["r1"].seq) == (500, 6)
    assert deltas["r2"].failure is None
    assert (await system.records.get(["r1"]))["r1"].cancelled
    await system.finish("r1", 9, Finish("cancelled"))
    await worker.run_turn()
    assert await system.deltas() == []
    assert await system.left() == {"test:request:r2", "test:journal:r2"}


async def test_a_finish_with_a_gap_is_an_error_and_an_error_is_one_anyway(system: System) -> None:
    await system.submit(request(), request("r2"))
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1")
    await system.finish("r1", 5)
    await system.step(TokenRun("r2", 0, 0, (), finish=Finish("error")))  # given up before any engine began
    await worker.run_turn()
    assert [delta.failure is not None and delta.failure.status for delta in await system.deltas()] == [500, 500]
    assert await system.left() == set()


async def test_a_request_without_a_record_is_ignored(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    get = Records.get

    async def counting(records: Records, request_ids: Sequence[str]) -> Any:
        asked.append(list(request_ids))
        return await get(records, request_ids)

    monkeypatch.setattr(Records, "get", counting)
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1")
    await system.generate("r1", 0, 5)
    await worker.run_turn()
    await system.generate("r1", 5, 20)
    await worker.run_turn()
    assert asked == [["r1"]]
    await system.finish("r1", 20)
    await worker.run_turn()
    assert worker.load()["open"] == 0
    assert await system.left() == set()
    assert await system.deltas() == []


async def test_a_request_that_cannot_be_processed_hurts_nobody_else(
    system: System, caplog: pytest.LogCaptureFixture
) -> None:
    await system.submit(request("bad", stop=("",)), request())
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("bad", "r1")
    for index in range(10):
        await system.step(*(TokenRun(one, 1, index, (TOKENS[index],)) for one in ("bad", "r1")))
    # One whose log-probabilities do not match its tokens.
    await system.submit(request("odd", logprobs=True))
    await system.begin("odd")
    await system.step(TokenRun("odd", 1, 0, tuple(TOKENS[:2]), (TokenLogprob(-1.0),)))
    await worker.run_turn()
    deltas = {delta.request_id: delta for delta in await system.deltas()}
    assert [deltas[one].failure is not None for one in ("bad", "odd", "r1")] == [True, True, False]
    assert deltas["r1"].seq == 10
    assert (await system.records.get(["bad"]))["bad"].cancelled
    assert {record.request_id for record in caplog.records if "cannot be" in record.message} == {"bad", "odd"}  # type: ignore[attr-defined]
    for one in ("bad", "odd", "r1"):
        await system.finish(one, 10 if one != "odd" else 2, Finish("cancelled"))
    await worker.run_turn()
    assert await system.left() == set()


async def test_an_unreadable_entry_ends_only_the_requests_in_it(
    system: System, caplog: pytest.LogCaptureFixture
) -> None:
    await system.submit(request(), request("r2"))
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1", "r2")
    await system.generate("r1", 0, 3)
    await worker.run_turn()
    await system.redis.xadd(system.keys.tokens(0), {"v": "9", "m": "r1's token 3"})
    await worker.run_turn()
    assert "skipped" in caplog.text
    await system.generate("r1", 4, 6)
    await system.generate("r2", 0, 6)
    await worker.run_turn()
    failed = {delta.request_id: delta.failure is not None for delta in await system.deltas()}
    assert failed == {"r1": True, "r2": False}


async def test_tokens_are_journaled_at_once_beside_a_replica_that_reads_an_older_version(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could not read them, and may be the next owner of the shard."""
    current = await system.started(request())
    await system.generate("r1", 0, 3)
    await current.run_turn()
    assert await system.redis.xlen(system.keys.tokens(0))
    monkeypatch.setattr("services.postproc.worker.VERSION", VERSION + 1)
    await system.generate("r1", 3, 5)
    await current.run_turn()
    assert await system.redis.xlen(system.keys.tokens(0)) == 0
    assert await system.redis.strlen(system.keys.journal("r1")) == 5 * TOKEN_BYTES


@pytest.mark.parametrize("damaged", ["request", "journal", "type of journal", "logprobs"])
async def test_a_damaged_request_is_told_and_hurts_nobody_else(system: System, keys: Keys, damaged: str) -> None:
    """A worker that takes over the shard meets it."""
    await system.submit(request("bad", logprobs=True), request("good"))
    before = await system.worker()
    await before.run_turn()
    await system.begin("bad", "good")
    await system.generate("bad", 0, 20)
    await before.run_turn()
    await before.drain()
    await system.die("p1")
    match damaged:
        case "request":
            await system.redis.hset(keys.request("bad"), "request", b"\xc1")
        case "journal":
            await system.redis.append(keys.journal("bad"), b"x")
        case "type of journal":
            await system.redis.delete(keys.journal("bad"))
            await system.redis.sadd(keys.journal("bad"), "oops")  # type: ignore[misc]
        case "logprobs":
            await system.redis.lset(keys.logprobs("bad"), 0, b"\xc1")  # type: ignore[misc]
    worker = await system.worker("p2")
    await worker.run_turn()
    await system.generate("bad", 20, 22)
    await system.generate("good", 0, len(TOKENS))
    await system.finish("good", len(TOKENS))
    while await system.left():
        await worker.run_turn()
    told = [delta.failure for delta in await system.deltas() if delta.request_id == "bad" and delta.failure]
    assert [failure.code for failure in told] == ["unreadable_state"]
    cancels = LogReader(system.redis, {keys.control(): "0"})
    assert [message for _, _, message in await cancels.read(9, 0)] == [Cancel(("bad",))], "its engine need not go on"


async def test_a_redis_that_forgot_everything_is_served_anew(system: System) -> None:
    await system.submit(request("lost"))
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("lost")
    await system.generate("lost", 0, 10)
    await worker.run_turn()
    await system.show()
    await system.redis.flushall()
    await system.leases["p1"].renew("ready")
    await system.listen("g1")
    await system.generate("lost", 10, 20)  # its engine knows nothing of it
    await system.submit(request())
    await system.begin("r1")
    await system.generate("r1", 0, len(TOKENS))
    await system.finish("r1", len(TOKENS))
    while not (await system.show()).get("r1", Shown()).done:
        await worker.run_turn()
    assert system.shown["r1"] == whole()
    assert await system.left() == set()
    while worker.load()["open"]:
        await worker.run_turn()
    [delta] = await system.deltas()
    assert (delta.request_id, delta.failure is not None) == ("lost", True)
    assert worker.load()["shards"] == 1


async def test_a_request_that_redis_forgot_ends_in_an_error(system: System) -> None:
    now = 0.0
    await system.submit(request(), request("r2"))
    worker = await system.worker(clock=lambda: now)
    await worker.run_turn()
    await system.begin("r1", "r2")
    await system.generate("r1", 0, 10)
    await system.generate("r2", 0, 10)
    await worker.run_turn()
    shown = (await system.show())["r1"].seq
    await system.redis.delete(system.keys.request("r1"))
    for _ in range(2):
        assert worker.load()["open"] == 2
        now += 60
        await worker.run_turn()
    assert worker.load()["open"] == 1
    [delta] = await system.deltas()
    assert delta.failure is not None
    assert (delta.request_id, delta.failure.status, delta.start) == ("r1", 503, shown)
    assert await system.left() == {"test:request:r2", "test:journal:r2"}, "a journal without its record"


async def test_while_redis_does_not_answer_the_worker_waits_and_loses_nothing(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write fails once on its way, and once with its reply on the way back."""
    failures = iter([1, 2] * 100)
    run = Fence.run

    async def broken(fence: Fence, script: Any, keys: Any, args: Any) -> Any:
        match next(failures, 0):
            case 1:
                raise RedisConnectionError("down")
            case 2:
                await run(fence, script, keys, args)
                raise RedisTimeoutError("slow")
        return await run(fence, script, keys, args)

    monkeypatch.setattr(Fence, "run", broken)
    monkeypatch.setattr(patience, "FIRST_DELAY_S", 0.0)
    await system.submit(request(), request("r2", stop=("on; 你",), retain_s=60.0))
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1", "r2")
    for first in range(0, len(TOKENS), 40):
        for one in ("r1", "r2"):
            await system.generate(one, first, min(first + 40, len(TOKENS)))
        await worker.run_turn()
    await system.finish("r1", len(TOKENS))
    await system.finish("r2", len(TOKENS), Finish("cancelled"))
    await worker.run_turn()
    shown = await system.show()
    assert shown["r1"] == whole()
    assert shown["r2"].finish_reason == "stop"
    assert await system.records.read_journal("r2") == TOKENS
    assert await system.left() == {"test:request:r2", "test:journal:r2"}
