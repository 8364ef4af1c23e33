"""Embeddings by content: one blob for all requests and replicas that show the same media the same way.

The key covers the source's bytes, everything that decides its patches, and the weights. Within a process the same key
is computed once at a time; `turns.py` sees to it among replicas.
"""

import asyncio
import hashlib
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

import msgspec
import torch
from torch import Tensor

from services.mm_encoder.media.patches import Grid
from services.mm_encoder.prompt import Embedded
from shared.bus.blobs import EMBEDS, Blobs
from shared.messages import MediaKind

T = TypeVar("T")


class EmbedMeta(msgspec.Struct, frozen=True):
    """What the engine must know of a blob to read it."""

    grid: Grid
    rows: int
    hidden: int
    dtype: str


def content_key(data: bytes, signature: bytes, identity: bytes) -> str:
    """`signature` says how the source is processed, `identity` by which weights."""
    parts = (hashlib.sha256(part).digest() for part in (data, signature, identity))
    return hashlib.sha256(b"".join(parts)).hexdigest()


class Embeds:
    """The blobs of kind "embeds"."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    async def find(self, kind: MediaKind, key: str) -> Embedded | None:
        """Also renews its life, so that it is there when the engine comes for it."""
        meta = await self._blobs.meta(EMBEDS, key)
        if meta is None:
            return None
        found = msgspec.json.decode(meta, type=EmbedMeta)
        return Embedded(kind, key, found.grid, found.rows)

    async def store(self, key: str, grid: Grid, rows: Tensor) -> None:
        """[rows, hidden] on the CPU, stored as its raw bytes.

        Raises:
            RequestError: 503, more than the store may hold.
        """
        meta = EmbedMeta(grid, rows.shape[0], rows.shape[1], str(rows.dtype).removeprefix("torch."))
        data = rows.contiguous().flatten().view(torch.uint8).numpy().data
        await self._blobs.put(EMBEDS, key, data, msgspec.json.encode(meta))


class SingleFlight(Generic[T]):
    """Computations by key, each once at a time. Whoever waits may give up; the computation goes on for the others."""

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Task[T]] = {}

    async def join(self, key: str, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of the flight of `key`, started if there is none."""
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = asyncio.create_task(start())
            task.add_done_callback(lambda done: self._landed(key, done))
        return await asyncio.shield(task)

    def _landed(self, key: str, done: asyncio.Task[T]) -> None:
        del self._running[key]
        if not done.cancelled():
            done.exception()  # those who waited have it; if nobody did, nobody need hear of it

    async def close(self) -> None:
        """Give up what is running."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
