"""One process dies, or stands still, at one named moment of the way of one request; and the request must not care."""

import asyncio
import random
import re
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from chaos_batches import run_batch
from chaos_client import Broken, Client, Manner, Transcript
from chaos_leftovers import GROUPS, wait_until_clean
from chaos_quiet import Answered
from chaos_requests import Ask
from chaos_system import LOOK_S, REQUEST_TIMEOUT_S, ROOT, Replica, System
from machine import PATIENCE_S
from redis.exceptions import ResponseError
from system import data_url

from shared.bus.keys import ENCODE, GENERATE
from shared.watchdog import HUNG

STEP_TIMEOUT_S = 2.0  # of a replica that is to hang; on a busy machine slow steps make the bound larger
REACH = re.compile(r'\bcrash_point\(f?"([^"]+)"\)')
WRITE = re.compile(r'\._write\(\s*"(\w+)"')

Expected = dict[str, tuple[Ask, Transcript]]  # by kind: a request and its answer


def points() -> list[str]:
    """Return every named moment in the services, as their sources have them."""
    found = set()
    # The consumer's are both services' that take work.
    for name in REACH.findall((ROOT / "shared/bus/consumer.py").read_text()):
        found |= {name.replace("{self._service}", service) for service in ("engine", "mm_encoder")}
    for path in (ROOT / "services").rglob("*.py"):
        source = path.read_text()
        for name in REACH.findall(source):
            # One around every write of a service, by the name of what is written.
            found |= {name.replace("{what}", what) for what in WRITE.findall(source)} if "{what}" in name else {name}
    return sorted(found)


class Stage:
    """Stage of a scenario: a running system of one replica of each service, one of which is to fail."""

    def __init__(self, system: System, expected: Expected, http: httpx.AsyncClient, crash_at: str) -> None:
        """`crash_at`: as the setting of that name."""
        self.system = system
        self.service = crash_at.partition(".")[0]
        self._expected = expected
        self._http = http
        self._crash_at = crash_at
        self._mending: asyncio.Task[None] | None = None
        self._key = f"{crash_at} {random.random()}"

    @property
    def replica(self) -> Replica:
        return self.system.of(self.service)[-1]

    async def arm(self, *, same_name: bool = False) -> None:
        """In place of the service's replica, start one that fails at the moment; and see to what follows."""
        await self.stop()
        hangs = self._crash_at.endswith(":hang")
        settings = {"step_timeout_s": STEP_TIMEOUT_S} if hangs else {}
        self.replica.start(crash_at=self._crash_at, same_name=same_name, **settings)
        stops = self._crash_at.endswith(":stop")
        mend = self._take_over if hangs else self._wake_late if stops else self._start_again
        self._mending = asyncio.create_task(mend())
        for _ in range(int(PATIENCE_S / LOOK_S)):
            if self.replica.halted or not self.replica.running or await self.system.state(self.replica) == "ready":
                return
            await asyncio.sleep(LOOK_S)
        raise AssertionError(f"{self.replica} was not ready in time\n{self.replica.tail()}")

    async def stop(self) -> None:
        """The service has no replica now, and nothing was interrupted."""
        self.replica.terminate()
        status = await self.replica.ended(PATIENCE_S)
        assert status in (0, -signal.SIGKILL), f"{self.replica} ended with status {status}\n{self.replica.tail()}"

    async def ask(self, kind: str, **manner: Any) -> None:
        """Ask for it, and check the answer."""
        ask, expected = self._expected[kind]
        how = Manner(key=None if "leaves_after" in manner else self._key, **manner)
        got = await self._client().ask(ask, how, REQUEST_TIMEOUT_S)
        wrong = got.differs(expected) if how.leaves_after is None else got.begins(expected)
        assert not wrong, f"{kind}: {wrong}\n{self.system.tails()}"

    async def run_batch(self, kind: str, *, cancel: bool = False) -> None:
        """Ask for it in each line of a batch, and check the results."""
        ask, expected = self._expected[kind]
        await run_batch(self.system, self._http, ask, expected, cancel=cancel)

    async def ask_badly(self) -> None:
        """With a picture that is none: a 400 and nothing else."""
        ask, _ = self._expected["image"]
        part = {"type": "image_url", "image_url": {"url": data_url(b"no picture", "image/png")}}
        body = {**ask.body, "messages": [{"role": "user", "content": [part]}]}
        with pytest.raises(Broken, match="400"):
            await self._client().ask(Ask(-1, "bad", body), Manner(key=self._key), REQUEST_TIMEOUT_S)

    async def waiting(self, stream: str) -> None:
        """Return when the stream has an entry."""
        for _ in range(int(PATIENCE_S / LOOK_S)):
            if await self.system.redis.xlen(self.system.keys.stream(stream)):
                return
            await asyncio.sleep(LOOK_S)
        raise AssertionError(f"nothing came into {stream}\n{self.system.tails()}")

    async def encoded(self) -> None:
        """Return when nothing is to be encoded; a prompt is forwarded before."""
        for _ in range(int(PATIENCE_S / LOOK_S)):
            if not await self.system.redis.xlen(self.system.keys.stream(ENCODE)):
                return
            await asyncio.sleep(LOOK_S)
        raise AssertionError(f"entries stayed in {ENCODE}\n{self.system.tails()}")

    async def evict(self) -> None:
        """Remove all embeddings, as Redis or the byte budget would."""
        prefix = self.system.keys.blob("embeds", "")
        if found := [key async for key in self.system.redis.scan_iter(match=prefix + "*", count=1000)]:
            await self.system.redis.unlink(*found)

    async def damage(self) -> None:
        """Cut all embeddings short."""
        redis, prefix = self.system.redis, self.system.keys.blob("embeds", "")
        async for key in redis.scan_iter(match=prefix + "*:0", count=1000):
            blob: Any = await redis.get(key)
            await redis.set(key, blob[:-8], keepttl=True)

    async def poison(self, stream: str) -> None:
        """The waiting entry has been delivered too often already."""
        key, group = self.system.keys.stream(stream), GROUPS[stream]
        taken: Any = await self.system.redis.xreadgroup(group, "nobody", {key: ">"}, count=1)
        [[_, [[entry_id, _]]]] = taken
        await self.system.redis.xclaim(key, group, "nobody", 0, [entry_id], retrycount=1000, justid=True)

    async def end(self) -> None:
        """Check that the replica has failed and was mended, and that nothing is left behind."""
        assert self._mending is not None
        done, _ = await asyncio.wait([self._mending], timeout=PATIENCE_S)
        if not done:
            self._mending.cancel()
            raise AssertionError(f"{self._crash_at} was not reached\n{self.replica.tail()}")
        self._mending.result()
        left = await wait_until_clean(self.system, PATIENCE_S, uploads=self.service != "gateway")
        assert not left, f"left behind: {left}\n{self.system.tails()}"

    # ------------------------------------------------------------------------------------------------- mending

    async def _start_again(self) -> None:
        status = None
        while status is None:
            status = await self.replica.ended(PATIENCE_S)
        assert status == 137, f"{self.replica} ended with status {status}, not by the crash\n{self.replica.tail()}"
        self.replica.start(same_name=True)
        await self.system.ready([self.replica])

    async def _take_over(self) -> None:
        """Start another beside the one that is to hang when that one has the request; then let that one end itself."""
        hung = self.replica
        while not await self._has_work(hung):
            assert hung.running, f"{hung} ended with status {hung.status}\n{hung.tail()}"
            await asyncio.sleep(LOOK_S)
        other = self.system.add(self.service)
        other.start()
        status = await hung.ended(PATIENCE_S)
        assert status == HUNG, f"{hung} ended with status {status}, not by its watchdog\n{hung.tail()}"
        assert "a step hangs" in hung.tail()
        await self.system.ready([other])
        self.system.replicas.remove(hung)

    async def _wake_late(self) -> None:
        """Start another; wake the one that stands still when the other has all that it had; then let it go."""
        asleep = self.replica
        while not asleep.halted:
            assert asleep.running, f"{asleep} ended with status {asleep.status}\n{asleep.tail()}"
            await asyncio.sleep(LOOK_S / 5)
        other = self.system.add(self.service)
        other.start()
        await self.system.ready([other])
        for _ in range(int(PATIENCE_S / LOOK_S)):
            if not await self._has_work(asleep):
                break
            await asyncio.sleep(LOOK_S)
        else:
            raise AssertionError(f"nobody took over from {asleep}\n{self.system.tails()}")
        asleep.wake()
        await asyncio.sleep(1.0)  # for it to do what it should not
        asleep.terminate()
        status = await asleep.ended(PATIENCE_S)
        assert status == 0, f"{asleep} woke, and ended with status {status}\n{asleep.tail()}"
        self.system.replicas.remove(asleep)

    async def _has_work(self, replica: Replica) -> bool:
        """Entries of a work stream, or a shard."""
        redis, keys = self.system.redis, self.system.keys
        if replica.service == "postproc":
            owners: Any = await redis.hgetall(keys.shards())
            return any(owner.decode().endswith(f" {replica.name}") for owner in owners.values())
        for stream, group in GROUPS.items():
            if group == replica.service:
                try:
                    pending = await redis.xpending_range(keys.stream(stream), group, "-", "+", 1, replica.name)
                except ResponseError:
                    return False
                return bool(pending)
        return False

    def _client(self) -> Client:
        return Client(self._http, lambda: [gateway.url for gateway in self.system.of("gateway")], random.Random(0))


Scenario = Callable[[Stage], Awaitable[None]]


async def text(stage: Stage) -> None:
    await stage.arm()
    await stage.ask("long")


async def whole(stage: Stage) -> None:
    """Not streamed."""
    await stage.arm()
    await stage.ask("long", stream=False)


async def logprobs(stage: Stage) -> None:
    await stage.arm()
    await stage.ask("logprobs")


async def batch(stage: Stage) -> None:
    await stage.arm()
    await stage.run_batch("long")


async def cancelled_batch(stage: Stage) -> None:
    """In the middle."""
    await stage.arm()
    await stage.run_batch("long", cancel=True)


async def stop_string(stage: Stage) -> None:
    await stage.arm()
    await stage.ask("stop")


async def picture(stage: Stage) -> None:
    """Encoded, and not found among the embeddings."""
    await stage.evict()
    await stage.arm()
    await stage.ask("image")


async def bad_picture(stage: Stage) -> None:
    await stage.arm()
    await stage.ask_badly()


async def leaves(stage: Stage) -> None:
    """In the middle, and for good."""
    await stage.arm()
    await stage.ask("long", leaves_after=10)


async def breaks(stage: Stage) -> None:
    """In the middle, and comes back."""
    await stage.arm()
    await stage.ask("long", breaks_after=10)


async def resumed(stage: Stage) -> None:
    """The engine dies in the middle, and the next one fails as it takes over."""
    [engine] = stage.system.of("engine")
    asking = asyncio.create_task(stage.ask("long"))
    await stage.system.generating()
    engine.kill()
    await stage.arm(same_name=True)
    await asking


async def evicted(stage: Stage) -> None:
    """The embeddings are gone when the engine comes for them."""
    await _without_embeddings(stage, stage.evict)


async def damaged(stage: Stage) -> None:
    """The embeddings are not those of the picture when the engine comes for them."""
    await _without_embeddings(stage, stage.damage)


async def _without_embeddings(stage: Stage, lose: Callable[[], Awaitable[None]]) -> None:
    await stage.stop()
    asking = asyncio.create_task(stage.ask("image"))
    await stage.waiting(GENERATE)
    await stage.encoded()
    await lose()
    await stage.arm()
    await asking


async def left_before_the_engine(stage: Stage) -> None:
    await stage.stop()
    await stage.ask("long", leaves_after=0)
    await stage.arm()


async def left_before_the_encoder(stage: Stage) -> None:
    await stage.stop()
    await stage.ask("image", leaves_after=0)
    await stage.arm()


async def poison_of_the_engine(stage: Stage) -> None:
    await _poison(stage, GENERATE, "long")


async def poison_of_the_encoder(stage: Stage) -> None:
    await _poison(stage, ENCODE, "image")


async def _poison(stage: Stage, stream: str, kind: str) -> None:
    """Answered with a 500, once, and kept for people."""
    await stage.stop()
    asking = asyncio.create_task(stage.ask(kind))
    await stage.waiting(stream)
    await stage.poison(stream)
    await stage.arm()
    with pytest.raises(Broken, match="500"):
        await asking
    quarantine = stage.system.keys.quarantine(stream)
    assert await stage.system.redis.xlen(quarantine) == 1
    await stage.system.redis.delete(quarantine)


async def play(stage: Stage, scenario: Scenario) -> None:
    """The whole of one case."""
    async with asyncio.timeout(2 * REQUEST_TIMEOUT_S):
        await scenario(stage)
        await stage.end()


def by_kind(answered: Answered) -> Expected:
    """The last request of each kind, and its answer when nothing fails."""
    return {ask.kind: (ask, answer) for ask, answer in answered}
