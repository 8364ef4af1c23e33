"""Shards that change their owner, at any moment of a turn."""

import asyncio
from typing import Any

import pytest
from machine import PATIENCE_S
from postproc_stand_in import EOS, request
from postproc_system import STOP, TOKENS, System, held, whole

from services.postproc.worker import Worker
from shared.bus.streams import LogReader
from shared.messages import (
    Begin,
    Finish,
    TokenRun,
)

WRITES = ("deltas", "cancel", "journal", "retain", "delete", "trim")


async def end_two_of_three(system: System, worker: Worker) -> None:
    """Let the worker know three requests, and leave it their tokens and the ends of two to read."""
    await worker.run_turn()
    await system.begin("r1", "r2", "r3")
    for one in ("r1", "r2", "r3"):
        await system.generate(one, 0, len(TOKENS))
    await system.finish("r1", len(TOKENS))
    await system.finish("r2", len(TOKENS))


def stop_before(worker: Worker, what: str, monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """Let the worker stop right before a write; return the event that says it has, and the one that lets it go on."""
    write = worker._outbox._write
    stopped, go_on = asyncio.Event(), asyncio.Event()

    async def stopping(point: str, attempt: Any) -> Any:
        if point == what:
            stopped.set()
            await go_on.wait()
        return await write(point, attempt)

    monkeypatch.setattr(worker._outbox, "_write", stopping)
    return stopped, go_on


@pytest.mark.parametrize("what", WRITES)
async def test_a_paused_owner_that_wakes_writes_nothing(
    system: System, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """It stops right before a write, another takes over and ends everything, and then it goes on."""
    await system.submit(request(retain_s=60.0), request("r2"), request("r3", "g3", stop=("cat",)))
    paused = await system.worker("p1", trim_every=1)
    await end_two_of_three(system, paused)
    await system.attach("r3", "g2", 0)
    stopped, go_on = stop_before(paused, what, monkeypatch)
    task = asyncio.create_task(paused.run_turn())
    await stopped.wait()
    await system.die("p1")
    other = await system.worker("p2")
    await other.run_turn()
    await other.run_turn()
    before = {key: await system.redis.dump(key) for key in await system.redis.keys("*")}
    go_on.set()
    await task
    assert {key: await system.redis.dump(key) for key in await system.redis.keys("*")} == before
    assert held(paused) == {"open": 0.0, "shards": 0.0}
    await system.show("g1")
    assert system.shown["r1"] == system.shown["r2"] == whole()


@pytest.mark.parametrize("what", WRITES)
async def test_a_turn_that_is_running_ends_before_the_shards_go(
    system: System, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The process is told to end right before a write. What it has read by then is in no stream any more."""
    await system.submit(request(retain_s=60.0), request("r2"), request("r3", stop=("cat",)))
    worker = await system.worker("p1", trim_every=1)
    await end_two_of_three(system, worker)
    stopped, go_on = stop_before(worker, what, monkeypatch)
    serving = asyncio.create_task(worker.serve())
    async with asyncio.timeout(PATIENCE_S):
        await stopped.wait()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    go_on.set()
    await worker.drain()
    await system.die("p1")
    other = await system.worker("p2")
    await other.run_turn()
    await system.finish("r3", len(TOKENS), Finish("cancelled"))
    await other.run_turn()
    assert held(other) == {"open": 0.0, "shards": 1.0}
    shown = await system.show()
    assert shown["r1"] == shown["r2"] == whole()
    assert shown["r3"].finish_reason == "stop"
    assert await system.left() == {"test:request:r1", "test:journal:r1"}
    assert 0 < await system.redis.ttl("test:request:r1") <= 60


async def test_replicas_share_shards_and_hand_them_over(system: System) -> None:
    now = 0.0
    await system.submit(request("r0", shard=0), request("r1", shard=1))
    first = await system.worker("p1", clock=lambda: now, shards=2)
    await first.run_turn()
    assert first.load()["shards"] == 2
    for shard in (0, 1):
        await system.step(begins=[Begin(f"r{shard}", 1, 0, 7, 3, 2, 1)], shard=shard)
        await system.step(TokenRun(f"r{shard}", 1, 0, tuple(TOKENS[:5])), shard=shard)
    await first.run_turn()
    assert held(first) == {"open": 2.0, "shards": 2.0}

    second = await system.worker("p2", clock=lambda: now, shards=2)
    await second.run_turn()
    assert second.load()["shards"] == 0
    now += 1
    await first.run_turn()
    await second.run_turn()
    assert (held(first), held(second)) == ({"open": 1.0, "shards": 1.0}, {"open": 1.0, "shards": 1.0})

    await first.drain()
    assert held(first) == {"open": 0.0, "shards": 0.0}
    await system.leases["p1"].renew("draining")
    now += 1
    await second.run_turn()
    for shard in (0, 1):
        await system.step(TokenRun(f"r{shard}", 1, 5, (*TOKENS[5:], EOS), finish=STOP), shard=shard)
    await second.run_turn()
    while second.load()["open"]:
        await second.run_turn()
    await system.show()
    assert system.shown == {"r0": whole(), "r1": whole()}
    assert await system.left() == set()


async def test_a_worker_that_was_paused_sends_nothing_for_a_shard_it_lost(system: System) -> None:
    now = 0.0
    paused = await system.started(request(), clock=lambda: now)
    await system.generate("r1", 0, 10)
    await paused.run_turn()
    await system.die("p1")
    other = await system.worker("p2")
    await other.run_turn()
    before = await system.redis.xlen(system.keys.deltas("g1"))
    await system.generate("r1", 10, 20)
    now += 60
    await system.leases["p1"].renew("ready")
    await paused.run_turn()
    assert held(paused) == {"open": 0.0, "shards": 0.0}
    assert await system.redis.xlen(system.keys.deltas("g1")) == before
    await other.run_turn()
    assert (await system.show())["r1"].seq == 20


async def test_a_pause_while_reading_is_noticed_before_sending(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    paused = await system.started(request(), clock=lambda: now)
    await system.generate("r1", 0, 10)
    read = LogReader.read

    async def slow(reader: LogReader, count: int, block_ms: int) -> Any:
        nonlocal now
        found = await read(reader, count, block_ms)
        await system.die("p1")
        monkeypatch.undo()
        other = await system.worker("p2")
        await other.run_turn()
        now += 60
        return found

    monkeypatch.setattr(LogReader, "read", slow)
    await paused.run_turn()
    await paused.run_turn()
    assert held(paused) == {"open": 0.0, "shards": 0.0}
    numbers = [delta.seq for delta in await system.deltas()]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 10


async def test_a_shard_lost_and_regained_while_reading_starts_over(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    paused = await system.started(request(), clock=lambda: now, journal_every=100)
    await system.generate("r1", 0, 7)
    await paused.run_turn()
    await system.generate("r1", 7, 20)
    read = LogReader.read

    async def slow(reader: LogReader, count: int, block_ms: int) -> Any:
        nonlocal now
        found = await read(reader, count, block_ms)
        monkeypatch.undo()
        await system.die("p1")
        other = await system.worker("p2", journal_every=100)
        await other.run_turn()
        await other.drain()
        await system.die("p2")
        now += 60
        return found

    monkeypatch.setattr(LogReader, "read", slow)
    await paused.run_turn()
    await system.finish("r1", 20, Finish("length"))
    await paused.run_turn()
    assert (await system.show())["r1"] == whole("length", 20)
