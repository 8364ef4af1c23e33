"""A whole engine service in the test's event loop, on a real Redis, and what a reader of its tokens streams sees."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from engine_cases import FACTS, SumRunner, compile_grammar
from machine import PATIENCE_S
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from redis_clients import signed_in

from services.engine.__main__ import compose
from services.engine.metrics import EngineMetrics
from services.engine.run.runner import Launched, Runner
from services.engine.schedule.plan import Plan
from services.engine.schedule.sequence import EngineFacts
from services.engine.schedule.step_times import StepTimes
from services.engine.service import EngineService
from services.engine.settings import EngineSettings
from shared.bus.keys import GENERATE, Keys
from shared.bus.records import Records
from shared.bus.streams import LogReader
from shared.messages import Begin, Finish, Generate, TokenRun, Tokens
from shared.service import Life
from shared.tracing import OFF, Tracing


class GatedRunner:
    """Runs only as many steps as it is allowed to, so that a test knows where an engine stands."""

    def __init__(self, inner: Runner) -> None:
        self._inner = inner
        self._changed = threading.Condition()
        self._allowed = 0
        self._waits = False

    def allow(self, steps: int) -> None:
        with self._changed:
            self._allowed += steps
            self._changed.notify_all()

    def wait_until_stuck(self) -> bool:
        """Return when the model's thread waits for permission to run a step; False: it does not, for long."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waits and not self._allowed, PATIENCE_S)

    @property
    def overlaps(self) -> bool:
        return self._inner.overlaps

    @property
    def step_times(self) -> StepTimes | None:
        return self._inner.step_times

    def launch(self, plan: Plan, meanwhile: Callable[[], None]) -> Launched:
        meanwhile()
        with self._changed:
            self._waits = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._allowed > 0)
            self._allowed -= 1
            self._waits = False
        return self._inner.launch(plan, lambda: None)


class Seen:
    """A reader's view of one request in the stream, by postproc's rules."""

    def __init__(self, journal: Sequence[int] = ()) -> None:
        self.epoch = 0
        self.tokens = list(journal)
        self.begins: list[Begin] = []
        self.finish: Finish | None = None

    def take(self, part: Begin | TokenRun) -> None:
        if part.epoch < self.epoch or self.finish is not None:
            return
        self.epoch = part.epoch
        if isinstance(part, Begin):
            self.begins.append(part)
            return
        assert part.index <= len(self.tokens), "a gap"
        repeated = len(self.tokens) - part.index
        assert tuple(self.tokens[part.index :][: len(part.tokens)]) == part.tokens[:repeated], "two truths"
        self.tokens += part.tokens[repeated:]
        self.finish = part.finish


class Reader:
    """Follows tokens streams."""

    def __init__(self, redis: Redis, keys: Keys, shards: int = 1, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._log = LogReader(redis, {keys.tokens(shard): "0" for shard in range(shards)})
        self.seen: dict[str, Seen] = {}
        self.messages: list[tuple[str, Tokens]] = []

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(self._patience_s):
            while not done():
                for stream, _, message in await self._log.read(100, 100):
                    assert isinstance(message, Tokens)
                    self.messages.append((stream, message))
                    parts: tuple[Begin | TokenRun, ...] = (*message.begins, *message.runs)
                    for part in parts:
                        self.seen.setdefault(part.request_id, Seen()).take(part)

    async def finished(self, *request_ids: str) -> list[Seen]:
        await self.until(lambda: all(r in self.seen and self.seen[r].finish for r in request_ids))
        return [self.seen[request_id] for request_id in request_ids]

    async def reached(self, request_id: str, tokens: int) -> Seen:
        await self.until(lambda: request_id in self.seen and len(self.seen[request_id].tokens) >= tokens)
        return self.seen[request_id]


async def submit(redis: Redis, keys: Keys, *messages: Generate) -> None:
    for message in messages:
        await Records(redis, keys).submit(GENERATE, message)


async def eventually(condition: Callable[[], Any], patience_s: float = PATIENCE_S) -> None:
    """Wait until `condition`, a coroutine function, is true of a Redis that others change."""
    async with asyncio.timeout(patience_s):
        while not await condition():  # noqa: ASYNC110  # what is waited for is in Redis
            await asyncio.sleep(0.005)


class Running:
    """A live engine."""

    def __init__(self, service: EngineService[Any], life: Life, task: "asyncio.Task[int]", registry: CollectorRegistry):
        self.service = service
        self.life = life
        self.task = task
        self.registry = registry

    @property
    def held(self) -> int:
        return int(self.service.load()["held"])

    def metric(self, name: str) -> float:
        value = self.registry.get_sample_value(f"millrace_{name}")
        assert value is not None
        return value

    async def heard_of_cancelling(self, *request_ids: str) -> None:
        """Return when the engine knows that nobody waits for these requests any more, or has let them go."""
        requests = self.service._consumer._requests

        async def heard() -> bool:
            return all(held.cancelled for held in map(requests.get, request_ids) if held is not None)

        await eventually(heard)

    async def stop(self) -> int:
        self.life.stop.set()
        return await self.task


def settings_for(redis_url: str, **changes: Any) -> EngineSettings:
    told = {
        "redis_url": redis_url,
        "model": "unused",
        "namespace": "test",
        "name": "engine-a",
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "block_size": 4,
        "step_timeout_s": 0.0,  # a watchdog would end the tests' own process
        "max_model_len": 512,
        "drain_s": PATIENCE_S,
    }
    return EngineSettings(**{**told, **changes})


@asynccontextmanager
async def engine(
    redis: Redis,
    redis_url: str,
    runner: Runner | None = None,
    *,
    blocks: int = 64,
    facts: EngineFacts = FACTS,
    tracing: Tracing = OFF,
    **changes: Any,
) -> AsyncIterator[Running]:
    """An engine that lives while the block runs, and is then asked to drain."""
    settings = settings_for(redis_url, **changes)
    made = runner or SumRunner(blocks, settings.block_size)
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry)
    async with signed_in(redis, "engine") as own:
        service = compose(settings, own, facts, compile_grammar, lambda: (made, blocks), metrics, tracing)
        life = Life("engine", service, settings, own)
        running = Running(service, life, asyncio.create_task(life.run()), registry)
        try:
            yield running
        finally:
            if not running.task.done():
                if isinstance(made, GatedRunner):
                    made.allow(100_000)
                await running.stop()
