"""Content-addressed embeddings: one blob for all requests and replicas that show the same media in the same way.

Where all engines see this host's segments, the blob is empty and says so, and a segment has the bytes.

The key covers the source's bytes, everything that decides its patches, and the weights. A key is computed once at a
time: `SingleFlight` ensures it within a process, `locks.py` among replicas.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

import msgspec
import torch
from torch import Tensor

from services.mm_encoder.media.patches import Grid
from services.mm_encoder.prompt import Embedded
from services.mm_encoder.store.segments import LARGE, SegmentStore, Unwritten
from shared.bus.blobs import EMBEDS, Blobs
from shared.messages import MediaKind

T = TypeVar("T")

Place = Awaitable[Unwritten | None] | None


class EmbedMeta(msgspec.Struct, frozen=True):
    """Shape and type of a blob of embeddings, which the engine needs to read it."""

    grid: Grid
    rows: int
    hidden: int
    dtype: str
    segment: bool = False  # a segment has the bytes; for mm_encoder, as an engine sees it by the empty blob


def content_digest(data: bytes) -> bytes:
    """Return the digest of a source's bytes."""
    return hashlib.sha256(data).digest()


def content_key(digest: bytes, signature: bytes, identity: bytes) -> str:
    """Return the key of a source of this digest, of how it is processed (`signature`) and the weights (`identity`)."""
    parts = (hashlib.sha256(part).digest() for part in (signature, identity))
    return hashlib.sha256(b"".join((digest, *parts))).hexdigest()


class Embeds:
    """Store of embeddings: the blobs of kind "embeds", and segments, if this replica has any."""

    def __init__(self, blobs: Blobs, segments: SegmentStore | None = None) -> None:
        self._blobs = blobs
        self._segments = segments
        self._row_bytes = 0  # of embeddings in segments; 0: the last ones went through Redis

    @asynccontextmanager
    async def prepare(self, rows: int) -> AsyncIterator[Place]:
        """Prepare for so many rows within the block, while they are computed: `store` needs less time with that."""
        size = rows * self._row_bytes
        if self._segments is None or size < LARGE:
            yield None
            return
        async with self._segments.prepare(size) as place:
            yield place

    async def find(self, kind: MediaKind, key: str) -> Embedded | None:
        """Return the embeddings stored under `key`, renewing their TTL so that they outlast the way to the engine.

        Those whose shape cannot be read are none: they are made again.
        """
        meta = await self._blobs.meta(EMBEDS, key)
        if meta is None:
            return None
        try:
            found = msgspec.json.decode(meta, type=EmbedMeta)
        except msgspec.MsgspecError:
            return None
        if found.segment and not await self._is_within_reach(key, found):
            return None
        return Embedded(kind, key, found.grid, found.rows)

    async def store(self, key: str, grid: Grid, rows: Tensor, place: Place = None) -> None:
        """Store `rows`, [rows, hidden] on the CPU, as their raw bytes, at a place that was prepared for them.

        Raises:
            RequestError: 503, the embeddings exceed the budget of the blob store.
        """
        meta = EmbedMeta(grid, rows.shape[0], rows.shape[1], str(rows.dtype).removeprefix("torch."))
        data = rows.contiguous().flatten().view(torch.uint8).numpy().data
        if await self._write_segment(key, data, place):
            self._row_bytes = len(data) // len(rows)
            data, meta = memoryview(b""), msgspec.structs.replace(meta, segment=True)
        else:
            self._row_bytes = 0
        await self._blobs.put(EMBEDS, key, data, msgspec.json.encode(meta))

    async def _write_segment(self, key: str, data: memoryview, place: Place) -> bool:
        if self._segments is None or not await self._segments.reaches_all():
            return False
        return await self._segments.write(key, data, None if place is None else await place)

    async def sweep(self) -> None:
        """Remove segments that nobody may use any more."""
        if self._segments is not None:
            await self._segments.sweep()

    async def _is_within_reach(self, key: str, meta: EmbedMeta) -> bool:
        """Return True if all engines can have the bytes of a segment; give them to Redis if some cannot see it."""
        if self._segments is None or not self._segments.holds(key):
            return False
        if await self._segments.reaches_all():
            return True
        if (data := self._segments.read(key)) is None:
            return False
        await self._blobs.put(EMBEDS, key, data, msgspec.json.encode(msgspec.structs.replace(meta, segment=False)))
        return True


class SingleFlight(Generic[T]):
    """Registry of computations by key, each running once at a time; a caller's cancellation does not cancel it."""

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Task[T]] = {}

    async def join(self, key: str, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the result of the computation of `key`; start it if it is not running."""
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = asyncio.create_task(start())
            task.add_done_callback(lambda done: self._forget(key, done))
        try:
            return await asyncio.shield(task)
        finally:
            del task  # whose error refers to this frame: a reference cycle, which would keep what was computed from

    def _forget(self, key: str, done: asyncio.Task[T]) -> None:
        del self._running[key]
        if not done.cancelled():
            done.exception()  # marks it as retrieved: a computation without waiters must not log it

    async def close(self) -> None:
        """Cancel all computations."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
