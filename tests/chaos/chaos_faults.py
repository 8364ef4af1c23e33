"""A seeded sequence of faults, each injected and mended."""

import asyncio
import contextlib
import os
import random
import signal
from collections import Counter
from collections.abc import Container, Coroutine
from typing import Any

from chaos_bombs import bombs, drop
from chaos_crash import STEP_TIMEOUT_S
from chaos_garbage import strew
from chaos_next_build import write_next_build
from chaos_rush import rush
from chaos_system import LEASE_MS, LOOK_S, ROOT, SEGMENTS, SERVICES, Replica, System
from machine import PATIENCE_S
from redis_refusals import REFUSALS

from services.engine.ranks.processes import LOST
from shared.watchdog import HUNG

LEASE_S = LEASE_MS / 1000
# service: where its thread that computes is before a step, and within how many steps it is to hang
COMPUTING = {"engine": ("engine.step.before", 100), "mm_encoder": ("mm_encoder.tower.before", 5)}
# kind: weight
KINDS = {
    "kill": 10,
    "kill twice": 2,  # two replicas of anything at once
    "pause": 6,  # by SIGSTOP, shorter or longer than a lease
    "hang": 2,  # the thread that computes, while the event loop goes on
    "terminate": 4,
    "kill redis": 2,
    "stop redis": 1,
    "pause redis": 1,
    "refuse": 2,  # writes, or everything: a full disk or memory, no replicas, a busy script, a demotion
    "failover": 1,  # of Redis, to another server with all its data
    "half-open": 1,  # all links to Redis stay open, and swallow what is sent
    "bombs": 2,  # media that take long to decode, from two clients at once
    "evict": 2,  # embeddings, as Redis or the byte budget would; some are cut short instead
    "garbage": 2,  # entries that nobody can read, in every stream
    "rush": 2,  # clients that connect, ask and are gone
    "skew": 2,  # in place of a replica, one of the next build, whose messages are of another version; then back
}
# Where engines are several processes. One that falls silent is noticed once it serves.
RANK_KINDS = {"kill rank": 4, "halt rank": 3}


class Faults:
    """Injects faults until cancelled; `mend` then brings everything back."""

    def __init__(self, system: System, rng: random.Random, every_s: tuple[float, float]) -> None:
        self.injected: Counter[str] = Counter()
        self.story: list[str] = []
        self.gateways_killed = False
        self._system = system
        self._rng = rng
        self._every_s = every_s
        self._kinds = KINDS | (RANK_KINDS if system.ranks > 1 else {})
        self._next_build = system.directory / "next-build"
        self._mending: set[asyncio.Task[None]] = set()
        self._busy: set[Replica] = set()
        self._redis_busy = False
        self._mended = asyncio.Event()

    async def run(self) -> None:
        began = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(self._rng.uniform(*self._every_s))
            [kind] = self._rng.choices(list(self._kinds), weights=list(self._kinds.values()))
            if what := await self._inject(kind):
                self.injected[kind] += 1
                self.story.append(f"{asyncio.get_running_loop().time() - began:6.1f} s {what}")

    async def mend(self) -> None:
        """Wait until what was broken runs again, and all of it is ready."""
        self._mended.set()
        await asyncio.gather(*self._mending)
        for replica in self._system.replicas:
            if not replica.running:
                replica.start()
        await self._system.ready(self._system.replicas)

    async def _inject(self, kind: str) -> str:
        rng = self._rng
        match kind:
            case "kill":
                return self._each(1, self._kill)
            case "kill twice":
                return self._each(2, self._kill)
            case "pause":
                return self._each(1, self._pause)
            case "hang":
                return self._each(1, self._hang, COMPUTING)
            case "terminate":
                return self._each(1, self._terminate)
            case "kill redis":
                return self._redis(f"for {(down := rng.uniform(0, 2.5)):.1f} s", self._system.restart_redis(down))
            case "stop redis":
                orderly = self._system.restart_redis(down := rng.uniform(0, 1), orderly=True)
                return self._redis(f"in order for {down:.1f} s", orderly)
            case "pause redis":
                return self._redis(f"paused for {(down := rng.uniform(0.2, 3)):.1f} s", self._system.pause_redis(down))
            case "refuse":
                code, down = rng.choice(sorted(REFUSALS)), rng.uniform(0.2, 3)
                return self._redis(f"refuses for {down:.1f} s: {code}", self._system.refuse(code, down))
            case "failover":
                return self._redis("fails over", self._system.fail_over())
            case "half-open":
                return f"{self._system.proxy.swallow()} links to redis half-open"
            case "bombs":
                return self._bombs()
            case "garbage":
                self._track(asyncio.create_task(strew(self._system, random.Random(rng.random()))))
                return "garbage in every stream"
            case "rush":
                gateway = rng.choice(self._system.of("gateway"))
                self._track(asyncio.create_task(rush(gateway.url, random.Random(rng.random()))))
                return f"a rush at {gateway}"
            case "skew":
                return self._each(1, self._skew)
            case "kill rank":
                return await self._lose_rank(signal.SIGKILL)
            case "halt rank":
                return await self._lose_rank(signal.SIGSTOP)
            case _:
                return f"evict {await self._evict()} embeddings"

    def _each(self, count: int, how: Any, among: Container[str] = SERVICES) -> str:
        """Choose by service first, so that none is spared for having few replicas."""
        told = []
        for _ in range(count):
            services = sorted({replica.service for replica in self._well() if replica.service in among})
            if services:
                service = self._rng.choice(services)
                told.append(how(self._rng.choice([one for one in self._well() if one.service == service])))
        return ", ".join(told)

    def _well(self) -> list[Replica]:
        return [one for one in self._system.replicas if one.running and one not in self._busy]

    def _kill(self, replica: Replica) -> str:
        down, same_name = self._rng.choice([0, self._rng.uniform(0, 2 * LEASE_S)]), self._rng.random() < 0.5
        replica.kill()
        self.gateways_killed |= replica.service == "gateway"
        self._mend(replica, self._start(replica, down, same_name))
        return f"kill {replica} for {down:.1f} s{', same name' if same_name else ''}"

    def _pause(self, replica: Replica) -> str:
        seconds = self._rng.choice([self._rng.uniform(0.1, LEASE_S), self._rng.uniform(LEASE_S, 3 * LEASE_S)])
        replica.pause()
        self._mend(replica, self._wake(replica, seconds))
        return f"pause {replica} for {seconds:.1f} s"

    def _hang(self, replica: Replica) -> str:
        """In its place, one that is to hang."""
        replica.kill()
        point, steps = COMPUTING[replica.service]
        crash_at = f"{point}:{self._rng.randint(1, steps)}:hang"
        self._mend(replica, self._hang_and_start(replica, crash_at))
        return f"hang {replica} at {crash_at}"

    def _terminate(self, replica: Replica) -> str:
        self._mend(replica, self._replace(replica))
        return f"terminate {replica}"

    def _redis(self, how: str, mended: Coroutine[Any, Any, None]) -> str:
        if self._redis_busy:
            mended.close()
            return ""
        self._redis_busy = True

        async def restart() -> None:
            try:
                await mended
            finally:
                self._redis_busy = False

        self._track(asyncio.create_task(restart()))
        return f"redis {how}"

    def _bombs(self) -> str:
        gateway = self._rng.choice(self._system.of("gateway"))
        for part in self._rng.choices(bombs(), k=2):
            self._track(asyncio.create_task(drop(gateway.url, part)))
        return f"two bombs at {gateway}"

    def _skew(self, replica: Replica) -> str:
        if not self._next_build.exists():
            write_next_build(self._next_build)
        seconds, dies = self._rng.uniform(0, 3 * LEASE_S), self._rng.random() < 0.5
        self._mend(replica, self._upgrade_and_go_back(replica, seconds, dies))
        return f"{replica} is of the next build for {seconds:.1f} s{', and dies' if dies else ''}"

    async def _lose_rank(self, number: signal.Signals) -> str:
        """Kill or halt a process of an engine that serves, which must then end by itself, and say which it was."""
        engines = [one for one in self._well() if one.service == "engine"]
        serving = [one for one in engines if await self._system.state(one) == "ready" and one.ranks]
        if not serving:
            return ""
        replica = self._rng.choice(serving)
        if replica in self._busy or not (ranks := replica.ranks):
            return ""
        rank = self._rng.randrange(len(ranks))
        os.kill(ranks[rank], number)
        self._mend(replica, self._start_without(replica, rank + 1))
        return f"{number.name} to rank {rank + 1} of {replica}"

    async def _evict(self) -> int:
        if self._redis_busy:
            return 0
        redis, prefix = self._system.redis, self._system.keys.blob("embeds", "")
        found = sorted([key async for key in redis.scan_iter(match=prefix + "*", count=1000)])
        chosen = [key for key in found if self._rng.random() < 0.5]
        for key in chosen:
            if await redis.type(key) == b"string" and self._rng.random() < 0.3:
                await redis.set(key, (await redis.get(key) or b"")[:-8], keepttl=True)
            else:
                await redis.unlink(key)
        return len(chosen) + self._evict_segments()

    def _evict_segments(self) -> int:
        """Remove half of the segments, or put others in their place that are too short."""
        found = sorted(path for path in self._system.directory.glob(f"{SEGMENTS}/*") if path.is_file())
        chosen = [path for path in found if self._rng.random() < 0.5]
        for path in chosen:
            if self._rng.random() < 0.7:
                path.unlink(missing_ok=True)
            elif path.exists():
                damaged = path.with_suffix(".damaged")
                damaged.write_bytes(path.read_bytes()[:-8])
                damaged.rename(path)
        return len(chosen)

    # ------------------------------------------------------------------------------------------------- mending

    async def _start(self, replica: Replica, down_s: float, same_name: bool) -> None:
        await asyncio.sleep(down_s)
        replica.start(same_name=same_name)

    async def _hang_and_start(self, replica: Replica, crash_at: str) -> None:
        replica.start(crash_at=crash_at, step_timeout_s=STEP_TIMEOUT_S)
        while await replica.ended(10 * LOOK_S) is None and not self._mended.is_set():
            pass
        if replica.running:
            # It may hang at this moment, or never have had so many steps.
            replica.kill()
        else:
            assert replica.status == HUNG, f"{replica} ended with status {replica.status}\n{replica.tail()}"
        replica.start()

    async def _start_without(self, replica: Replica, rank: int) -> None:
        status = await replica.ended(PATIENCE_S)
        assert status == LOST + rank, f"{replica} ended with status {status}\n{replica.tail()}"
        replica.start()

    async def _wake(self, replica: Replica, seconds: float) -> None:
        await asyncio.sleep(seconds)
        replica.wake()

    async def _replace(self, replica: Replica) -> None:
        """A rolling restart: the next pod comes when the old one has gone."""
        ready = await self._system.state(replica) == "ready"
        replica.terminate()
        status = await replica.ended(PATIENCE_S)
        # Before it is ready it may not have come to say what SIGTERM means.
        assert status == 0 or (status == -signal.SIGTERM and not ready), (
            f"{replica} ended with status {status} when told to stop\n{replica.tail()}"
        )
        replica.start()

    async def _upgrade_and_go_back(self, replica: Replica, seconds: float, dies: bool) -> None:
        replica.root = self._next_build
        await self._replace(replica)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._mended.wait()
        replica.root = ROOT
        if not dies:
            await self._replace(replica)
            return
        self.gateways_killed |= replica.service == "gateway"
        replica.kill()
        replica.start()

    def _mend(self, replica: Replica, how: Coroutine[Any, Any, None]) -> None:
        self._busy.add(replica)
        task = asyncio.create_task(how)
        task.add_done_callback(lambda _: self._busy.discard(replica))
        self._track(task)

    def _track(self, task: asyncio.Task[None]) -> None:
        self._mending.add(task)
