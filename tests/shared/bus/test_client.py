import asyncio
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from machine import PATIENCE_MS
from redis.asyncio import Redis
from redis.exceptions import ConnectionError

from cli import redis_server as server_module
from cli.redis_server import RedisServer
from shared.bus import client as redis_client
from shared.bus.client import _CONNECTIONS, connect
from shared.errors import ConfigError


async def test_bytes_come_back(redis: Redis) -> None:
    await redis.set("key", b"\xff\x00")
    assert await redis.get("key") == b"\xff\x00"


@pytest.mark.parametrize(
    "url",
    [
        "http://:secret@localhost",
        "localhost:6379",
        "redis://:secret@localhost:port",
        "redis://:secret@localhost?no_such_option=1",
        "redis+sentinel://:secret@localhost",
        "redis+sentinel://:secret@localhost:port/main",
        "redis+sentinel://:secret@,localhost/main",
        "redis+sentinel://:secret@localhost/main/0?no_such_option=1",
        "",
    ],
)
def test_malformed_url_is_a_config_error_that_keeps_the_password(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        connect(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("redis://:secret@localhost/one", "a database's number"),
        ("redis://:secret@localhost/1/2", "a database's number"),
        ("redis://:secret@localhost/-1", "a database's number"),
        ("redis+sentinel://:secret@localhost/main/one", "a database's number"),
        ("redis://:sec/secret@localhost", "%2F"),
        ("redis+sentinel://user:12/secret@localhost/main", "%2F"),
        ("unix://:12/secret@/tmp/x.sock", "%2F"),
        ("redis://:sec#secret@localhost", "%23"),
        ("redis://user:12?secret@localhost:6379/0", "%3F"),
        ("redis://:12?secret@localhost?ssl_cert_reqs=none", "%3F"),
        ("redis+sentinel://user:12?secret@localhost/main", "%3F"),
        ("unix://:12?secret@/tmp/x.sock", "%3F"),
        ("redis://:sec?secret=1@localhost", "%3F for a ?"),
        ("redis://user:sec@ret?secret@localhost:6379", "%3F, and an @ %40"),
        ("redis+sentinel://user:sec@ret?secret@localhost/main", "%3F, and an @ %40"),
        ("redis://user:sec@ret/secret@localhost:6379", "%2F, and an @ %40"),
        ("redis+sentinel://user:sec@ret/secret@localhost:6379", "%2F, and an @ %40"),
        ("redis://:sec[secret@localhost", "%5B for a ["),
        ("unix://tmp/x.sock", "three slashes"),
        ("redis://:secret@localhost/0?decode_responses=1", "decode_responses"),
        ("unix://:secret@/tmp/x.sock?protocol=3", "protocol"),
        ("rediss://:secret@localhost?ssl_ca_certs=/no/such/ca.crt", "ssl_ca_certs: /no/such/ca.crt does not exist"),
        (f"rediss://:secret@localhost?ssl_certfile=/{'x' * 300}", "ssl_certfile cannot be read"),
        ("rediss://:secret@localhost?ssl_keyfile=%00", "ssl_keyfile cannot be read"),
        ("rediss://:secret@localhost?ssl_cert_reqs=perhaps", "malformed"),
    ],
)
def test_a_url_that_would_be_misread_is_a_config_error(url: str, named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)) as raised:
        connect(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost:6379/1",
        "redis://localhost/0/",
        "rediss://user:pw@localhost",
        "redis://localhost?password=p@w",
        "unix:///tmp/x.sock?db=2",
        "unix:///run/redis@1.sock",
        "unix://:pw@/tmp/x.sock",
    ],
)
async def test_every_scheme_is_accepted(url: str) -> None:
    await connect(url).aclose()


async def test_a_password_of_reserved_characters_is_read_where_it_is_encoded() -> None:
    password = "/?#[]@:%+ &="
    client = connect(f"redis://user:{quote(password, safe='')}@localhost:6380/1")
    told = client.connection_pool.connection_kwargs
    assert (told["username"], told["password"], told["host"], told["port"], told["db"]) == (
        "user",
        password,
        "localhost",
        6380,
        1,
    )
    await client.aclose()


async def test_options_that_we_choose_are_ignored_and_told_of_once(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    redis_client._warn_ignored.cache_clear()
    ours: Any = connect(redis_url).connection_pool
    for _ in range(2):
        client = connect(f"{redis_url}?socket_timeout=0.001&timeout=1&max_connections=1&protocol=2&client_name=a%26b")
        pool: Any = client.connection_pool
        assert (pool.max_connections, pool.timeout) == (ours.max_connections, ours.timeout)
        assert pool.connection_kwargs["socket_timeout"] == ours.connection_kwargs["socket_timeout"]
        assert await client.client_getname() == "a&b"
        await client.aclose()
    told = [vars(record)["option"] for record in caplog.records]
    assert sorted(told) == [
        "max_connections",
        "socket_timeout",
        "timeout",
    ]


async def test_cancelled_blocking_read_leaves_no_stale_reply(redis: Redis) -> None:
    words = ("XREAD", "BLOCK", PATIENCE_MS, "STREAMS", "stream", "$")
    reader = asyncio.ensure_future(redis.execute_command(*words))
    while not (await redis.info("clients"))["blocked_clients"]:  # noqa: ASYNC110 - Redis has no event for it
        await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await redis.xadd("stream", {"a": "b"})
    assert await redis.echo("mine") == b"mine"


async def test_more_commands_at_once_than_connections(redis: Redis) -> None:
    counted = await asyncio.gather(*(redis.incr("n") for _ in range(3 * _CONNECTIONS)))
    assert sorted(counted) == list(range(1, 3 * _CONNECTIONS + 1))


async def test_commands_survive_a_restart_of_the_server(redis_server: RedisServer, tmp_path: Path) -> None:
    server = RedisServer(
        tmp_path, unix_socket=redis_server.directory / "b.sock", persistence=True, binary=redis_server.binary
    )
    server.start()
    client = connect(server.url)
    try:
        await client.set("key", "kept")
        server.stop()
        reading = asyncio.ensure_future(client.execute_command("GET", "key"))
        await asyncio.to_thread(server.start)
        assert await reading == b"kept"
    finally:
        await client.aclose()
        server.stop()


async def test_a_server_that_never_comes_is_redis_own_connection_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(redis_client, "_RETRIES", 1)
    client = connect(f"unix://{tmp_path}/nobody.sock")
    with pytest.raises(ConnectionError):
        await client.ping()
    await client.aclose()


# --- the server itself


def test_server_listens_on_loopback_only(redis_server: RedisServer, tmp_path: Path, unused_port: int) -> None:
    server = RedisServer(
        tmp_path, port=unused_port, unix_socket=redis_server.directory / "c.sock", binary=redis_server.binary
    )
    with server:
        assert server.command("CONFIG GET bind").split(b"\r\n")[-2] == b"127.0.0.1"
        assert server.running
        taken = RedisServer(
            tmp_path / "2", port=unused_port, unix_socket=redis_server.directory / "d.sock", binary=redis_server.binary
        )
        with pytest.raises(ConfigError, match=r"ended with status 1.*in use"):
            taken.start()
    assert not server.running


def test_no_server_anywhere_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_candidates", list)
    with pytest.raises(ConfigError, match=r"no redis-server.*--redis-url"):
        server_module.find_server()


@pytest.mark.system
def test_old_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "OLDEST", (99, 0))
    with pytest.raises(ConfigError, match=r"is of version \d+.*Install Redis 99.0"):
        server_module.find_server()


def test_overlong_socket_path_is_refused(redis_server: RedisServer) -> None:
    with pytest.raises(ConfigError, match="socket"):
        RedisServer(Path("/" + "x" * 120), binary=redis_server.binary)


async def test_a_cancellation_is_never_lost(redis: Redis) -> None:
    """At whatever point of a command it comes: a loop over commands would go on for ever without it."""
    lost = 0

    async def loop() -> None:
        nonlocal lost
        me = asyncio.current_task()
        assert me is not None
        while not me.cancelling():
            await redis.set("key", b"value")
        lost += 1

    for steps in range(300):
        task = asyncio.create_task(loop())
        for _ in range(steps % 60):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    assert lost == 0
