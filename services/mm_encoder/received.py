"""Bytes of a request's media on their way here: their limits, and how many are fetched and read at a time."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from services.mm_encoder.decoding.small_images import TOGETHER
from services.mm_encoder.media.refusal import over_limit
from shared.errors import RequestError, internal

# Of one request.
READ_AT_ONCE = 2 * TOGETHER  # small images
FETCHED_AT_ONCE = 16  # by their URLs

BUSY = internal("The server holds too many bytes of media now. Send it again later.", "overloaded", 503).failure


@dataclass(slots=True)
class HeldBytes:
    """Bytes of media of all requests that are here."""

    limit: int
    sum: int = 0


class Received:
    """Counter of the bytes of one request's media, against its limit and that of all requests.

    `fits`: if all of them were small images, the prompt would fit however many tokens these had.
    """

    def __init__(
        self, limit: int, held: HeldBytes, fits: bool, fetching: Callable[[bool], None] = lambda now: None
    ) -> None:
        self.fits = fits
        self.small = asyncio.Semaphore(READ_AT_ONCE)
        self._limit = limit
        self._held = held
        self._sum = 0
        self._fetching = fetching
        self._to_fetch = 0
        self._connections = asyncio.Semaphore(FETCHED_AT_ONCE)

    def add(self, size: int) -> None:
        self._sum += size
        self._held.sum += size
        if self._sum > self._limit:
            raise over_limit("The size in bytes of all media", "media_request_max_bytes", self._limit)
        if self._held.sum > self._held.limit:
            raise RequestError(BUSY)

    def forget(self) -> None:
        """Hold nothing any more."""
        self._held.sum -= self._sum
        self._sum = 0

    @asynccontextmanager
    async def fetch(self) -> AsyncIterator[None]:
        """Fetch one of the media within the block, a few at a time."""
        self._to_fetch += 1
        if self._to_fetch == 1:
            self._fetching(True)
        try:
            async with self._connections:
                yield
        finally:
            self._to_fetch -= 1
            if not self._to_fetch:
                self._fetching(False)
