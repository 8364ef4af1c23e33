"""`millrace status`: its words, its JSON and its exit status. The view: tests/shared/bus/test_pipeline_view.py."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import PATIENCE_S

from cli.connection import parser, scratch_prefix, scratch_socket
from cli.main import main
from cli.redis_users import sign_in
from shared.bus import client as redis_client
from shared.bus.client import connect
from shared.bus.keys import SERVICES, Keys
from shared.bus.leases import Lease
from shared.bus.pipeline_view import HELD
from shared.errors import ConfigError

HOUR_MS = 3_600_000


def test_the_command(redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def prepare() -> None:
        client = connect(redis_url)
        for service in SERVICES:
            await Lease(client, Keys("test"), service, f"{service}-0", HOUR_MS).renew("ready", {HELD[service]: 3})
        await Lease(client, Keys("test"), "engine", "engine-1", HOUR_MS).renew("starting")
        await client.hset(Keys("test").batch("batch_1"), mapping={"total": 9, "completed": 4})
        await client.zadd(Keys("test").batches(), {"batch_1": 1})
        await client.aclose()

    flags = ["status", "--redis-url", sign_in(redis_url, "viewer"), "--namespace", "test"]
    assert main(flags) == 1
    assert "! gateway: no replica is ready" in capsys.readouterr().out
    asyncio.run(prepare())
    assert main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "engine     1 ready, 1 starting; 3 in work, 0 waiting" in lines
    assert lines[-1] == "batches    0 in work, 1 waiting; 4 of 9 lines have a result"
    assert main([*flags, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["healthy"], said["problems"]) == (True, [])
    assert said["pipeline"]["stages"][2]["replicas"][0]["load"] == {"held": 3}


def test_a_reader_that_has_seen_enough(redis_url: str) -> None:
    command = [Path(sys.executable).with_name("millrace"), "status", "--json", "--redis-url", redis_url]
    read_end, write_end = os.pipe()
    os.close(read_end)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        command, stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S, env=buffered
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_one_that_runs_here_is_meant_unless_another_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meant(*words: str, **environ: str) -> str:
        return str(parser("millrace status", "", environ).parse_args(words).redis_url)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = scratch_socket(tmp_path / f"{scratch_prefix(9000)}a")
    dead.parent.mkdir()
    with listening(dead):
        assert meant() == f"unix://{dead}"
        assert meant("--redis-url", "redis://other") == "redis://other"
        assert meant(MILLRACE_REDIS_URL="redis://named") == "redis://named"
        living = scratch_socket(tmp_path / f"{scratch_prefix(8180)}b")
        living.parent.mkdir()
        several = r"more than one .*millrace-8180-b/redis.sock \(that of port 8180\)"
        with listening(living), pytest.raises(ConfigError, match=several):
            meant()
    assert dead.exists()
    with pytest.raises(ConfigError, match="no `millrace serve` of this user runs here"):
        meant()


@contextlib.contextmanager
def listening(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield


def test_redis_that_does_not_answer(
    tmp_path: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_client, "_RETRIES", 0)
    assert main(["status", "--redis-url", f"unix://{tmp_path}/none.sock"]) == 2
    assert "Redis does not answer" in capsys.readouterr().err


def test_redis_that_answers_an_error_is_not_said_to_be_away(redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def misplaced(before: bool) -> None:
        client = connect(redis_url)
        await (client.set(Keys("odd").shards(), "x") if before else client.delete(Keys("odd").shards()))
        await client.aclose()

    asyncio.run(misplaced(True))
    try:
        assert main(["status", "--redis-url", redis_url, "--namespace", "odd"]) == 2
        told = "Redis refuses: WRONGTYPE odd:shards is a string and not a hash: something else than this deployment"
        assert capsys.readouterr().err.startswith(f"millrace status: {told}")
    finally:
        asyncio.run(misplaced(False))


def test_a_key_of_somebody_elses_that_is_not_needed_hides_nothing(
    redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = Keys("odd")

    async def misplace(key: str) -> None:
        client = connect(redis_url)
        await client.set(key, "x", px=HOUR_MS)
        await client.aclose()

    flags = ["--redis-url", redis_url, "--namespace", "odd"]
    asyncio.run(misplace(keys.files()))
    told = f"{keys.files()} is a string and not a zset: something else than this deployment has written it; delete it"
    assert main(["status", *flags]) == 1
    said = capsys.readouterr().out
    assert "engine     no replica; 0 in work, 0 waiting\n" in said
    assert f"\n! {told}" in said
    assert main(["status", *flags, "--json"]) == 1
    assert any(problem.startswith(told) for problem in json.loads(capsys.readouterr().out)["problems"])
    assert main(["top", *flags, "--once"]) == 0
    assert told in " ".join(capsys.readouterr().out.split()), "in lines as wide as the terminal"
    # The blobs' keys are those of the Redis in which the blobs are.
    asyncio.run(misplace(keys.blob_pins()))
    other = f"{redis_url}?db=9"
    assert main(["status", *flags, "--blob-redis-url", other]) == 1
    assert keys.blob_pins() not in capsys.readouterr().out
    assert main(["status", *flags[2:], "--redis-url", other, "--blob-redis-url", redis_url]) == 1
    said = capsys.readouterr().out
    assert f"! {keys.blob_pins()} is a string" in said
    assert keys.files() not in said


def test_names_of_others_are_no_commands_to_the_terminal(redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def join() -> None:
        client = connect(redis_url)
        await Lease(client, Keys("odd"), "engine", "e", HOUR_MS, "0.1", 0.0, {}).renew("ready\x1b[2J")
        await client.aclose()

    asyncio.run(join())
    main(["status", "--redis-url", redis_url, "--namespace", "odd"])
    assert r"1 ready\x1b[2J" in capsys.readouterr().out


def test_flags_that_cannot_be_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where no `millrace serve` of another test is seen
    assert main(["status", "--redis-url", "nonsense"]) == 2
    assert main(["status", "--redis-url", "redis://r", "--yaml"]) == 2
    said = capsys.readouterr().err
    assert "millrace status: error: malformed Redis URL" in said
    assert "unrecognized arguments: --yaml" in said
