"""Bytes of a request's media that are here: their limits, and how many are fetched and read at a time."""

import asyncio
from dataclasses import dataclass
from types import TracebackType

from services.mm_encoder.decoding.small_images import TOGETHER
from services.mm_encoder.media.fetch import FETCHED_OF_ONE
from services.mm_encoder.media.refusal import over_limit
from shared.errors import RequestError, internal

READ_AT_ONCE = 2 * TOGETHER  # small images of one request

BUSY = internal("The server holds too many bytes of media now. Send it again later.", "overloaded", 503).failure


@dataclass(slots=True)
class HeldBytes:
    """Bytes of media of all requests that are here. `limit` is the sum beyond which no more of a link is taken."""

    limit: int
    sum: int = 0


class Received:
    """Counter of the bytes of one request's media, against its limit and that of all requests; use it as a context.

    `fits`: if all of them were small images, the prompt would fit however many tokens these had.
    """

    def __init__(self, limit: int, held: HeldBytes, fits: bool) -> None:
        self.fits = fits
        self.small = asyncio.Semaphore(READ_AT_ONCE)
        self.fetches = asyncio.Semaphore(FETCHED_OF_ONE)
        self._limit = limit
        self._held = held
        self._sum = 0
        self._holds = 0

    def __enter__(self) -> "Received":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give back all that is held."""
        self.give_back(self._holds)

    def count(self, size: int) -> None:
        """Count bytes of the request, which need not be here.

        Raises:
            RequestError: 400, the request has too many.
        """
        self._sum += size
        if self._sum > self._limit:
            raise over_limit("The size in bytes of all media", "media_request_max_bytes", self._limit)

    def arrive(self, size: int) -> None:
        """Count and hold a piece of a body that has come from another server.

        Raises:
            RequestError: 400, the request has too many; 503, all requests together hold too many.
        """
        self.count(size)
        if self._held.sum + size > self._held.limit:
            raise RequestError(BUSY)
        self.hold(size)

    def hold(self, size: int) -> None:
        """Hold bytes of an upload. It is never refused, since requests read theirs in their turn."""
        self._holds += size
        self._held.sum += size

    def give_back(self, size: int) -> None:
        """Hold so many bytes less: an item is decoded, or needs no decoding."""
        self._holds -= size
        self._held.sum -= size
