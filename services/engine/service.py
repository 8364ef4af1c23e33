"""The engine as a service: its life cycle, its thread, and what it says of itself."""

import asyncio
import contextlib
import threading

from redis.asyncio import Redis

from services.engine.blocks import BlockPool
from services.engine.engine import Engine
from services.engine.inbox import Inbox, waiting_allowance
from services.engine.mailbox import Mailbox
from services.engine.metrics import EngineMetrics
from services.engine.outbox import Outbox
from services.engine.runner import Runner
from services.engine.scheduler import Limits, Scheduler
from services.engine.sequence import EngineFacts
from services.engine.settings import EngineSettings
from shared.blobs import Blobs
from shared.keys import GENERATE, Keys
from shared.log import logger
from shared.streams import WorkStream

SERVICE = "engine"

_log = logger(__name__)


class EngineService:
    """Asyncio does the talking, one thread does the computing; they share a mailbox and an outbox."""

    def __init__(
        self,
        settings: EngineSettings,
        name: str,
        redis: Redis,
        blob_redis: Redis,
        facts: EngineFacts,
        runner: Runner,
        num_blocks: int,
        metrics: EngineMetrics,
    ) -> None:
        self.name = name
        self._settings = settings
        self._redis = redis
        self._blob_redis = blob_redis
        self._keys = Keys(settings.namespace)
        self._facts = facts
        self._runner = runner
        self._metrics = metrics
        self._mailbox = Mailbox()
        self._pool = BlockPool(num_blocks, settings.enable_prefix_caching)
        self._scheduler = Scheduler(
            self._pool,
            Limits(
                settings.max_num_seqs,
                settings.max_num_batched_tokens,
                settings.enable_chunked_prefill,
                settings.block_size,
            ),
        )
        self._work = WorkStream(redis, self._keys, GENERATE, SERVICE, name, settings.max_deliveries)

    async def startup(self) -> None:
        settings = self._settings
        blobs = Blobs(self._blob_redis, self._keys, settings.blob_ttl_s, settings.blob_budget_bytes)
        capacity = settings.max_num_seqs + waiting_allowance(settings.max_num_seqs)
        self._inbox = Inbox(
            self._redis,
            self._keys,
            self._work,
            blobs,
            self._mailbox,
            self._facts,
            capacity,
            settings.lease_ms / 1000,
        )
        self._outbox = Outbox(self._redis, self._keys, self._inbox.finished)
        await self._inbox.start()
        self._loop = asyncio.get_running_loop()
        self._computing: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._compute, name="model", daemon=True)
        self._thread.start()
        self._background = asyncio.create_task(self._run_background())

    async def serve(self) -> None:
        """Take work until cancelled, or until something fails that only a restart mends."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._inbox.take())
            tasks.create_task(self._inbox.reclaim())
            tasks.create_task(self._watch())

    async def drain(self) -> None:
        """Take nothing new; return when every request held has ended."""
        empty = asyncio.ensure_future(self._inbox.empty())
        try:
            await asyncio.wait([empty, self._background], return_when=asyncio.FIRST_COMPLETED)
        finally:
            empty.cancel()

    async def close(self) -> None:
        """Stop computing, whatever is left: its entries stay ours until the lease ends, and then someone resumes
        them."""
        self._mailbox.close()
        self._outbox.close()
        await asyncio.to_thread(self._thread.join)
        self._background.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await self._background
        await self._work.leave()
        await self._redis.aclose()
        await self._blob_redis.aclose()

    def load(self) -> dict[str, float]:
        return {
            "held": float(self._inbox.num_held),
            "capacity": float(self._settings.max_num_seqs),
            "kv_usage": self._pool.used / self._pool.num_blocks,
        }

    async def _watch(self) -> None:
        """Fail with what fails in the background."""
        await asyncio.shield(self._background)

    async def _run_background(self) -> None:
        """What must go on while the service drains."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._outbox.run())
            tasks.create_task(self._inbox.admit())
            tasks.create_task(self._inbox.listen())
            tasks.create_task(self._computed())

    async def _computed(self) -> None:
        await self._computing

    def _compute(self) -> None:
        """The model's thread."""
        engine = Engine(self._mailbox, self._scheduler, self._pool, self._runner, self._outbox.put, self._metrics)
        try:
            engine.run()
        except BaseException as failure:
            _log.exception("a step failed")
            self._report(failure)

    def _report(self, failure: BaseException) -> None:
        def fail() -> None:
            if not self._computing.done():
                self._computing.set_exception(failure)

        self._loop.call_soon_threadsafe(fail)
