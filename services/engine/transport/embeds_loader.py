"""Loader of the embeddings of prompts, some of which may still be in the making at mm_encoder.

mm_encoder broadcasts each key when it is done with it. A wait looks again after `recheck_s` in any case, since the
message may be lost, or its sender may die: then another replica makes them.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from services.engine.schedule.embeds import Embeds
from services.engine.transport.media import EmbedsGoneError, check_embeds, gone
from shared.bus.blobs import EMBEDS, Blobs
from shared.bus.ownership import EntryOwnership
from shared.bus.retry import retry_until_available
from shared.errors import Failure, RequestError
from shared.log import logger
from shared.messages import MediaSpan
from shared.segments import Segments

_log = logger(__name__)


class EmbedsLoader:
    """Reader of the blobs of kind "embeds", for prompts of one model; of one that is empty a segment has the bytes."""

    def __init__(
        self,
        blobs: Blobs,
        ownership: EntryOwnership,
        hidden_size: int,
        recheck_s: float,
        segments: Segments | None,
    ) -> None:
        self._blobs = blobs
        self._segments = segments
        self._ownership = ownership
        self._hidden_size = hidden_size
        self._recheck_s = recheck_s
        self._waiting: dict[str, set[_Wait]] = defaultdict(set)  # by key

    def encoded(self, key: str) -> None:
        """Wake whoever waits for the embeddings of `key`."""
        for wait in self._waiting.get(key, ()):
            wait.hear(key)

    async def load(self, request_id: str, spans: Sequence[MediaSpan], *, wait: bool) -> list[Embeds | None]:
        """Return the embeddings of all spans; None, only if `wait`, for those that are still being made.

        Raises:
            EmbedsGoneError: a blob is gone, and nobody makes it; or it does not match its span, and was deleted.
            RequestError: the embeddings cannot be made.
        """
        found = await self._look(spans, range(len(spans)))
        if len(found) < len(spans):
            coming = await self._coming(request_id)
            found |= await self._look(spans, [index for index in range(len(spans)) if index not in found])
            lacking = [span for index, span in enumerate(spans) if index not in found]
            if lacking and not (coming and wait):
                raise gone(lacking[0])
        return [found.get(index) for index in range(len(spans))]

    async def arrivals(
        self, request_id: str, spans: Sequence[MediaSpan], embeds: Sequence[Embeds | None]
    ) -> AsyncGenerator[Mapping[int, Embeds]]:
        """Yield the embeddings that are missing among `embeds`, by index of their span, as they are stored, until all
        are there; nothing, now and then, while none is.

        Raises:
            EmbedsGoneError, RequestError: as `load`.
        """
        lacking = [index for index, each in enumerate(embeds) if each is None]
        with self._wait(spans[index].key for index in lacking) as wait:
            places = lacking
            while lacking:
                found = await self._look(spans, places)
                if not found and not await self._coming(request_id):
                    found = await self._look(spans, lacking)
                    if len(found) < len(lacking):
                        raise gone(next(spans[index] for index in lacking if index not in found))
                yield found
                lacking = [index for index in lacking if index not in found]
                if not wait.told and found:
                    places = lacking  # no message told of these, and perhaps none does of others
                elif lacking:
                    keys = await wait.keys(self._recheck_s)
                    places = [index for index in lacking if spans[index].key in keys] or lacking[:1]

    @contextmanager
    def _wait(self, keys: Iterable[str]) -> Iterator["_Wait"]:
        """Return a wait that hears of these keys."""
        wait, names = _Wait(), set(keys)
        for key in names:
            self._waiting[key].add(wait)
        try:
            yield wait
        finally:
            for key in names:
                self._waiting[key].discard(wait)
                if not self._waiting[key]:
                    del self._waiting[key]

    async def _coming(self, request_id: str) -> bool:
        """Return whether embeddings that a request lacks are being made.

        Raises:
            RequestError: they cannot be made.
        """
        state = await retry_until_available("embeds state", lambda: self._ownership.embeds_state(request_id))
        if isinstance(state, Failure):
            raise RequestError(state)
        return state == "coming"

    async def _look(self, spans: Sequence[MediaSpan], indices: Iterable[int]) -> dict[int, Embeds]:
        """Return what is stored of these spans' embeddings. What does not match its span is deleted: nobody finds it.

        Raises:
            EmbedsGoneError: stored embeddings do not match their span.
        """
        places = list(indices)
        keys = list(dict.fromkeys(spans[index].key for index in places))
        blobs = await asyncio.gather(*map(self._read, keys))
        stored = dict(zip(keys, blobs, strict=True))
        found = {}
        for index in places:
            span = spans[index]
            if (blob := stored[span.key]) is not None:
                try:
                    found[index] = check_embeds(span, blob, self._hidden_size)
                except EmbedsGoneError as error:
                    _log.error("embeddings deleted", extra={"key": span.key, "reason": error.failure.message})
                    await retry_until_available("blobs", partial(self._blobs.delete, EMBEDS, [span.key]))
                    raise
        return found

    async def _read(self, key: str) -> tuple[bytes | memoryview, bytes] | None:
        """Return what is stored under a key, and its meta. None: it is gone, or in a segment that is."""
        blob = await retry_until_available("blobs", partial(self._blobs.get, EMBEDS, key))
        if blob is None or blob[0]:
            return blob
        mapped = None if self._segments is None else await asyncio.to_thread(self._segments.read, key)
        return None if mapped is None else (mapped, blob[1])


class _Wait:
    """Keys that one request was told of; `told`: the last time it waited for some."""

    def __init__(self) -> None:
        self._keys: set[str] = set()
        self._event = asyncio.Event()
        self.told = True

    def hear(self, key: str) -> None:
        self._keys.add(key)
        self._event.set()

    async def keys(self, seconds: float) -> set[str]:
        """Return the keys that it was told of, none if there are none within so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            pass
        heard, self._keys = self._keys, set()
        self._event.clear()
        self.told = bool(heard)
        return heard
