"""The token path's connections, against a real Redis."""

import asyncio
import contextlib
import errno
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import uvloop
from machine import PATIENCE_S
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    InvalidResponse,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ResponseError,
    TimeoutError,
)

from cli.redis_server import RedisServer
from shared.bus import client as redis_client
from shared.bus import wire as wire_module
from shared.bus.client import connect
from shared.bus.wire import Wire, WireScript


@pytest.fixture
def wire(redis: Redis) -> Wire:
    return Wire(redis)


@pytest.fixture
def own_server(unused_port: int) -> Iterator[RedisServer]:
    """One that a test may halt and kill."""
    with tempfile.TemporaryDirectory(prefix="millrace-") as directory:
        server = RedisServer(Path(directory), port=unused_port, persistence=True)
        server.start()
        yield server
        server.stop()


@pytest.fixture
async def own_redis(own_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Redis]:
    """Over TCP, giving up soon."""
    monkeypatch.setattr(redis_client, "_RETRIES", 1)
    client = connect(f"redis://127.0.0.1:{own_server.port}")
    yield client
    await client.aclose()


async def until_blocked(redis: Redis, clients: int = 1) -> None:
    while (await redis.info("clients"))["blocked_clients"] != clients:  # noqa: ASYNC110 - Redis has no event for it
        await asyncio.sleep(0)


async def test_replies_come_as_redis_sends_them(wire: Wire) -> None:
    assert await wire.call("SET", b"k\r\n", b"\x00\xff") == b"OK"
    assert await wire.call("GET", b"k\r\n") == b"\x00\xff"
    assert await wire.call("INCRBY", "n", 5) == 5
    assert await wire.call("GET", "absent") is None
    entry = await wire.call("XADD", "s", "*", "f", b"x" * 1_000_000)
    assert await wire.call("XREAD", "STREAMS", "s", "0") == [[b"s", [[entry, [b"f", b"x" * 1_000_000]]]]]


async def test_one_connection_through_errors_and_back_into_the_pool(wire: Wire, redis: Redis) -> None:
    number = await wire.call("CLIENT", "ID")
    with pytest.raises(ResponseError, match="unknown command"):
        await wire.call("NONSENSE")
    with pytest.raises(NoScriptError):
        await wire.call("EVALSHA", "0" * 40, 0)
    assert await wire.call("CLIENT", "ID") == number != await redis.client_id()
    await wire.close()
    assert await redis.client_id() == number
    assert await wire.call("PING") == b"PONG"


async def test_a_timer_that_does_not_say_when_it_is_due(wire: Wire) -> None:
    """uvloop's is such a one when it is due at once."""
    await wire.call("PING")
    assert wire._replies is not None
    wire._replies._timer = asyncio.Handle(lambda: None, (), asyncio.get_running_loop())
    assert await wire.call("ECHO", "mine") == b"mine"


async def test_a_cancelled_call_s_reply_is_nobody_else_s(wire: Wire, redis: Redis) -> None:
    number = await wire.call("CLIENT", "ID")
    blocked = asyncio.ensure_future(wire.call("BLPOP", "list", PATIENCE_S, wait_s=PATIENCE_S))
    await until_blocked(redis)
    blocked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await blocked
    await redis.rpush("list", "theirs")
    assert await wire.call("ECHO", "mine") == b"mine"
    assert await wire.call("CLIENT", "ID") != number


async def test_at_whatever_point_a_call_is_cancelled(wire: Wire) -> None:
    """The cancellation is not lost, and the next call gets its own reply."""
    lost = 0

    async def loop() -> None:
        nonlocal lost
        me = asyncio.current_task()
        assert me is not None
        while not me.cancelling():
            await wire.call("ECHO", "theirs")
        lost += 1

    for steps in range(200):
        task = asyncio.create_task(loop())
        for _ in range(steps % 40):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert await wire.call("ECHO", f"{steps}") == f"{steps}".encode()
    assert lost == 0


async def test_a_command_whose_connection_breaks_is_sent_again(wire: Wire, redis: Redis) -> None:
    number = await wire.call("CLIENT", "ID")
    blocked = asyncio.ensure_future(wire.call("BLPOP", "list", PATIENCE_S, wait_s=PATIENCE_S))
    await until_blocked(redis)
    assert await redis.execute_command("CLIENT", "KILL", "ID", number) == 1  # type: ignore[no-untyped-call]
    await redis.rpush("list", "late")
    assert await blocked == [b"list", b"late"]


async def test_a_peer_that_the_kernel_gives_up_breaks_the_connection(wire: Wire, redis: Redis) -> None:
    """What TCP's keepalive says then is the builtin TimeoutError, and no reply."""
    assert await wire.call("PING")
    blocked = asyncio.ensure_future(wire.call("BLPOP", "list", PATIENCE_S, wait_s=PATIENCE_S))
    await until_blocked(redis)
    assert wire._replies is not None
    wire._replies.connection_lost(OSError(errno.ETIMEDOUT, "Connection timed out"))
    await redis.rpush("list", "late", "later")
    assert await blocked in ([b"list", b"late"], [b"list", b"later"])
    assert await wire.call("PING") == b"PONG"


@pytest.mark.system
async def test_a_server_that_was_killed_and_comes_back(own_server: RedisServer, own_redis: Redis) -> None:
    wire = Wire(own_redis)
    await wire.call("SET", "key", "kept")
    own_server.kill()
    with pytest.raises(ConnectionError):
        await wire.call("GET", "key")
    await asyncio.to_thread(own_server.start)
    assert await wire.call("GET", "key") == b"kept"


@pytest.mark.system
async def test_a_server_that_is_halted_is_noticed(
    own_server: RedisServer, own_redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel still takes connections, and what is sent over them."""
    wire = Wire(own_redis)
    await wire.call("PING")
    assert own_server.pid is not None
    os.kill(own_server.pid, signal.SIGSTOP)
    monkeypatch.setattr(wire_module, "LIMIT_S", 0.1)
    try:
        with pytest.raises(TimeoutError, match="no reply to 'ECHO'"):
            await wire.call("ECHO", "theirs")
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    monkeypatch.setattr(wire_module, "LIMIT_S", PATIENCE_S)
    assert await wire.call("ECHO", "mine") == b"mine"


@pytest.mark.system
async def test_the_time_a_command_may_wait_is_its_own(own_redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_module, "LIMIT_S", 0.0)
    wire = Wire(own_redis)
    with pytest.raises(TimeoutError):
        await wire.call("BLPOP", "list", PATIENCE_S)
    assert await wire.call("BLPOP", "list", 0.01, wait_s=PATIENCE_S) is None


@pytest.mark.system
async def test_what_redis_refuses_for_now_is_told_apart(own_redis: Redis) -> None:
    wire = Wire(own_redis)
    await own_redis.config_set("maxmemory", 1)
    with pytest.raises(OutOfMemoryError):
        await wire.call("SET", "key", "value")


@pytest.mark.system
async def test_password_user_and_database(own_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_client, "_RETRIES", 0)
    own_server.command("ACL SETUSER reader on >s3cret ~* &* +@all -get")
    client = connect(f"redis://reader:s3cret@127.0.0.1:{own_server.port}/2")
    wire = Wire(client)
    assert await wire.call("ACL", "WHOAMI") == b"reader"
    assert b" db=2 " in await wire.call("CLIENT", "INFO")
    with pytest.raises(NoPermissionError):
        await wire.call("GET", "key")
    await client.aclose()
    client = connect(f"redis://reader:wrong@127.0.0.1:{own_server.port}")
    with pytest.raises(AuthenticationError):
        await Wire(client).call("PING")
    await client.aclose()


async def test_what_comes_unasked_is_no_reply_to_the_next_command(wire: Wire, redis: Redis) -> None:
    number = await wire.call("CLIENT", "ID")
    assert wire._replies is not None
    wire._replies.data_received(b"$6\r\ntheirs\r\n")
    assert await wire.call("ECHO", "mine") == b"mine"
    assert await wire.call("CLIENT", "ID") != number


async def test_a_reply_that_is_none_ends_the_call(wire: Wire, redis: Redis) -> None:
    await wire.call("PING")
    blocked = asyncio.ensure_future(wire.call("BLPOP", "list", PATIENCE_S, wait_s=PATIENCE_S))
    await until_blocked(redis)
    assert wire._replies is not None
    wire._replies.data_received(b"no protocol of Redis\r\n")
    with pytest.raises(InvalidResponse):
        await blocked
    await until_blocked(redis, 0)
    assert await wire.call("ECHO", "mine") == b"mine"


def test_a_wire_on_the_loop_of_the_services(redis_url: str) -> None:
    async def calls() -> None:
        client = connect(redis_url)
        wire = Wire(client)
        assert await wire.call("ECHO", b"x" * 1_000_000) == b"x" * 1_000_000
        blocked = asyncio.ensure_future(wire.call("BLPOP", "list", PATIENCE_S, wait_s=PATIENCE_S))
        await until_blocked(client)
        blocked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await blocked
        await client.execute_command("CLIENT", "KILL", "ID", await wire.call("CLIENT", "ID"))  # type: ignore[no-untyped-call]
        assert await wire.call("ECHO", "mine") == b"mine"
        await wire.close()
        assert await client.ping()
        await client.aclose()

    uvloop.run(calls())


async def test_a_script_is_loaded_where_it_is_missing(wire: Wire, redis: Redis) -> None:
    script = WireScript(wire, "return {KEYS[1], ARGV[1], ARGV[2]}")
    await redis.config_resetstat()
    for _ in range(2):
        assert await script(keys=["k"], args=[1, b"\xff"]) == [b"k", b"1", b"\xff"]
        assert await script(keys=["k"], args=[2, "b"]) == [b"k", b"2", b"b"]
        await redis.script_flush()
    commands = await redis.info("commandstats")
    assert (commands["cmdstat_evalsha"]["calls"], commands["cmdstat_eval"]["calls"]) == (4, 2)


async def test_an_error_in_what_is_sent_again_leaves_no_reply_for_the_next_command(redis: Redis) -> None:
    await redis.set("list", "no list")
    wire = Wire(redis, lambda: [("SET", "early", "x"), ("LPUSH", "list", "x"), ("SET", "late", "x")])
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await wire.call("GET", "list")
    await redis.delete("list")
    assert await wire.call("LRANGE", "list", 0, -1) == [b"x"]
    assert await wire.call("MGET", "early", "late") == [b"x", b"x"]


async def test_what_is_sent_again_goes_on_where_a_full_redis_stopped_it(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, each once: from the first one on, a Redis without room for all of it would never take all."""
    monkeypatch.setattr(wire_module, "AGAIN_BYTES", 1)
    names = [f"{nth:03}" for nth in range(40)]
    wire = Wire(redis, lambda: [("RPUSH", "taken", name, "x" * 50_000) for name in names])
    used = int((await redis.info("memory"))["used_memory"])
    await redis.config_set("maxmemory", used + 700_000)
    taken: list[str] = []
    try:
        while len(taken) < len(names):
            with contextlib.suppress(OutOfMemoryError):
                assert await wire.call("EXISTS", "taken") == 1
            found = [name.decode() for name in await redis.lrange("taken", 0, -1) if len(name) == 3]
            assert found, "Redis has room for some"
            taken += found
            await redis.delete("taken")
    finally:
        await redis.config_set("maxmemory", 0)
    assert taken == names
    assert wire._opened == 1


async def test_a_link_that_breaks_again_goes_on_with_the_part_that_it_broke(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire_module, "AGAIN_BYTES", 1)
    send_together, sent = wire_module._send_together, list[list[bytes]]()

    async def breaks_once(connection: AbstractConnection, commands: list[bytes]) -> None:
        await send_together(connection, commands)
        sent.append(commands)
        if sent.count(commands) == 1:
            await connection.disconnect(nowait=True)
            raise TimeoutError("no reply in time")

    monkeypatch.setattr(wire_module, "_send_together", breaks_once)
    wire = Wire(redis, lambda: [("RPUSH", "taken", nth) for nth in range(3)])
    for _ in range(3):
        with contextlib.suppress(TimeoutError):
            await wire.call("PING")
    assert await wire.call("LRANGE", "taken", 0, -1) == [b"0", b"0", b"1", b"1", b"2", b"2"]
