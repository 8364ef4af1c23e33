"""Who may come in: a limit on requests at a time, and nobody once the server drains."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Counter

from services.gateway.errors import SHUTTING_DOWN, too_many
from shared.errors import RequestError


class Admission:
    """Counts the chat requests being read, prepared or answered."""

    def __init__(self, limit: int, rejections: Counter) -> None:
        self._limit = limit
        self._rejections = rejections
        self._inside = 0
        self._none = asyncio.Event()
        self._none.set()
        self.draining = False

    @property
    def inside(self) -> int:
        return self._inside

    @contextmanager
    def slot(self) -> Iterator[None]:
        """
        Raises:
            RequestError: 503 while draining, 429 when full.
        """
        if self.draining:
            self._rejections.labels("draining").inc()
            raise RequestError(SHUTTING_DOWN)
        if self._inside >= self._limit:
            self._rejections.labels("max_concurrency").inc()
            raise too_many(f"Too many requests, current max concurrency is {self._limit}.")
        self._inside += 1
        self._none.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._none.set()

    async def empty(self) -> None:
        """Return when nobody is inside."""
        await self._none.wait()
