"""Store of large values in Redis: chunks of 1 MiB, so that no other client waits behind one; TTL; a byte budget.

Uploads are pinned while their request lives: they are in a zset of their own and never evicted. They may fill
UPLOADS_SHARE of the budget, and are refused beyond it, before they are written. The rest is for embeddings.

The index (a zset by last use, and a hash of sizes with their sum) keeps the budget. A blob is entered in it before its
first chunk is written, so that concurrent writers stay within the budget together; a writer that dies leaves an index
entry and chunks that expire like any other. The blob itself becomes visible with its hash, after the last chunk.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from shared.bus.client import command
from shared.bus.keys import Keys
from shared.bus.lua import read_script
from shared.errors import internal

MEDIA = "media"  # kind of uploaded bytes, which live until their request has ended
EMBEDS = "embeds"  # kind of the encoder's output, kept for later requests with the same media until evicted

CHUNK = 1 << 20
UPLOADS_SHARE = 0.5  # of the budget; beyond it, embeddings would be evicted before they are read
SMALL_BYTES = 256 << 10  # of a blob that is read in one trip; Redis copies it once more for that
_BATCH = 4  # chunks in one pipeline: they occupy Redis for about 2 ms
_MOST_CALLS = 64  # in one pipeline, of uploads that are smaller than a chunk


T = TypeVar("T")


def upload_keys(request_id: str, media: int) -> list[str]:
    """Return the keys of the uploads of a request with `media` images and videos; those given by URL have no blob."""
    return [f"{request_id}-{index}" for index in range(media)]


class Blobs:
    """Store of immutable values by (kind, key). Kinds: MEDIA and EMBEDS."""

    def __init__(self, redis: Redis, keys: Keys, ttl_s: int, budget_bytes: int) -> None:
        self._redis = redis
        self._keys = keys
        self._ttl_s = ttl_s
        self._budget = budget_bytes
        self._index = [keys.blobs(), keys.blob_sizes(), keys.blob_pins()]
        self._common: list[str | int | bytes] = [keys.blob_prefix(), CHUNK]
        self._index_blob = redis.register_script(read_script("index_blob"))
        self._pin_blobs = redis.register_script(read_script("pin_blobs"))
        self._write_pinned = redis.register_script(read_script("write_pinned"))
        self._touch_blob = redis.register_script(read_script("touch_blob"))
        self._delete_blobs = redis.register_script(read_script("delete_blobs"))

    async def put(self, kind: str, key: str, data: bytes | memoryview, meta: bytes = b"", owner: str = "") -> None:
        """Store a blob, overwriting it; it becomes visible when its last chunk is written.

        While the budget is exceeded, evicts the least recently used blob if nobody owns it, else the oldest of whoever
        has most bytes: nobody with an even share or less loses one to others, unless one blob is larger than that.

        Raises:
            RequestError: `data` alone exceeds the budget (503; a caller that wants a 4xx checks before).
        """
        view = memoryview(data).cast("B")
        if len(view) > self._budget:
            raise internal(
                f"{len(view)} bytes of {kind} exceed the server's budget of {self._budget}", "blob_budget_exceeded", 503
            )
        entry = [*self._common, self._keys.blob_member(kind, key), len(view), self._ttl_s, self._budget, owner]
        if len(view) <= CHUNK:
            chunk = [bytes(view)] if len(view) else []
            await self._index_blob(keys=self._index, args=[*entry, len(chunk), meta, *chunk])
            return
        await self._index_blob(keys=self._index, args=entry)
        chunks = await self._write_chunks(kind, key, view)
        await self._index_blob(keys=self._index, args=[*entry, chunks, meta])

    @property
    def upload_limit(self) -> int:
        """The most bytes that uploads may take together."""
        return int(UPLOADS_SHARE * self._budget)

    async def pin_uploads(self, uploads: Mapping[str, bytes], keep_s: float) -> int | None:
        """Store uploads of one request, which are not evicted until they are deleted, or for `keep_s`.

        Returns the bytes that other uploads take, if there is no room beside them; then nothing was stored. A Redis
        that has lost the beginning when it is given the end is given all again.
        """
        expiry_s = math.ceil(keep_s)
        sizes = [part for key, data in uploads.items() for part in (self._keys.blob_member(MEDIA, key), len(data))]
        limits = [self._ttl_s, self._budget, self.upload_limit, expiry_s]
        while True:
            taken = int(await self._pin_blobs(keys=self._index, args=[*self._common, *limits, *sizes]))
            if taken >= 0:
                return taken
            if await self._write_uploads(uploads, expiry_s):
                return None

    async def _write_uploads(self, uploads: Mapping[str, bytes], expiry_s: int) -> bool:
        """Write pinned blobs; return False if Redis has lost that one is pinned, and maybe its first chunks.

        Several chunks are in flight, over one connection, so Redis writes them in order: the last chunk of a blob,
        which makes it visible, behind all others. A blob is pinned once, before its first chunk; so whoever finds it
        pinned at its last one has lost none.
        """
        calls = (call for key, data in uploads.items() for call in self._upload_calls(key, data, expiry_s))
        for batch in _batches_of_bytes(calls):
            if not all(await self._write_together(batch)):
                return False
        return True

    def _upload_calls(self, key: str, data: bytes, expiry_s: int) -> Iterator[tuple[list[Any], memoryview]]:
        """Yield the arguments of the calls that write a blob, and the bytes of each."""
        view, chunks = memoryview(data), max(1, math.ceil(len(data) / CHUNK))
        about = [*self._common, self._keys.blob_member(MEDIA, key), expiry_s, len(data), chunks]
        for n in range(chunks):
            yield [*about, n], view[n * CHUNK : (n + 1) * CHUNK]

    async def _write_together(self, batch: Sequence[tuple[list[Any], memoryview]]) -> list[int]:
        """Return what each call of a batch returns. Sent again as a whole when the connection breaks."""
        while True:
            async with self._redis.pipeline(transaction=False) as pipe:
                for about, data in batch:
                    pipe.evalsha(self._write_pinned.sha, len(self._index), *self._index, *about, data)
                try:
                    return await pipe.execute()
                except NoScriptError:  # a Redis that is new, or has lost its scripts with its data
                    await command(self._redis, "SCRIPT LOAD", read_script("write_pinned"))

    async def _write_chunks(self, kind: str, key: str, view: memoryview) -> int:
        """Write the bytes of a blob; return the number of chunks."""
        chunks = range((len(view) + CHUNK - 1) // CHUNK)
        for batch in _batches(chunks):
            async with self._redis.pipeline(transaction=False) as pipe:
                for n in batch:
                    chunk = bytes(view[n * CHUNK : (n + 1) * CHUNK])
                    pipe.set(self._keys.blob_chunk(kind, key, n), chunk, ex=self._ttl_s)
                await pipe.execute()
        return len(chunks)

    async def get(self, kind: str, key: str) -> tuple[bytes, bytes] | None:
        """Return (data, meta) and renew TTL and recency; None if the blob or one of its chunks is absent."""
        found = await self._find(kind, key, SMALL_BYTES)
        if found is None:
            return None
        chunks, meta, data = found
        if data is not None:
            return data, meta
        parts: list[bytes | None] = []
        for batch in _batches(range(chunks)):
            parts += await command(self._redis, "MGET", *(self._keys.blob_chunk(kind, key, n) for n in batch))
        present = [part for part in parts if part is not None]
        return (b"".join(present), meta) if len(present) == chunks else None

    async def meta(self, kind: str, key: str) -> bytes | None:
        """Return the meta alone and renew TTL and recency; None if the blob or one of its chunks is absent."""
        found = await self._find(kind, key)
        return None if found is None else found[1]

    async def delete(self, kind: str, keys: Sequence[str]) -> None:
        """Delete those of these blobs that exist."""
        members = [self._keys.blob_member(kind, key) for key in keys]
        if members:
            await self._delete_blobs(keys=self._index, args=[*self._common, *members])

    async def _find(self, kind: str, key: str, small: int = 0) -> tuple[int, bytes, bytes | None] | None:
        """Return the number of chunks, the meta and the data of up to `small` bytes, and renew TTL and recency."""
        args = [*self._common, self._keys.blob_member(kind, key), self._ttl_s, small]
        found = await self._touch_blob(keys=self._index, args=args)
        if not found:
            return None
        return int(found[0]), bytes(found[1]), bytes(found[2]) if len(found) > 2 else None


def _batches_of_bytes(calls: Iterable[tuple[list[Any], memoryview]]) -> Iterator[list[tuple[list[Any], memoryview]]]:
    """Yield calls, in order, as many together as have the bytes of a batch of chunks."""
    batch: list[tuple[list[Any], memoryview]] = []
    size = 0
    for call in calls:
        if batch and (size + len(call[1]) > _BATCH * CHUNK or len(batch) == _MOST_CALLS):
            yield batch
            batch, size = [], 0
        batch.append(call)
        size += len(call[1])
    if batch:
        yield batch


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, _BATCH)):
        yield batch
