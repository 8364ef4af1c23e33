"""A Redis that takes no writes is told of once, and so is its end."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from machine import PATIENCE_S
from redis.asyncio import Redis
from redis.exceptions import ConnectionError, ReadOnlyError
from redis_refusals import REFUSALS

from cli import refusal
from cli.redis_server import RedisServer
from cli.refusal import Refusals
from shared.bus.client import command, connect
from shared.bus.keys import Keys

KEYS = Keys("test")


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """One whose disk can be full."""
    with (
        tempfile.TemporaryDirectory(prefix="millrace-") as name,
        RedisServer(Path(name), persistence=True, dies_with_us=True) as started,
    ):
        yield started


@pytest.fixture
async def redis(server: RedisServer) -> AsyncIterator[Redis]:
    client = connect(server.url)
    yield client
    await client.aclose()


@pytest.mark.system
@pytest.mark.parametrize(
    ("code", "words"),
    [("MISCONF", "MISCONF"), ("OOM", "command not allowed when used memory"), ("NOREPLICAS", "NOREPLICAS")],
)
async def test_a_refusal_and_its_end(server: RedisServer, redis: Redis, code: str, words: str) -> None:
    said: list[str] = []
    refusals = Refusals(said.append, Path("/data"))
    await refusals.look(redis, KEYS)
    assert (said, refusals.explain()) == ([], [])
    async with REFUSALS[code](server, redis):
        for _ in range(2):
            await refusals.look(redis, KEYS)
        [told] = said
        assert told.startswith(f"redis takes no writes, and requests stand still until it does: {words}")
        assert told.endswith(" (its data are in /data)")
        [why] = refusals.explain()
        assert f"as redis took no writes: {words}" in why
    async with asyncio.timeout(PATIENCE_S):
        while refusals.reason:  # it looks once a second whether its disk has room
            await refusals.look(redis, KEYS)
    await refusals.look(redis, KEYS)
    assert said[1:] == ["redis takes writes again"]
    assert refusals.explain() == []
    assert await redis.keys("test:*") == []


@pytest.mark.system
async def test_a_user_that_may_not_write_is_no_refusal(server: RedisServer, redis: Redis) -> None:
    said: list[str] = []
    await command(redis, "ACL", "SETUSER", "shy", "on", "nopass", "~*", "+@all", "-set")
    shy = connect(server.url.replace("unix://", "unix://shy:x@"))
    await Refusals(said.append, None).look(shy, KEYS)
    assert said == []
    await shy.aclose()
    await command(redis, "ACL", "DELUSER", "shy")


@pytest.mark.parametrize(
    ("answers", "looks"),
    [
        ("refused " * 8, 6),
        ("refused " + "silent " * 8 + "fine " + "refused " * 8, 16),  # it is started again, on a larger disk
        ("refused " * 3 + "silent " * 8 + "refused", 12),
        ("long-refused fine " + "refused " * 6, 7),  # as it was before the drain
        ("long-refused silent silent fine " + "refused " * 6, 9),
    ],
)
async def test_a_drain_is_in_vain_once_answers_say_so_for_long(
    monkeypatch: pytest.MonkeyPatch, answers: str, looks: int
) -> None:
    clock = count()  # a second a look that is answered, and a second a silent one
    said = answers.split()

    async def answer(*_: Any) -> str:
        word = said.pop(0)
        if word == "silent":
            next(clock)
            raise ConnectionError("refused")
        return "" if word == "fine" else str(ReadOnlyError("READONLY"))

    monkeypatch.setattr(refusal, "refusal", answer)
    monkeypatch.setattr(refusal, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    refusals = Refusals(lambda _: None, None)
    total = len(said)
    if said[0] == "long-refused":
        said[:1] = ["refused"] * 7
        for _ in range(7):
            await refusals.look(None, KEYS)  # type: ignore[arg-type]
        total -= 1
    await refusals.wait_until_lasting(None, KEYS, 5, 0)  # type: ignore[arg-type]
    assert total - len(said) == looks
