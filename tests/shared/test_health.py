"""The health command against real leases."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from machine import PATIENCE_S
from redis.asyncio import Redis
from stream_server import serving

from shared.bus.keys import Keys
from shared.bus.leases import Lease, Replica
from shared.config import CommonSettings
from shared.errors import ConfigError
from shared.health import Probe, judge, look, probe_settings

ROOT = Path(__file__).resolve().parents[2]
SILENT_S = 0.2


def settings(redis_url: str) -> CommonSettings:
    return CommonSettings(redis_url=redis_url, model="unread", namespace="test", name="engine-0")


@pytest.mark.parametrize(
    ("state", "live", "ready"),
    [("starting", True, False), ("ready", True, True), ("draining", True, False), (None, False, False)],
)
def test_a_lease_says_who_is_well(state: str | None, live: bool, ready: bool) -> None:
    lease = None if state is None else Replica("engine", "engine-0", state)
    assert (judge(lease, Probe.LIVE) is None) is live
    assert (judge(lease, Probe.READY) is None) is ready


async def test_only_the_replica_asked_for_counts(redis: Redis, redis_url: str, keys: Keys) -> None:
    await Lease(redis, keys, "engine", "engine-1", 60_000).renew("ready")
    await Lease(redis, keys, "postproc", "engine-0", 60_000).renew("ready")
    assert "no lease" in str(await look(settings(redis_url), "engine", Probe.LIVE))
    await Lease(redis, keys, "engine", "engine-0", 60_000).renew("ready")
    assert await look(settings(redis_url), "engine", Probe.READY) is None


async def test_an_unreadable_lease_is_not_well(redis: Redis, redis_url: str, keys: Keys) -> None:
    await redis.set(keys.replica("engine", "engine-0"), b'{"state": 1}')
    assert "unreadable lease" in str(await look(settings(redis_url), "engine", Probe.LIVE))


async def test_without_redis_a_replica_is_not_ready_and_yet_not_to_be_restarted(unused_port: int) -> None:
    told = settings(f"redis://127.0.0.1:{unused_port}")
    assert await look(told, "engine", Probe.LIVE, SILENT_S) is None
    assert "Redis does not answer" in str(await look(told, "engine", Probe.READY, SILENT_S))


async def test_a_redis_that_accepts_and_says_nothing_is_no_answer() -> None:
    async def say_nothing(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    async with serving(say_nothing) as port:
        told = settings(f"redis://127.0.0.1:{port}")
        assert await look(told, "engine", Probe.LIVE, SILENT_S) is None
        assert "TimeoutError" in str(await look(told, "engine", Probe.READY, SILENT_S))


def test_the_environment_is_the_services_own() -> None:
    environ = {"MILLRACE_REDIS_URL": "redis://r", "MILLRACE_MODEL": "/m", "MILLRACE_MAX_NUM_SEQS": "32"}
    with pytest.raises(ConfigError, match="MILLRACE_NAME must be set"):
        probe_settings(environ)
    assert probe_settings(environ | {"MILLRACE_NAME": "engine-0"}).name == "engine-0"


@pytest.mark.parametrize(
    ("arguments", "name", "status", "said"),
    [
        (["engine", "ready"], "engine-0", 0, ""),
        (["postproc", "ready"], "engine-0", 1, "no lease"),
        (["engine"], "engine-0", 2, "usage"),
        (["engine", "well"], "engine-0", 2, "usage"),
        (["engine", "live"], "", 2, "MILLRACE_NAME must be set"),
    ],
)
async def test_the_command(
    redis: Redis, redis_url: str, keys: Keys, arguments: list[str], name: str, status: int, said: str
) -> None:
    await Lease(redis, keys, "engine", "engine-0", 60_000).renew("ready")
    environ = {"MILLRACE_REDIS_URL": redis_url, "MILLRACE_MODEL": "unread", "MILLRACE_NAMESPACE": "test"}
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "shared.health", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environ, "MILLRACE_NAME": name},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == status, done.stderr
    assert said in done.stderr
