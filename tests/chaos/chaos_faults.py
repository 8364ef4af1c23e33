"""What goes wrong: a seeded sequence of faults, each injected and mended."""

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from chaos_system import LEASE_MS, Replica, System
from machine import PATIENCE_S

LEASE_S = LEASE_MS / 1000
# kind: weight
KINDS = {
    "kill": 10,
    "kill twice": 2,  # two replicas of anything at once
    "pause": 6,  # by SIGSTOP, shorter or longer than a lease
    "terminate": 4,
    "kill redis": 2,
    "stop redis": 1,
    "pause redis": 1,
    "evict": 2,  # embeddings, as Redis or the byte budget would
}


class Faults:
    """Injects faults until cancelled; `mend` then brings everything back."""

    def __init__(self, system: System, rng: random.Random, every_s: tuple[float, float]) -> None:
        self.injected: Counter[str] = Counter()
        self.story: list[str] = []
        self.gateways_killed = False
        self._system = system
        self._rng = rng
        self._every_s = every_s
        self._mending: set[asyncio.Task[None]] = set()
        self._busy: set[Replica] = set()
        self._redis_busy = False

    async def run(self) -> None:
        began = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(self._rng.uniform(*self._every_s))
            [kind] = self._rng.choices(list(KINDS), weights=list(KINDS.values()))
            if what := await self._inject(kind):
                self.injected[kind] += 1
                self.story.append(f"{asyncio.get_running_loop().time() - began:6.1f} s {what}")

    async def mend(self) -> None:
        """Wait until what was broken runs again, and all of it is ready."""
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
            case "terminate":
                return self._each(1, self._terminate)
            case "kill redis":
                return self._redis(f"for {(down := rng.uniform(0, 2.5)):.1f} s", self._system.restart_redis(down))
            case "stop redis":
                orderly = self._system.restart_redis(down := rng.uniform(0, 1), orderly=True)
                return self._redis(f"in order for {down:.1f} s", orderly)
            case "pause redis":
                return self._redis(f"paused for {(down := rng.uniform(0.2, 3)):.1f} s", self._system.pause_redis(down))
            case _:
                return f"evict {await self._evict()} embeddings"

    def _each(self, count: int, how: Any) -> str:
        """Choose by service first, so that none is spared for having few replicas."""
        told = []
        for _ in range(count):
            services = sorted({replica.service for replica in self._well()})
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

    async def _evict(self) -> int:
        if self._redis_busy:
            return 0
        prefix = self._system.keys.blob("embeds", "")
        found = sorted([key async for key in self._system.redis.scan_iter(match=prefix + "*", count=1000)])
        chosen = [key for key in found if self._rng.random() < 0.5]
        return int(await self._system.redis.unlink(*chosen)) if chosen else 0

    # ------------------------------------------------------------------------------------------------- mending

    async def _start(self, replica: Replica, down_s: float, same_name: bool) -> None:
        await asyncio.sleep(down_s)
        replica.start(same_name=same_name)

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

    def _mend(self, replica: Replica, how: Coroutine[Any, Any, None]) -> None:
        self._busy.add(replica)
        task = asyncio.create_task(how)
        task.add_done_callback(lambda _: self._busy.discard(replica))
        self._track(task)

    def _track(self, task: asyncio.Task[None]) -> None:
        self._mending.add(task)
