"""The engine as a service: asyncio does the talking, one thread does the computing; they share a mailbox and an outbox.

startup  join the stream, load the model
serve    take work and run it
drain    take nothing new; what is held runs to its end
close    stop computing. What is left is another engine's as soon as the lease is released
"""

import asyncio
import contextlib
from collections.abc import Callable

from redis.asyncio import Redis

from services.engine.loop.engine import Engine
from services.engine.loop.mailbox import Mailbox
from services.engine.loop.thread import ModelThread
from services.engine.metrics import EngineMetrics
from services.engine.run.runner import Runner
from services.engine.schedule.blocks import BlockPool
from services.engine.schedule.scheduler import Limits, Scheduler
from services.engine.schedule.sequence import EngineFacts
from services.engine.settings import EngineSettings
from services.engine.transport.handler import SERVICE, GenerateHandler, waiting_allowance
from services.engine.transport.outbox import Outbox
from shared.bus.blobs import Blobs
from shared.bus.client import connect
from shared.bus.keys import GENERATE, Keys
from shared.bus.ownership import EntryOwnership
from shared.bus.streams import WorkStream
from shared.tracing import OFF, Tracing
from shared.watchdog import Watchdog, unwatched

CLAIMS = 10  # looks for abandoned entries in the time of a lease

Load = Callable[[], tuple[Runner, int]]  # the runner, and how many cache blocks it has


class EngineService:
    """See `shared.service.Service`."""

    def __init__(
        self,
        settings: EngineSettings,
        redis: Redis,
        facts: EngineFacts,
        load: Load,
        metrics: EngineMetrics,
        tracing: Tracing = OFF,
        watchdog: Watchdog | None = None,
    ) -> None:
        self._settings = settings
        self._watchdog = watchdog
        self._metrics = metrics
        self._load = load
        keys = Keys(settings.namespace)
        self._blob_redis = connect(settings.blob_redis_url or settings.redis_url)
        stream = WorkStream(redis, keys, GENERATE, SERVICE, settings.name, settings.max_deliveries)
        self._mailbox = Mailbox()
        self._handler = GenerateHandler(
            redis,
            keys,
            stream,
            EntryOwnership(redis, keys, GENERATE, SERVICE, settings.name),
            Blobs(self._blob_redis, keys, settings.blob_ttl_s, settings.blob_budget_bytes),
            self._mailbox,
            facts,
            settings.max_num_seqs + waiting_allowance(settings.max_num_seqs),
            settings.lease_ms / 1000 / CLAIMS,
            metrics,
            tracing,
        )
        self._consumer = self._handler.consumer
        self._outbox = Outbox(redis, keys, self._handler.finished)
        self._background: asyncio.Task[None] | None = None

    async def startup(self) -> None:
        self._outbox.open()
        self._thread = ModelThread(self._load, self._compute)
        await self._thread.start()
        if self._watchdog is not None:
            self._watchdog.start()
        await self._consumer.join()
        self._background = asyncio.create_task(self._run_background(), name="engine background")

    async def serve(self) -> None:
        self._consumer.open()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._consumer.take())
            tasks.create_task(self._watch())

    async def drain(self) -> None:
        self._consumer.close()
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(self._watch())
            await self._consumer.empty()
            watch.cancel()

    async def close(self) -> None:
        self._mailbox.close()
        self._outbox.close()
        if self._background is not None:
            with contextlib.suppress(Exception):  # whoever started it has been told by `serve`
                await self._thread.watch()
            self._background.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._background
            await self._consumer.leave()
        if self._watchdog is not None:
            self._watchdog.stop()
        await self._blob_redis.aclose()

    def load(self) -> dict[str, float]:
        held = {"held": float(len(self._consumer)), "capacity": float(self._settings.max_num_seqs)}
        self._metrics.update_waiting(len(self._consumer))
        return held | self._metrics.load()

    async def _watch(self) -> None:
        """Raise what was raised in the background."""
        assert self._background is not None
        await asyncio.shield(self._background)

    async def _run_background(self) -> None:
        """Run what goes on while the service drains."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._outbox.run())
            tasks.create_task(self._handler.admit())
            tasks.create_task(self._consumer.claim())
            tasks.create_task(self._consumer.listen())
            tasks.create_task(self._handler.expire())
            tasks.create_task(self._thread.watch())

    def _compute(self, loaded: tuple[Runner, int]) -> None:
        """The model thread's work."""
        settings, (runner, num_blocks) = self._settings, loaded
        pool = BlockPool(num_blocks, settings.enable_prefix_caching)
        limits = Limits(
            settings.max_num_seqs,
            settings.max_num_batched_tokens,
            settings.enable_chunked_prefill,
            settings.block_size,
        )
        scheduler = Scheduler(pool, limits)
        watch = unwatched if self._watchdog is None else self._watchdog.watch
        Engine(self._mailbox, scheduler, pool, runner, self._outbox.put, self._metrics, watch).run()
