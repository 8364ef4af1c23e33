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
from redis.exceptions import RedisError

from services.engine.loop.engine import Engine
from services.engine.loop.mailbox import Mailbox
from services.engine.loop.thread import ModelThread
from services.engine.metrics import EngineMetrics
from services.engine.run.runner import Runner
from services.engine.schedule.blocks import BlockPool
from services.engine.schedule.scheduler import Limits, Scheduler
from services.engine.schedule.sequence import EngineFacts
from services.engine.settings import EngineSettings
from services.engine.transport.consumer import Inbox, waiting_allowance
from services.engine.transport.outbox import Outbox
from shared.bus.blobs import Blobs
from shared.bus.client import connect
from shared.bus.keys import GENERATE, Keys
from shared.bus.ownership import EntryOwnership
from shared.bus.streams import WorkStream
from shared.log import logger
from shared.tracing import OFF, Tracing

SERVICE = "engine"
LOOKS = 10  # in the time of a lease: how much later than its end a dead engine's requests go on

_log = logger(__name__)

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
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._load = load
        keys = Keys(settings.namespace)
        self._blob_redis = connect(settings.blob_redis_url or settings.redis_url)
        self._work = WorkStream(redis, keys, GENERATE, SERVICE, settings.name, settings.max_deliveries)
        self._mailbox = Mailbox()
        self._inbox = Inbox(
            redis,
            keys,
            self._work,
            EntryOwnership(redis, keys, GENERATE, SERVICE, settings.name),
            Blobs(self._blob_redis, keys, settings.blob_ttl_s, settings.blob_budget_bytes),
            self._mailbox,
            facts,
            settings.max_num_seqs + waiting_allowance(settings.max_num_seqs),
            settings.lease_ms / 1000 / LOOKS,
            metrics,
            tracing,
        )
        self._outbox = Outbox(redis, keys, self._inbox.finished)
        self._background: asyncio.Task[None] | None = None

    async def startup(self) -> None:
        self._outbox.open()
        self._thread = ModelThread(self._load, self._compute)
        await self._thread.start()
        await self._inbox.start()
        self._background = asyncio.create_task(self._run_background(), name="engine background")

    async def serve(self) -> None:
        self._inbox.open()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._inbox.take())
            tasks.create_task(self._watch())

    async def drain(self) -> None:
        self._inbox.close()
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(self._watch())
            await self._inbox.empty()
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
            await self._leave()
        await self._blob_redis.aclose()

    async def _leave(self) -> None:
        try:
            await self._work.leave()
        except RedisError as error:
            _log.warning("consumer not deleted; others do it", extra={"reason": str(error)})

    def load(self) -> dict[str, float]:
        held = {"held": float(self._inbox.num_pending), "capacity": float(self._settings.max_num_seqs)}
        self._metrics.update_waiting(self._inbox.num_pending)
        return held | self._metrics.load()

    async def _watch(self) -> None:
        """Raise what was raised in the background."""
        assert self._background is not None
        await asyncio.shield(self._background)

    async def _run_background(self) -> None:
        """What goes on while the service drains."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._outbox.run())
            tasks.create_task(self._inbox.admit())
            tasks.create_task(self._inbox.look())
            tasks.create_task(self._inbox.listen())
            tasks.create_task(self._inbox.expire())
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
        Engine(self._mailbox, scheduler, pool, runner, self._outbox.put, self._metrics).run()
