import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable, Collection
from hashlib import sha1
from pathlib import Path
from typing import Any

import msgspec
import pytest
from machine import PATIENCE_S
from redis.asyncio import Redis
from redis.exceptions import ConnectionError
from redis_proxy import Proxy

from shared.bus import leases
from shared.bus.client import connect
from shared.bus.keys import GENERATE, Keys
from shared.bus.lua import read_script
from shared.bus.streams import send
from shared.bus.translation import holds_newer
from shared.config import CommonSettings
from shared.errors import ConfigError
from shared.message_versions import VERSION
from shared.messages import Cancel, Drain
from shared.service import FAILED, MISCONFIGURED, Life


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


async def nothing() -> None:
    pass


class Recorder:
    """A service that notes what happens to it and in which state its lease is then."""

    def __init__(self, redis: Redis, keys: Keys, **phases: Callable[[], Awaitable[None]]) -> None:
        self.seen: list[tuple[str, str]] = []
        self.serving = asyncio.Event()
        self._redis = redis
        self._keys = keys
        self._phases = phases

    async def _phase(self, name: str, default: Callable[[], Awaitable[None]] = nothing) -> None:
        [replica] = await leases.live(self._redis, self._keys, "engine")
        self.seen.append((name, replica.state))
        await self._phases.get(name, default)()

    async def startup(self) -> None:
        await self._phase("startup")

    async def serve(self) -> None:
        await self._phase("serve", self._serve)

    async def _serve(self) -> None:
        self.serving.set()
        await forever()

    async def drain(self) -> None:
        await self._phase("drain")

    async def close(self) -> None:
        await self._phase("close")

    def load(self) -> dict[str, float]:
        return {"running": 2.0}


ALL = [("startup", "starting"), ("serve", "ready"), ("drain", "draining"), ("close", "draining")]


def settings(**changes: float) -> CommonSettings:
    """Settings with a lease that does not end, however busy the machine."""
    told = {"lease_ms": 60_000, **changes}
    return CommonSettings(redis_url="", model="", namespace="test", name="a", **told)  # type: ignore[arg-type]


def often(life: Life) -> Life:
    """Let a replica look around and renew its lease every moment, although that lasts for long."""
    life._renew_s = 0.05
    return life


async def broken() -> None:
    raise OSError("broken")


async def test_phases_in_order_under_a_lease(redis: Redis, keys: Keys) -> None:
    service = Recorder(redis, keys)
    life = Life("engine", service, settings(), redis)
    running = asyncio.create_task(life.run())
    await service.serving.wait()
    life.stop.set()
    assert await running == 0
    assert service.seen == ALL
    assert await redis.keys() == []


async def test_its_scripts_are_known_to_redis_before_it_is_ready(redis: Redis, keys: Keys) -> None:
    digests = [sha1(read_script(name).encode()).hexdigest() for name in ("submit", "queue_view")]
    await redis.script_flush()
    service = Recorder(redis, keys)
    life = Life("engine", service, settings(), redis)
    running = asyncio.create_task(life.run())
    await service.serving.wait()
    assert await redis.script_exists(*digests) == [True, True]
    life.stop.set()
    assert await running == 0


async def listening(redis: Redis) -> None:
    """Return once the one reader of `control` waits: it has seen all there is then."""
    async with asyncio.timeout(PATIENCE_S):
        while not (await redis.info("clients"))["blocked_clients"]:  # noqa: ASYNC110 - Redis has no event for it
            await asyncio.sleep(0)


async def test_drain_message_for_us_only(redis: Redis, keys: Keys) -> None:
    service = Recorder(redis, keys)
    life = Life("engine", service, settings(), redis)
    running = asyncio.create_task(life.run())
    await service.serving.wait()
    await listening(redis)
    for message in (Cancel(("a",)), Drain("engine", "b"), Drain("gateway", "a")):
        await send(redis, keys.control(), message)
    await redis.xadd(keys.control(), {"v": "999"})
    await listening(redis)
    assert not life.stop.is_set()
    await send(redis, keys.control(), Drain("engine", "a"))
    assert await running == 0
    assert service.seen == ALL


@pytest.mark.parametrize("state", ["startup", "serve", "drain", "close"])
async def test_failure_in_any_phase_is_status_1_and_closes(
    redis: Redis, keys: Keys, state: str, caplog: pytest.LogCaptureFixture
) -> None:
    service = Recorder(redis, keys, **{state: broken})
    life = Life("engine", service, settings(), redis)
    running = asyncio.create_task(life.run())
    if state in ("drain", "close"):
        await service.serving.wait()
        life.stop.set()
    assert await running == FAILED
    assert service.seen[-1][0] == "close"
    assert "OSError: broken" in caplog.text
    assert await redis.keys() == []


async def test_serve_that_returns_is_a_failure(redis: Redis, keys: Keys, caplog: pytest.LogCaptureFixture) -> None:
    assert await Life("engine", Recorder(redis, keys, serve=nothing), settings(), redis).run() == FAILED
    assert "serve returned" in caplog.text


async def test_configuration_found_wrong_at_startup(redis: Redis, keys: Keys, caplog: pytest.LogCaptureFixture) -> None:
    async def refuse() -> None:
        raise ConfigError("MILLRACE_SHARDS is 2")

    assert await Life("engine", Recorder(redis, keys, startup=refuse), settings(), redis).run() == MISCONFIGURED
    assert "Traceback" not in caplog.text


async def test_stop_during_startup(redis: Redis, keys: Keys) -> None:
    service = Recorder(redis, keys, startup=forever)
    life = Life("engine", service, settings(), redis)
    running = asyncio.create_task(life.run())
    async with asyncio.timeout(PATIENCE_S):
        while not service.seen:
            await redis.ping()
    life.stop.set()
    assert await running == 0
    assert service.seen == [("startup", "starting"), ("close", "starting")]


async def test_drain_has_a_deadline(redis: Redis, keys: Keys, caplog: pytest.LogCaptureFixture) -> None:
    service = Recorder(redis, keys, drain=forever)
    life = Life("engine", service, settings(drain_s=0.01), redis)
    running = asyncio.create_task(life.run())
    await service.serving.wait()
    life.stop.set()
    assert await running == 0
    assert service.seen[-1] == ("close", "draining")
    assert "not drained within drain_s" in caplog.text


@pytest.mark.parametrize("while_draining", [True, False])
async def test_a_drain_is_ended_from_outside(redis: Redis, keys: Keys, while_draining: bool) -> None:
    service = Recorder(redis, keys, drain=forever)
    life = Life("engine", service, settings(drain_s=3600.0), redis)
    running = asyncio.create_task(life.run())
    await service.serving.wait()
    if not while_draining:  # signals that come together are delivered in any order
        life.end_drain()
    life.stop.set()
    async with asyncio.timeout(PATIENCE_S):
        while while_draining and ("drain", "draining") not in service.seen:
            await redis.ping()
        if while_draining:
            life.end_drain()
            life.end_drain()
        assert await running == 0
    life.end_drain()
    assert service.seen[-1] == ("close", "draining")


async def test_a_drain_is_not_ended_by_a_signal_from_long_before(
    redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.service.TOGETHER_S", 0.0)
    drained = asyncio.Event()

    async def drain() -> None:
        await redis.ping()
        drained.set()

    service = Recorder(redis, keys, drain=drain)
    life = Life("engine", service, settings(drain_s=3600.0), redis)
    running = asyncio.create_task(life.run())
    await service.serving.wait()
    life.end_drain()
    await redis.ping()
    life.stop.set()
    assert await running == 0
    assert drained.is_set()


async def test_a_redis_that_never_answers_does_not_keep_it_from_ending(
    redis: Redis, keys: Keys, redis_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    silent = socket.socket(socket.AF_UNIX)  # the kernel takes connections, and nobody reads from them
    silent.bind(str(tmp_path / "silent"))
    silent.listen(100)
    proxy = Proxy(tmp_path / "proxy", Path(redis_url.removeprefix("unix://")))
    await proxy.start()
    ours = connect(proxy.url)
    service = Recorder(redis, keys, drain=forever)
    life = Life("engine", service, settings(drain_s=0.01), ours)
    running = asyncio.create_task(life.run())
    await service.serving.wait()
    life._renewal_s = 0.01
    proxy.target = tmp_path / "silent"
    assert proxy.swallow()
    life.stop.set()
    async with asyncio.timeout(PATIENCE_S):
        assert await running == 0
    assert service.seen[-1][0] == "close"
    assert "lease not released; it will expire" in caplog.text
    await ours.aclose()
    await proxy.close()
    silent.close()


async def test_lease_is_renewed_and_outlives_failures(
    redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = Recorder(redis, keys)
    life = often(Life("engine", service, settings(), redis))
    running = asyncio.create_task(life.run())
    await service.serving.wait()
    renew, outage = leases.Lease.renew, asyncio.Event()

    async def fail(*_: object) -> None:
        outage.set()
        raise ConnectionError("gone")

    monkeypatch.setattr(leases.Lease, "renew", fail)
    async with asyncio.timeout(PATIENCE_S):
        await outage.wait()
        await redis.delete(keys.replica("engine", "a"))  # it has expired
        assert await leases.live(redis, keys, "engine") == []
        monkeypatch.setattr(leases.Lease, "renew", renew)
        while not (found := await leases.live(redis, keys, "engine")):
            pass
    assert found[0].load == {"running": 2.0}
    assert "lease not renewed" in caplog.text
    life.stop.set()
    assert await running == 0


# --- as a process

PROGRAM = """
    import asyncio, atexit, gc, os, signal, sys
    import uvloop
    from shared import crash_points
    from shared.config import CommonSettings
    from shared.launch import launch

    class Tiny:
        async def startup(self): print("startup", flush=True)
        async def serve(self):
            looks = gc.get_stats()
            for _ in range(20): [[] for _ in range(5_000)]  # as live requests come and go
            calm = gc.get_freeze_count() and gc.get_stats() == looks
            print("serve" if calm else "the collector would look at all of this", flush=True)
            if sys.argv[1] == "fail": raise OSError("broken")
            crash_points.crash_point("tiny.serve.after")
            await asyncio.sleep(3600)
        async def drain(self):
            print("drain", flush=True)
            if sys.argv[1] == "slow": await asyncio.sleep(3600)
        async def close(self): print("close", flush=True)
        def load(self): return {}

    def end_drain():
        if sys.argv[1] == "slow": os.kill(os.getpid(), signal.SIGUSR1)

    def build(settings, redis, tracing):
        end_drain()
        return Tiny()

    atexit.register(end_drain)
    loop = uvloop.new_event_loop if sys.argv[2:] else None
    sys.exit(launch("tiny", CommonSettings, build, os.environ, loop))
"""


def start(url: str, *how: str, **variables: str) -> "subprocess.Popen[str]":
    given = {"MILLRACE_REDIS_URL": url, "MILLRACE_MODEL": "/none", "MILLRACE_NAMESPACE": "test", **variables}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), *how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | given,
    )


def wait_for(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdout is not None
    assert next(process.stdout).strip() == line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_a_process_in_order(redis: Redis, redis_url: str, number: signal.Signals) -> None:
    with start(redis_url, "well") as process:
        wait_for(process, "startup")
        wait_for(process, "serve")
        process.send_signal(number)
        out, log = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out.split()) == (0, ["drain", "close"])
    assert [word for line in log.splitlines() for word in line.split() if word.startswith("msg=")] == [
        "msg=starting",
        "msg=ready",
        "msg=draining",
    ]
    assert await redis.keys() == []


def test_it_dies_where_it_is_told_to(redis_url: str) -> None:
    with start(redis_url, "well", MILLRACE_CRASH_AT="tiny.serve.after") as process:
        out, _ = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out.split()) == (137, ["startup", "serve"])


def test_a_second_signal_ends_it_at_once(redis_url: str) -> None:
    with start(redis_url, "slow") as process:
        wait_for(process, "startup")
        wait_for(process, "serve")
        process.terminate()
        wait_for(process, "drain")
        process.terminate()
        out, _ = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (128 + signal.SIGTERM, "")


@pytest.mark.parametrize("loop", [[], ["uvloop"]])
def test_a_signal_that_ends_the_drain_never_ends_the_process(redis_url: str, loop: list[str]) -> None:
    with start(redis_url, "slow", *loop, MILLRACE_DRAIN_S="3600") as process:
        wait_for(process, "startup")
        wait_for(process, "serve")
        process.terminate()
        wait_for(process, "drain")
        process.send_signal(signal.SIGUSR1)
        out, _ = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out.split()) == (0, ["close"])


def test_a_failure_ends_it_with_status_1_and_a_traceback(redis_url: str) -> None:
    with start(redis_url, "fail") as process:
        out, log = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out.split()) == (FAILED, ["startup", "serve", "close"])
    assert "OSError: broken" in log
    assert "Traceback" in log
    assert all(line.startswith("ts=") for line in log.splitlines())


def test_a_wrong_setting_is_one_line(redis_url: str) -> None:
    with start(redis_url, "well", MILLRACE_SHARDZ="1") as process:
        _, log = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == MISCONFIGURED
    assert log == "tiny: MILLRACE_SHARDZ is not a setting of this service; did you mean MILLRACE_SHARDS?\n"


async def test_a_replica_that_differs_is_refused_with_the_difference(
    redis: Redis, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    there = leases.Lease(redis, keys, "gateway", "g", 60_000, facts={"shards": "4", "max_model_len": "64"})
    await there.join("ready")
    service = Recorder(redis, keys)
    service.close = nothing  # type: ignore[method-assign]  # it has no lease to look at
    life = Life("engine", service, settings(lease_ms=30), redis, {"shards": "4", "max_model_len": "32"})
    assert await life.run() == MISCONFIGURED
    assert "max_model_len is 32 here and 64 at gateway:g" in caplog.records[-1].__dict__["reason"]
    assert service.seen == []


async def test_a_fleet_that_was_killed_is_replaced_by_another_once_its_leases_are_over(
    redis: Redis, keys: Keys
) -> None:
    there = leases.Lease(redis, keys, "gateway", "g", 50, facts={"shards": "4"})
    await there.join("ready")
    service = Recorder(redis, keys)
    life = often(Life("engine", service, settings(), redis, {"shards": "2"}))
    running = asyncio.create_task(life.run())
    await service.serving.wait()
    life.stop.set()
    assert await running == 0


async def test_it_waits_until_a_newer_replica_has_left_nothing_that_it_cannot_read(
    redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = asyncio.Event()

    async def look(*asked: Any) -> bool:
        looked.set()
        return await holds_newer(*asked)

    async def newer_writes(version: int) -> None:
        newer = leases.Replica("postproc", "p", "ready", newest=VERSION + 1, writes=version)
        await redis.set(keys.replica("postproc", "p"), msgspec.json.encode(newer))

    monkeypatch.setattr("shared.service.holds_newer", look)
    await redis.sadd(keys.replicas("postproc"), "p")  # type: ignore[misc]
    await newer_writes(VERSION + 1)
    await redis.xadd(keys.tokens(0), {"v": VERSION + 1, "m": b"?"})
    service = Recorder(redis, keys)
    life = often(Life("engine", service, settings(), redis))
    running = asyncio.create_task(life.run())
    await eventually(lambda: redis.exists(keys.replica("engine", "a")))
    assert not looked.is_set(), "before it writes no more, it may write anything"
    await newer_writes(VERSION)
    await looked.wait()
    assert not service.serving.is_set()
    await redis.delete(keys.tokens(0))
    await service.serving.wait()
    life.stop.set()
    assert await running == 0


@pytest.mark.parametrize(("dead_after_s", "looked_at"), [(3600.0, [0, 1, 2, 3]), (0.0, [])])
async def test_tokens_are_waited_for_while_a_newer_postproc_may_only_be_late_with_its_lease(
    redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch, dead_after_s: float, looked_at: list[int]
) -> None:
    looks = []

    async def look(redis: Redis, keys: Keys, shards: Collection[int], versions: Collection[int]) -> bool:
        looks.append((list(shards), list(versions)))
        return False

    monkeypatch.setattr("shared.service.holds_newer", look)
    newer = leases.Replica("gateway", "g", "ready", newest=VERSION + 1, writes=VERSION)
    await redis.sadd(keys.replicas("gateway"), "g")  # type: ignore[misc]
    await redis.set(keys.replica("gateway", "g"), msgspec.json.encode(newer))
    service = Recorder(redis, keys)
    life = Life("engine", service, settings(shards=4), redis)
    life._dead_after_s = dead_after_s
    running = asyncio.create_task(life.run())
    await service.serving.wait()
    assert looks == [(looked_at, [VERSION + 1])]
    life.stop.set()
    assert await running == 0


async def test_a_newer_replica_that_was_seen_may_only_be_late_with_its_lease(
    redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has written is there, and it translates it when it wakes."""
    seen, gone, looks_since, translated = asyncio.Event(), asyncio.Event(), 0, False

    async def look(*_: object) -> bool:
        nonlocal looks_since
        seen.set()
        looks_since += not await redis.exists(lease)
        if looks_since == 2:
            gone.set()
        return not translated

    monkeypatch.setattr("shared.service.holds_newer", look)
    lease = keys.replica("gateway", "g")
    await redis.sadd(keys.replicas("gateway"), "g")  # type: ignore[misc]
    newer = leases.Replica("gateway", "g", "ready", newest=VERSION + 1, writes=VERSION)
    await redis.set(lease, msgspec.json.encode(newer))
    service = Recorder(redis, keys)
    life = often(Life("engine", service, settings(), redis))
    life._dead_after_s = life._raise_after_s = 3600.0
    running = asyncio.create_task(life.run())
    async with asyncio.timeout(PATIENCE_S):
        await seen.wait()
        await redis.delete(lease)
        await gone.wait()
        assert not service.serving.is_set()
        translated = True
        await service.serving.wait()
    life.stop.set()
    assert await running == 0


async def test_it_does_not_wait_for_ever_for_a_newer_replica(
    redis: Redis, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    newer = leases.Replica("mm_encoder", "m", "ready", newest=VERSION + 1, writes=VERSION)
    await redis.sadd(keys.replicas("mm_encoder"), "m")  # type: ignore[misc]
    await redis.set(keys.replica("mm_encoder", "m"), msgspec.json.encode(newer))
    for key in (keys.stream(GENERATE), keys.tokens(0)):
        await redis.xadd(key, {"v": VERSION + 1, "m": b"?"})
    service = Recorder(redis, keys)
    life = Life("engine", service, settings(), redis)
    life._raise_after_s = 0.0
    running = asyncio.create_task(life.run())
    await service.serving.wait()
    assert "newer replicas do not translate" in caplog.text
    life.stop.set()
    assert await running == 0


async def eventually(holds: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await holds():  # noqa: ASYNC110 - Redis has no event for it
            await asyncio.sleep(0)
