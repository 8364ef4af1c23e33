"""Batching queue of the vision tower: waiting items are encoded together, in a thread of its own.

Items of requests that lack the least come first, so that a request with many does not hold up one with few. Those that
were passed over `PATIENCE` times come before all others, in the order of their arrival.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from services.mm_encoder.media.patches import Patches
from services.mm_encoder.metrics import Metrics
from shared.crash_points import crash_point
from shared.watchdog import Watchdog, unwatched

PATIENCE = 8  # batches
ENOUGH = 8192  # patches of a batch: more together are encoded no faster, and each item would wait for all


class BatchEncoder(Protocol):
    """Interface of `encoder.Encoder`."""

    def encode(self, items: Sequence[Patches]) -> list[Tensor]: ...


@dataclass(slots=True, eq=False)
class _Item:
    """One image or video that waits."""

    patches: Patches
    done: asyncio.Future[Tensor]
    lacks: Callable[[], int]
    passed: int = 0  # batches that it was not part of

    @property
    def place(self) -> int:
        return 0 if self.passed >= PATIENCE else 1 + self.lacks()


class Batcher:
    """Runner of an encoder for many callers. `max_patches` and ENOUGH bound a batch; a larger item is one alone."""

    def __init__(
        self, encoder: BatchEncoder, max_patches: int, metrics: Metrics, watchdog: Watchdog | None = None
    ) -> None:
        """`watchdog` watches the thread from `start` to the end of `close`."""
        self._encoder = encoder
        self._max_patches = min(max_patches, ENOUGH)
        self._metrics = metrics
        self._watchdog = watchdog
        self._thread = ThreadPoolExecutor(1, "tower")
        self._waiting: list[_Item] = []  # by arrival
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def encode(self, patches: Patches, lacks: Callable[[], int] = lambda: 1) -> Tensor:
        """Return [rows, text hidden] on the CPU. An exception of the encoder is raised to all callers of the batch.

        `lacks` returns the number of items that the request of this one lacks.
        """
        done: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Item(patches, done, lacks))
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
            await self._encode([item.patches for item in batch], [item.done for item in batch])

    async def close(self) -> None:
        """Stop after the batch that is being encoded."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown()
        if self._watchdog is not None:
            self._watchdog.stop()

    def _next(self) -> list[_Item]:
        batch: list[_Item] = []
        free = self._max_patches
        self._waiting = [item for item in self._waiting if not item.done.cancelled()]
        for item in sorted(self._waiting, key=lambda item: item.place):
            free -= len(item.patches.rows)
            if batch and free < 0:
                break
            batch.append(item)
        self._waiting = [item for item in self._waiting if item not in batch]
        for item in self._waiting:
            item.passed += 1
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
