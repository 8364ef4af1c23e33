"""Each row of the table, against a real Redis that says it."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from machine import PATIENCE_MS
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError
from redis_refusals import REFUSALS, demoted

from cli.redis_server import RedisServer
from shared.bus import client as redis_client
from shared.bus import retry
from shared.bus.client import command, connect
from shared.bus.keys import GENERATE, Keys
from shared.bus.retry import retry_until_available
from shared.bus.work_stream import WorkStream
from shared.redis_errors import ACTIONS, Action, SignInError, action_for, code_of

pytestmark = pytest.mark.system
ELSEWHERE = {"LOADING", "KILLED", "NOSCRIPT", "UNBLOCKED", "NOAUTH", "WRONGPASS", "WRONGTYPE"}  # tests of their own


class SlowServer(RedisServer):
    """One that takes a while to read its data."""

    def _options(self) -> list[str]:
        return [*super()._options(), "--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024"]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with (
        tempfile.TemporaryDirectory(prefix="millrace-") as directory,
        RedisServer(Path(directory), persistence=True) as server,
    ):
        yield server


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """redis-py itself retries nothing, and we soon."""
    monkeypatch.setattr(redis_client, "_RETRIES", 0)
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(retry, "LONGEST_DELAY_S", 0.01)


@pytest.fixture
async def operator(server: RedisServer) -> AsyncIterator[Redis]:
    assert server.command("FLUSHALL").startswith(b"+OK")
    client = connect(server.url)
    yield client
    await client.aclose()


@pytest.fixture
async def ours(server: RedisServer, quick: None, operator: Redis) -> AsyncIterator[Redis]:
    client = connect(server.url)
    yield client
    await client.aclose()


class Waiting:
    """A call that is retried, and the first error that it met."""

    def __init__(self, attempt: Callable[[], Awaitable[Any]]) -> None:
        self._attempt = attempt
        self._met: asyncio.Future[RedisError] = asyncio.get_running_loop().create_future()
        self._task = asyncio.ensure_future(retry_until_available("test", self._watched))

    async def error(self) -> RedisError:
        await asyncio.wait([self._met, self._task], return_when=asyncio.FIRST_COMPLETED)
        assert self._met.done(), f"nothing was refused: {self._task.result()}"
        return self._met.result()

    async def result(self) -> Any:
        return await self._task

    async def _watched(self) -> Any:
        try:
            return await self._attempt()
        except RedisError as error:
            if not self._met.done():
                self._met.set_result(error)
            raise


def test_every_row_has_a_test() -> None:
    assert set(ACTIONS) == set(REFUSALS) | ELSEWHERE


def pipelined(redis: Redis, transaction: bool) -> Callable[[], Awaitable[Any]]:
    async def write() -> Any:
        async with redis.pipeline(transaction=transaction) as pipe:
            pipe.set("key", "kept")
            pipe.get("key")
            return (await pipe.execute())[1]

    return write


def written_by(how: str, redis: Redis) -> Callable[[], Awaitable[Any]]:
    """Return a way to write a value and read it."""
    if how == "script":
        return lambda: redis.register_script("redis.call('SET', 'key', 'kept'); return redis.call('GET', 'key')")()
    if how in ("transaction", "pipeline"):
        return pipelined(redis, how == "transaction")
    return lambda: command(redis, "GETSET", "key", "kept")


@pytest.mark.parametrize("how", ["command", "script", "pipeline", "transaction"])
@pytest.mark.parametrize("code", REFUSALS)
async def test_what_is_refused_is_waited_out(
    server: RedisServer, operator: Redis, ours: Redis, code: str, how: str
) -> None:
    await operator.set("key", "kept")
    reads = code == "MASTERDOWN"  # a replica that has lost its primary refuses a write for being one, and that alone
    async with REFUSALS[code](server, operator):
        waiting = Waiting((lambda: command(ours, "GET", "key")) if reads else written_by(how, ours))
        error = await waiting.error()
        assert code_of(error) == code
        assert action_for(error) is ACTIONS[code]
    assert await waiting.result() == b"kept"


async def test_a_read_that_waits_when_its_server_becomes_a_replica(
    server: RedisServer, operator: Redis, ours: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_client, "MAX_BLOCK_MS", PATIENCE_MS)
    patient = connect(server.url)
    before = await patient.client_id()
    waiting = Waiting(lambda: command(patient, "XREAD", "BLOCK", PATIENCE_MS, "STREAMS", "stream", "0"))
    while not (await operator.info("clients"))["blocked_clients"]:  # noqa: ASYNC110 - Redis has no event for it
        await asyncio.sleep(0)
    async with demoted(server, operator):
        error = await waiting.error()
        assert (code_of(error), action_for(error)) == ("UNBLOCKED", Action.RECONNECT)
    await operator.xadd("stream", {"n": 1})
    assert [key for key, _ in await waiting.result()] == [b"stream"]
    assert await patient.client_id() != before, "it must ask anew which server is the primary"
    await patient.aclose()


async def test_after_readonly_no_old_connection_is_used_again(
    server: RedisServer, operator: Redis, ours: Redis
) -> None:
    pairs = [asyncio.ensure_future(ours.client_id()) for _ in range(3)]
    before = set(await asyncio.gather(*pairs))
    async with demoted(server, operator):
        waiting = Waiting(lambda: ours.set("key", "kept"))
        await waiting.error()
    await waiting.result()
    after = set(await asyncio.gather(*(ours.client_id() for _ in range(3))))
    assert not before & after


async def test_a_server_that_reads_its_data(quick: None) -> None:
    with tempfile.TemporaryDirectory(prefix="millrace-") as directory:
        server = SlowServer(Path(directory))
        server.start()
        client = connect(server.url)
        await client.mset({f"key {n}": "x" * 100 for n in range(1000)})
        await client.save()
        server.stop()
        starting = asyncio.ensure_future(asyncio.to_thread(server.start))
        codes = set()

        async def get() -> Any:
            try:
                return await client.get("key 999")
            except RedisError as error:
                codes.add(code_of(error))
                raise

        assert await retry_until_available("test", get) == b"x" * 100
        assert "LOADING" in codes
        await starting
        await client.aclose()
        server.stop()


async def test_a_script_of_ours_that_an_operator_kills(operator: Redis, ours: Redis) -> None:
    await operator.config_set("busy-reply-threshold", 1)
    scripts = iter(["while true do end", "return 7"])
    waiting = Waiting(lambda: ours.eval(next(scripts), 0))
    while not waiting._met.done():
        with suppress(ResponseError):  # it has not begun, or has been killed
            await operator.script_kill()
    assert code_of(await waiting.error()) == "KILLED"
    assert await waiting.result() == 7


async def test_a_stream_that_somebody_has_overwritten(operator: Redis, ours: Redis, keys: Keys) -> None:
    stream = WorkStream(ours, keys, GENERATE, "engine", "e", 3)
    await stream.join()
    await operator.set(keys.stream(GENERATE), "oops")
    waiting = Waiting(lambda: stream.read_new(1, 10))
    assert code_of(await waiting.error()) == "WRONGTYPE"
    await operator.delete(keys.stream(GENERATE))
    assert await waiting.result() == []
    assert await operator.xlen(keys.stream(GENERATE)) == 0


async def test_what_is_our_mistake_is_raised(ours: Redis) -> None:
    for words in (("NO SUCH COMMAND",), ("SET", "key")):
        with pytest.raises(ResponseError):
            await retry_until_available("test", lambda words=words: command(ours, *words))


# --- user and password


@pytest.fixture
async def guarded(operator: Redis) -> AsyncIterator[Redis]:
    """A server whose user `ours` has the password "new"."""
    await command(operator, "ACL", "SETUSER", "ours", "on", ">new", "~*", "+@all")
    yield operator
    await operator.acl_deluser("ours")


def user(server: RedisServer, password: str, patience_s: float) -> Redis:
    return connect(f"{server.url}?username=ours&password={password}", patience_s)


async def test_a_password_that_is_not_valid_yet(server: RedisServer, guarded: Redis, quick: None) -> None:
    client = user(server, "old", 3600)
    waiting = Waiting(lambda: client.set("key", 1))
    error = await waiting.error()
    assert (code_of(error), action_for(error)) == ("WRONGPASS", Action.SIGN_IN)
    await command(guarded, "ACL", "SETUSER", "ours", ">old")
    assert await waiting.result()
    await client.aclose()


async def test_a_password_where_we_have_none(server: RedisServer, operator: Redis, quick: None) -> None:
    await operator.config_set("requirepass", "secret")
    client = connect(server.url)
    try:
        waiting = Waiting(lambda: client.set("key", 1))
        error = await waiting.error()
        assert (code_of(error), action_for(error)) == ("NOAUTH", Action.SIGN_IN)
    finally:
        await operator.config_set("requirepass", "")
    assert await waiting.result()
    await client.aclose()


async def test_patience_with_a_password_ends(server: RedisServer, guarded: Redis, quick: None) -> None:
    client = user(server, "old", 0.05)
    with pytest.raises(SignInError, match=r"for 0\.05 s.*invalid username-password pair"):
        await retry_until_available("test", lambda: client.set("key", 1))
    await client.aclose()


async def test_patience_is_for_new_connections_and_ends_the_old_ones_too(
    server: RedisServer, guarded: Redis, quick: None
) -> None:
    """A replica whose old connections still work would answer some requests, and let others wait."""
    client = user(server, "new", 0.0)
    assert await client.set("key", 1)
    held = await client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
    await command(guarded, "ACL", "SETUSER", "ours", "<new", ">newer")
    with pytest.raises(SignInError):
        await client.set("key", 2)
    await client.connection_pool.release(held)
    with pytest.raises(SignInError):
        await client.set("key", 2)
    await client.aclose()
