"""The token path's own connection, against a real Redis."""

import asyncio
import tempfile
from pathlib import Path

import pytest
from redis.exceptions import AuthenticationError, NoScriptError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from cli.redis_server import RedisServer
from shared.errors import ConfigError
from shared.wire import Wire


@pytest.fixture
def wire(redis_url: str) -> Wire:
    return Wire(redis_url)


async def test_replies_come_as_redis_sent_them(wire: Wire) -> None:
    assert await wire.call("SET", b"k\r\n", b"\x00\xff") == b"OK"
    assert await wire.call("GET", b"k\r\n") == b"\x00\xff"
    assert await wire.call("INCRBY", "n", 5) == 5
    assert await wire.call("GET", "absent") is None
    entry = await wire.call("XADD", "s", "*", "f", "v")
    assert await wire.call("XREAD", "STREAMS", "s", "0") == [[b"s", [[entry, [b"f", b"v"]]]]]
    wire.close()


async def test_calls_at_once_get_their_own_replies(wire: Wire) -> None:
    replies = await asyncio.gather(*(wire.call("ECHO", str(i) * 1000) for i in range(200)))
    assert replies == [str(i).encode() * 1000 for i in range(200)]
    wire.close()


async def test_errors_are_redis_py_s(wire: Wire) -> None:
    with pytest.raises(ResponseError, match="unknown command"):
        await wire.call("NONSENSE")
    with pytest.raises(NoScriptError):
        await wire.call("EVALSHA", "0" * 40, 0)
    assert await wire.call("PING") == b"PONG"
    wire.close()


async def test_a_reply_nobody_waits_for_any_more_is_nobody_else_s(wire: Wire, redis_url: str) -> None:
    blocked = asyncio.ensure_future(wire.call("BLPOP", "list", 0))
    await asyncio.sleep(0)
    other = Wire(redis_url)
    while b"cmd=blpop" not in await other.call("CLIENT", "LIST"):
        pass
    blocked.cancel()
    after = asyncio.ensure_future(wire.call("ECHO", "mine"))
    await other.call("RPUSH", "list", "theirs")
    assert await after == b"mine"
    with pytest.raises(asyncio.CancelledError):
        await blocked
    wire.close()
    other.close()


async def test_a_broken_connection_fails_who_waits_and_is_made_anew(wire: Wire, redis_url: str) -> None:
    number = await wire.call("CLIENT", "ID")
    blocked = asyncio.ensure_future(wire.call("BLPOP", "list", 0))
    other = Wire(redis_url)
    assert await other.call("CLIENT", "KILL", "ID", number) == 1
    with pytest.raises(RedisConnectionError):
        await blocked
    assert await wire.call("CLIENT", "ID") != number
    wire.close()
    other.close()


async def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(RedisConnectionError, match="cannot connect"):
        await Wire(f"unix://{tmp_path}/none.sock").call("PING")


async def test_password_user_and_database(unused_port: int) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="millrace-") as directory,
        RedisServer(Path(directory), port=unused_port) as server,
    ):
        server.command("ACL SETUSER reader on >s3cret ~* &* +@all")
        wire = Wire(f"redis://reader:s3cret@127.0.0.1:{unused_port}/2")
        assert await wire.call("ACL", "WHOAMI") == b"reader"
        assert b"db=2" in await wire.call("CLIENT", "INFO")
        wire.close()
        with pytest.raises(ResponseError, match="WRONGPASS") as refused:
            await Wire(f"redis://reader:wrong@127.0.0.1:{unused_port}").call("PING")
        assert not isinstance(refused.value, AuthenticationError)


def test_a_malformed_url() -> None:
    with pytest.raises(ConfigError, match="expected redis://"):
        Wire("http://127.0.0.1")
