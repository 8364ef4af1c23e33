"""Batching queue of the vision tower: waiting items are encoded together, in a thread of its own."""

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from torch import Tensor

from services.mm_encoder.media.patches import Patches
from services.mm_encoder.metrics import Metrics
from shared.crash_points import crash_point
from shared.watchdog import Watchdog, unwatched


class BatchEncoder(Protocol):
    """Interface of `encoder.Encoder`."""

    def encode(self, items: Sequence[Patches]) -> list[Tensor]: ...


class Batcher:
    """Runner of an encoder for many callers. `max_patches` bounds a batch; a larger item is a batch of its own."""

    def __init__(
        self, encoder: BatchEncoder, max_patches: int, metrics: Metrics, watchdog: Watchdog | None = None
    ) -> None:
        """`watchdog` watches the thread from `start` to the end of `close`."""
        self._encoder = encoder
        self._max_patches = max_patches
        self._metrics = metrics
        self._watchdog = watchdog
        self._thread = ThreadPoolExecutor(1, "tower")
        self._waiting: deque[tuple[Patches, asyncio.Future[Tensor]]] = deque()
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def encode(self, patches: Patches) -> Tensor:
        """Return [rows, text hidden] on the CPU. An exception of the encoder is raised to all callers of the batch."""
        done: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        self._waiting.append((patches, done))
        self._arrived.set()
        return await done

    def start(self) -> None:
        """Start encoding, until `close`."""
        if self._watchdog is not None:
            self._watchdog.start()
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            batch = self._next()
            if not batch:
                self._arrived.clear()
                continue
            await self._encode([patches for patches, _ in batch], [done for _, done in batch])

    async def close(self) -> None:
        """Stop after the batch that is being encoded."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown()
        if self._watchdog is not None:
            self._watchdog.stop()

    def _next(self) -> list[tuple[Patches, asyncio.Future[Tensor]]]:
        batch: list[tuple[Patches, asyncio.Future[Tensor]]] = []
        free = self._max_patches
        while self._waiting and (not batch or len(self._waiting[0][0].rows) <= free):
            patches, done = self._waiting.popleft()
            if not done.cancelled():
                batch.append((patches, done))
                free -= len(patches.rows)
        return batch

    async def _encode(self, items: list[Patches], futures: list[asyncio.Future[Tensor]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            with self._metrics.stage("tower"):
                results = await loop.run_in_executor(self._thread, self._run_encoder, items)
        except Exception as error:
            for future in futures:
                if not future.done():
                    future.set_exception(error)
            return
        for future, result in zip(futures, results, strict=True):
            if not future.done():
                future.set_result(result)

    def _run_encoder(self, items: list[Patches]) -> list[Tensor]:
        """Encode a batch, in the thread."""
        watch = unwatched if self._watchdog is None else self._watchdog.watch
        with watch("encode", sum(len(item.rows) for item in items)):
            crash_point("mm_encoder.tower.before")
            results = self._encoder.encode(items)
            crash_point("mm_encoder.tower.after")
        return results
