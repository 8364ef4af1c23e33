"""The users of Redis: every test of a service runs as its user (tests/conftest.py), so here is what nobody may."""

import shutil
import tempfile
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError, ResponseError
from redis_clients import signed_in

from cli.redis_server import RedisServer
from cli.redis_users import sign_in, users_file
from shared.bus.client import command, connect
from shared.bus.keys import SERVICES, Keys

USERS = ("gateway", "mm-encoder", "engine", "postproc", "viewer", "operator", "autoscaler", "scaler", "monitor")
FOR_NOBODY = """
    FLUSHALL / FLUSHDB / CONFIG SET dir x / CONFIG REWRITE / KEYS * / RANDOMKEY / DBSIZE / DEBUG SLEEP 0 / SHUTDOWN
    SCRIPT FLUSH / SCRIPT KILL / FUNCTION LOAD x / FUNCTION FLUSH / FCALL f 0 / ACL LIST / ACL SETUSER x
    CLIENT LIST / CLIENT KILL ID 1 / CLIENT PAUSE 1 / MONITOR / REPLICAOF no one / MODULE LIST / SAVE / SWAPDB 0 1
    MIGRATE h 1 k 0 1 / RESTORE test:encode 0 x / DUMP test:encode / RENAME test:encode test:x / MOVE test:encode 1
    COPY test:encode test:x / OBJECT ENCODING test:encode / SORT test:encode / PUBLISH c m / SUBSCRIBE c
"""
# User, command: what it could do harm with, or read, and needs for nothing.
FOR_OTHERS = """
    gateway     SET test:replica:engine:a x
    gateway     UNLINK test:replica:postproc:a
    gateway     HSET test:shards 0 x
    gateway     HSET test:flights k x
    gateway     GET test:blob:embeds:k:0
    gateway     SET test:blob:embeds:k:0 x
    gateway     XADD test:quarantine:generate * m x
    gateway     XDEL test:quarantine:generate 1-1
    gateway     XRANGE test:quarantine:generate - +
    gateway     LPUSH test:generate:turn:1 x
    gateway     SET test:leader:autoscaler x
    mm-encoder  GET test:file:f:0
    mm-encoder  GET test:responses:blob:input:r:0
    mm-encoder  HGETALL test:tenant:t
    mm-encoder  HGETALL test:batch:b
    mm-encoder  GET test:idempotency:d
    mm-encoder  SET test:replica:engine:a x
    mm-encoder  HSET test:shards 0 x
    engine      GET test:file:f:0
    engine      GET test:responses:blob:input:r:0
    engine      HGETALL test:tenant:t
    engine      HGETALL test:batch:b
    engine      SET test:replica:gateway:a x
    engine      HSET test:shards 0 x
    postproc    GET test:blob:media:k:0
    postproc    GET test:blob:embeds:k:0
    postproc    GET test:file:f:0
    postproc    HGETALL test:tenant:t
    postproc    HSET test:flights k x
    postproc    SET test:replica:engine:a x
    viewer      HGETALL test:request:r
    viewer      GET test:journal:r
    viewer      GET test:blob:media:k:0
    viewer      SET test:shards x
    viewer      XADD test:encode * m x
    viewer      XDEL test:quarantine:encode 1-1
    operator    GET test:journal:r
    operator    GET test:responses:blob:input:r:0
    operator    GET test:file:f:0
    operator    HSET test:tenant:t x y
    autoscaler  HGETALL test:request:r
    autoscaler  XADD test:encode * m x
    autoscaler  SET test:replica:engine:a x
    scaler      XRANGE test:encode - +
    monitor     XRANGE test:encode - +
    monitor     SET test:encode x
"""


async def refuses(redis: Redis, user: str, words: str) -> bool:
    """Return True if it would say NOPERM.

    Raises:
        ResponseError: there is no such command.
    """
    return bool(await command(redis, "ACL", "DRYRUN", user, *words.split()) != b"OK")


@pytest.mark.parametrize("words", [each.strip() for each in FOR_NOBODY.replace("\n", " / ").split("/") if each.strip()])
async def test_no_user_may(redis: Redis, words: str) -> None:
    assert [user for user in USERS if not await refuses(redis, user, words)] == []


@pytest.mark.parametrize("line", [line.strip() for line in FOR_OTHERS.strip().split("\n")])
async def test_a_user_may_not(redis: Redis, line: str) -> None:
    user, words = line.split(maxsplit=1)
    assert await refuses(redis, user, words)
    assert not await refuses(redis, "default", words)


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("words", ["GET {}", "SET {} x", "XADD {} * a b", "XLEN {}", "TYPE {}", "EVAL x 1 {}"])
async def test_no_user_may_touch_keys_of_another_deployment(redis: Redis, user: str, words: str) -> None:
    for key in ("other:request:r", "other:encode", "test2:encode", "xtest:encode", "encode"):
        assert await refuses(redis, user, words.format(key))


@pytest.mark.parametrize("service", SERVICES)
async def test_tests_of_a_service_sign_in_as_its_user(redis: Redis, service: str) -> None:
    async with signed_in(redis, service) as own:
        assert f" user={service.replace('_', '-')} " in str(await command(own, "CLIENT", "INFO"), "ascii")


async def test_what_is_refused_within_a_script_is_noted(redis: Redis, keys: Keys) -> None:
    """It would fail the test (tests/conftest.py:redis_url), however the script or its caller took it."""
    async with signed_in(redis, "postproc") as own:
        script = f"return redis.pcall('GET', '{keys.file('f')}')"
        with pytest.raises(ResponseError, match="script"):
            await command(own, "EVAL", script, 0)
    (noted,) = await redis.acl_log()
    assert (noted["username"], noted["object"], noted["context"]) == ("postproc", keys.file("f"), "lua")
    await redis.acl_log_reset()


@pytest.mark.system
async def test_any_namespace_has_users() -> None:
    strange = "a b\n*é["
    with RedisServer(Path(tempfile.mkdtemp(prefix="millrace-")), namespace=strange) as server:
        own = connect(sign_in(server.url, "engine"))
        try:
            assert await own.set(Keys(strange).journal("r"), "x")
            with pytest.raises(NoPermissionError):
                await own.set(Keys("a b").journal("r"), "x")
        finally:
            await own.aclose()
    shutil.rmtree(server.directory)


def test_every_user_of_the_table_is_made() -> None:
    lines = users_file("a.b").splitlines()
    assert [line.split()[1] for line in lines] == ["default", *USERS]
    assert not any("NS:" in line or "test:" in line for line in lines)
    assert all(line.startswith(f"user {user} on nopass ") for user, line in zip(USERS, lines[1:], strict=True))
