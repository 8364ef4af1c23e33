"""Admission of chat requests: a limit on how many are handled at a time, and none once the gateway drains."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Counter

from services.gateway.errors import SHUTTING_DOWN, too_many
from shared.errors import RequestError


class Admission:
    """Counter of the chat requests that are being read, prepared or answered."""

    def __init__(self, limit: int, rejections: Counter) -> None:
        self._limit = limit
        self._rejections = rejections
        self._admitted = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    def __len__(self) -> int:
        """Count the requests that hold a slot."""
        return self._admitted

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold a slot while a request is handled.

        Raises:
            RequestError: 503 while draining, 429 when full.
        """
        if self.draining:
            self._rejections.labels("draining").inc()
            raise RequestError(SHUTTING_DOWN)
        if self._admitted >= self._limit:
            self._rejections.labels("max_concurrency").inc()
            raise too_many(f"Too many requests, current max concurrency is {self._limit}.")
        self._admitted += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._admitted -= 1
            if not self._admitted:
                self._idle.set()

    async def wait_until_idle(self) -> None:
        """Return once no request holds a slot."""
        await self._idle.wait()
