import asyncio
import itertools

import pytest
from machine import PATIENCE_MS
from redis.asyncio import Redis

from shared import metrics
from shared.bus import streams
from shared.bus.client import command
from shared.bus.keys import Keys
from shared.bus.streams import LOST_S, LogReader, LogWriter, reply, send
from shared.message_codec import from_entry
from shared.messages import Cancel, Message


def ids(messages: list[tuple[str, str, Message]]) -> list[tuple[str, str]]:
    return [(key, message.request_ids[0]) for key, _, message in messages if isinstance(message, Cancel)]


async def test_reads_several_logs_from_their_positions(redis: Redis) -> None:
    for key, name in itertools.product(("one", "two"), "123"):
        await send(redis, key, Cancel((name,)))
    seen = (await redis.xrange("two"))[0][0].decode()
    reader = LogReader(redis, {"one": "0", "two": seen, "absent": "0"})
    assert ids(await reader.read(2, 0)) == [("one", "1"), ("one", "2"), ("two", "2"), ("two", "3")]
    assert ids(await reader.read(2, 0)) == [("one", "3")]
    assert await reader.read(2, 0) == []
    assert reader.positions["two"] == (await redis.xrange("two"))[-1][0].decode()


async def test_dollar_means_from_the_first_read_on(redis: Redis) -> None:
    await send(redis, "one", Cancel(("old",)))
    reader = LogReader(redis, {"one": "$", "two": "$"})
    assert await reader.read(9, 0) == []
    await send(redis, "one", Cancel(("between reads",)))
    await send(redis, "two", Cancel(("first of all",)))
    assert ids(await reader.read(9, 0)) == [("one", "between reads"), ("two", "first of all")]


async def test_reader_waits(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_BLOCK_MS", PATIENCE_MS)
    reader = LogReader(redis, {"one": "0"})
    assert await reader.read(1, 1) == []
    reading = asyncio.create_task(reader.read(1, PATIENCE_MS))
    await send(redis, "one", Cancel(("r",)))
    assert ids(await reading) == [("one", "r")]


async def test_reader_of_nothing_waits_too(redis: Redis) -> None:
    assert await LogReader(redis, {}).read(1, 1) == []


async def test_unreadable_log_entries_are_told_and_passed(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    await send(redis, "log", Cancel(("before",)))
    for _ in range(30):
        await redis.xadd("log", {"v": "2", "m": "?"})
    await send(redis, "log", Cancel(("after",)))
    reader, read = LogReader(redis, {"log": "0"}), 0
    assert ids(await reader.read(9, 0)) == [("log", "before")]
    read = len(caplog.records)
    assert ids(await reader.read(9, 0)) == [("log", "after")], "it reads on behind a page that nobody can read"
    assert await reader.read(9, 0) == []
    assert (read, len(caplog.records)) == (1, 4), "a line a page"
    assert caplog.records[-1].entries == 4  # type: ignore[attr-defined]


async def test_send_trims(redis: Redis) -> None:
    for _ in range(300):
        entry_id = await send(redis, "log", Cancel(("r",)), max_len=10)
    assert 10 <= await redis.xlen("log") < 300
    assert (await redis.xrange("log"))[-1][0].decode() == entry_id


async def test_a_reply_to_a_reader_that_is_gone_leaves_nothing(redis: Redis) -> None:
    assert not await reply(redis, "log", Cancel(("r",)), 10)
    assert not await redis.exists("log")
    await send(redis, "log", Cancel(("first",)))
    assert await reply(redis, "log", Cancel(("r",)), 10)
    assert await redis.xlen("log") == 2


def hops(stream: str) -> float:
    """Entries whose way through the stream was timed."""
    return metrics.observed(metrics._hops.labels(stream))[1]


async def test_a_log_is_timed_for_the_stage_that_it_leads_to(redis: Redis) -> None:
    await send(redis, "log", Cancel(("a",)))
    await send(redis, "log", Cancel(("b",)))
    before = hops("a test's log")
    await LogReader(redis, {"log": "0"}).read(9, 0)
    assert hops("a test's log") == before
    await LogReader(redis, {"log": "0"}, hop="a test's log").read(9, 0)
    assert hops("a test's log") == before + 2


@pytest.mark.parametrize("away_s", [0.0, 3600.0])
async def test_what_a_server_may_have_lost_is_sent_again_before_what_is_new(
    redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch, away_s: float
) -> None:
    clock = [0.0]
    monkeypatch.setattr(streams, "monotonic", lambda: clock[0])
    log = LogWriter(redis, keys.tokens(0))
    for name in ("old", "a", "b"):
        await log.send(Cancel((name,)))
        clock[0] += LOST_S - 0.5
    clock[0] -= LOST_S - 0.5
    before = await redis.xlen(keys.tokens(0))
    await redis.delete(keys.tokens(0))  # it has lost all of them
    clock[0] += away_s
    await command(redis, "CLIENT", "KILL", "SKIPME", "yes")
    await log.send(Cancel(("c",)))
    await log.send(Cancel(("d",)))
    found = [from_entry(fields) for _, fields in await redis.xrange(keys.tokens(0))]
    assert (before, found) == (3, [Cancel((name,)) for name in ("a", "b", "c", "d")])
