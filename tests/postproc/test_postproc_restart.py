"""A worker that dies, and the one that goes on with its requests: the journal and the stream."""

import pytest
from postproc_stand_in import EOS, request
from postproc_system import TOKENS, System, whole

from shared.messages import (
    Begin,
    Finish,
    TokenRun,
    pack_ids,
)


async def test_the_journal_holds_what_was_sent_and_the_stream_is_trimmed(system: System) -> None:
    await system.submit(request(), request("r2"))
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1", "r2")
    for repeat in range(len(TOKENS)):
        await system.step(TokenRun("r1", 1, repeat, (TOKENS[repeat],)))
        if repeat < 3:  # then it stands still, and must not hold the stream
            await system.step(TokenRun("r2", 1, repeat, (TOKENS[repeat],)))
        if repeat % 10 == 0:
            await worker.run_turn()
    await worker.run_turn()
    journal = await system.records.read_journal("r1")
    assert journal == TOKENS[: len(journal)]
    assert len(TOKENS) - len(journal) < 8
    assert await system.records.read_journal("r2") == TOKENS[:3]
    assert await system.redis.xlen(system.keys.tokens(0)) < 150 < len(TOKENS)
    assert system.counted("p1", "journal_writes_total") >= len(TOKENS) / 16

    successor = await system.worker("p2")
    await system.die("p1")
    await successor.run_turn()
    await system.finish("r1", len(TOKENS))
    await system.finish("r2", 3)
    while successor.load()["open"]:
        await successor.run_turn()
    shown = await system.show()
    assert shown["r1"] == whole()
    assert shown["r2"] == whole(count=3)
    assert await system.left() == set()


@pytest.mark.parametrize("crash_at", ["_send", "_end", "_journal", "_trim", None])
@pytest.mark.parametrize("after", [1, 40, 170, 300])
async def test_a_restart_shows_nothing_twice_and_loses_nothing(
    system: System, monkeypatch: pytest.MonkeyPatch, after: int, crash_at: str | None
) -> None:
    """The first worker dies in the turn that has token `after`, before the given part of it or after all of it."""
    await system.submit(request(), request("r2", stop=("on; 你",)), request("gone"))
    first = await system.worker("p1", read_count=10)
    await first.run_turn()
    await system.begin("r1", "r2", "gone")
    for index, token in enumerate(TOKENS[:after]):
        await system.step(*(TokenRun(one, 1, index, (token,)) for one in ("r1", "r2")))
        if index % 7 == 0 and index != after - 1:
            await first.run_turn()
    await system.finish("gone", 0, Finish("length"))
    if crash_at:

        async def crash(*_: object) -> None:
            raise RuntimeError("killed")

        monkeypatch.setattr(first, crash_at, crash)
        with pytest.raises(RuntimeError, match="killed"):
            await first.run_turn()
    else:
        await first.run_turn()
    await system.show()
    await system.die("p1")

    second = await system.worker("p2", read_count=10)
    for index, token in enumerate(TOKENS[after:], start=after):
        await system.step(*(TokenRun(one, 1, index, (token,)) for one in ("r1", "r2")))
        if index % 20 == 0:
            await second.run_turn()
    await system.finish("r1", len(TOKENS))
    await system.finish("r2", len(TOKENS), Finish("cancelled"))
    await second.run_turn()
    while second.load()["open"]:
        await second.run_turn()
    shown = await system.show()
    assert shown["r1"] == whole()
    assert shown["r2"].content == whole().content.partition("on; 你")[0]
    assert shown["r2"].finish_reason == "stop"
    assert shown["gone"].finish_reason == "length"
    assert await system.left() == set()


@pytest.mark.parametrize("trimmed", [False, True])
async def test_a_restart_after_the_engine_was_replaced(system: System, trimmed: bool) -> None:
    """The record knows of the newer engine, whether the stream still has the older one's steps or not even its own."""
    first = await system.started(request(), trim_every=1000)
    await system.generate("r1", 0, 50)
    await system.begin("r1", epoch=2, index=50)
    await system.generate("r1", 50, 100, epoch=2)
    await first.run_turn()
    record = (await system.records.get(["r1"]))["r1"]
    assert record.begin == Begin("r1", 2, 0, 7, 3, 2, 1)
    assert await system.redis.xlen(system.keys.tokens(0)) == 102
    if trimmed:
        await system.redis.xtrim(system.keys.tokens(0), maxlen=0, approximate=False)
    await system.die("p1")
    second = await system.worker("p2")
    await system.step(TokenRun("r1", 1, 100, (EOS,), finish=Finish("error")))  # the old one wakes up
    await system.generate("r1", 100, len(TOKENS), epoch=2)
    await system.finish("r1", len(TOKENS), epoch=2)
    await second.run_turn()
    while second.load()["open"]:
        await second.run_turn()
    assert (await system.show())["r1"] == whole()


async def test_a_journal_that_redis_lost_is_written_again(system: System) -> None:
    worker = await system.started(request())
    await system.generate("r1", 0, 16)
    await worker.run_turn()
    await system.redis.set(system.keys.journal("r1"), pack_ids(TOKENS[:5]))
    await system.generate("r1", 16, 24)
    await worker.run_turn()
    assert await system.records.read_journal("r1") == TOKENS[:24]
