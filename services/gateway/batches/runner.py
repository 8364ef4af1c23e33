"""Worker on batches: takes those that nobody works on, and keeps their leases while it runs their lines."""

import asyncio
import contextlib

from prometheus_client import Gauge
from redis.exceptions import RedisError

from services.gateway.batches.run import BatchRun, RunParts
from services.gateway.batches.store import LeaseLostError
from shared import log
from shared.crash_points import crash_point
from shared.errors import RequestError

MOST_AT_A_TIME = 8  # batches of one gateway; each holds a chunk of its input, and a window of its lines

logger = log.logger(__name__)


class BatchRunner:
    """All batches that this gateway works on."""

    def __init__(self, parts: RunParts, work: asyncio.Event, gauge: Gauge) -> None:
        """`work` is set when a batch is created or cancelled here, so that it need not wait for the next look."""
        self._gauge = gauge
        self._parts = parts
        self._work = work
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._draining = False

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            while True:
                self._work.clear()
                if not self._draining:
                    await self._begin()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._parts.store.lease_ms / 3000):
                        await self._work.wait()
        finally:
            await self.drain()

    async def drain(self) -> None:
        """Give all batches up, so that others go on with them at once. Requests that run go on."""
        self._draining = True
        await self._give_up(list(self._tasks.values()))

    async def _give_up(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _begin(self) -> None:
        try:
            await self._parts.files.sweep()
            claimed, given_up = await self._parts.store.claim(MOST_AT_A_TIME, list(self._tasks))
        except RedisError as error:
            logger.warning("could not look for batches; retrying", extra={"error": str(error)})
            return
        await self._give_up([self._tasks[batch_id] for batch_id in given_up if batch_id in self._tasks])
        for batch_id in claimed:
            crash_point("gateway.batch_claim.after")
            if self._draining:  # since it was claimed
                await self._release(batch_id)
            else:
                self._start(batch_id)

    def _start(self, batch_id: str) -> None:
        task = asyncio.create_task(self._work_on(batch_id), name=batch_id)
        task.add_done_callback(lambda _: self._forget(batch_id))  # also if it is cancelled before it begins
        self._tasks[batch_id] = task
        self._gauge.inc()

    def _forget(self, batch_id: str) -> None:
        del self._tasks[batch_id]
        self._gauge.dec()

    async def _release(self, batch_id: str) -> None:
        """Give a lease up. If that fails, it expires."""
        with contextlib.suppress(RedisError):
            await self._parts.store.release(batch_id)

    async def _work_on(self, batch_id: str) -> None:
        try:
            batch = await self._parts.store.read(batch_id)
            if batch is None or batch.ended:
                await self._parts.store.forget(batch_id)
                return
            logger.info("works on a batch", extra={"batch": batch_id, "status": batch.status})
            await BatchRun(self._parts, batch).run()
        except LeaseLostError:
            logger.warning("another gateway works on this batch now", extra={"batch": batch_id})
        except RequestError as error:
            logger.error("a batch cannot be read", extra={"batch": batch_id, "error": error.failure.message})
            with contextlib.suppress(RedisError):
                await self._parts.store.forget(batch_id)
        except RedisError as error:
            logger.warning("gave a batch up; another try follows", extra={"batch": batch_id, "error": str(error)})
        except Exception:
            logger.exception("gave a batch up; another try follows", extra={"batch": batch_id})
        finally:
            await self._release(batch_id)
