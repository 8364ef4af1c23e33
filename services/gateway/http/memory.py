"""Memory for the bodies of requests: what all may take together, from the first byte until they are stored."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Counter, Gauge

from services.gateway.errors import too_many
from services.gateway.settings import LARGE_SHARE

SMALL_BYTES = 1 << 20


class BodyMemory:
    """Budget of bytes."""

    def __init__(self, limit: int, rejections: Counter, gauge: Gauge) -> None:
        self._limit = limit
        self._rejections = rejections
        self._gauge = gauge
        self._held = 0

    @contextmanager
    def reservation(self, *, large: bool = False) -> Iterator["Reservation"]:
        """Hold nothing at first, and nothing any more when the block is left, however that happens.

        `large`: what is held counts among large bodies however little it is, since there is more to come.
        """
        reserved = Reservation(self, large)
        try:
            yield reserved
        finally:
            reserved.release()

    def check(self, size: int, more: int, large: bool) -> None:
        """Check that a body of `size` bytes fits if it needs `more` of them now.

        Raises:
            RequestError: 429.
        """
        limit = self._limit * LARGE_SHARE if large or size > SMALL_BYTES else self._limit
        if self._held + more > limit:
            self._rejections.labels("max_bodies_bytes").inc()
            raise too_many(
                f"The request bodies that the server holds leave no room for {size} bytes more; it holds at most "
                f"{self._limit} bytes at a time."
            )

    def change(self, count: int) -> None:
        """Hold `count` bytes more."""
        self._held += count
        self._gauge.set(self._held)


class Reservation:
    """Share of one body."""

    def __init__(self, memory: BodyMemory, large: bool) -> None:
        self._memory = memory
        self._large = large
        self._size = 0

    def check(self, announced: int) -> None:
        """Check that a body of the announced length would fit now.

        Only what has arrived is held: who announces much and sends nothing takes nothing from others.

        Raises:
            RequestError: 429.
        """
        self._memory.check(announced, announced, self._large)

    def grow(self, count: int) -> None:
        """Hold `count` bytes more.

        Raises:
            RequestError: 429.
        """
        self.resize(self._size + count)

    def resize(self, size: int) -> None:
        """Hold `size` bytes.

        Raises:
            RequestError: 429, it is more than before, and too much.
        """
        more = size - self._size
        if more > 0:
            self._memory.check(size, more, self._large)
        self._size = size
        self._memory.change(more)

    def release(self) -> None:
        """Hold nothing any more."""
        self.resize(0)
