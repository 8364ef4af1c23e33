"""Admission of chat requests: a limit on how many are handled at a time, and none once the gateway drains."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import Counter

from services.gateway.errors import SHUTTING_DOWN, too_many
from shared.errors import RequestError


class Admission:
    """Counter of the chat requests that are here, and of those among them that have been read and take a slot."""

    def __init__(self, limit: int, rejections: Counter) -> None:
        self._limit = limit
        self._rejections = rejections
        self._present = 0
        self._admitted = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    def __len__(self) -> int:
        """Count the requests that are being read, prepared or answered."""
        return self._present

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold a slot while a request is handled.

        Raises:
            RequestError: 503 while draining, 429 when full.
        """
        with self.arrival() as take_slot:
            take_slot()
            yield

    @contextmanager
    def arrival(self) -> Iterator[Callable[[], None]]:
        """Let a request in. It takes its slot when its body is here: clients that send slowly keep no others out.

        The function that is yielded takes the slot; it raises as this does when full.

        Raises:
            RequestError: 503 while draining, 429 when full.
        """
        if self.draining:
            self._rejections.labels("draining").inc()
            raise RequestError(SHUTTING_DOWN)
        self._check_free()
        slots = 0

        def take_slot() -> None:
            nonlocal slots
            self._check_free()
            self._admitted += 1
            slots = 1

        self._present += 1
        self._idle.clear()
        try:
            yield take_slot
        finally:
            self._admitted -= slots
            self._present -= 1
            if not self._present:
                self._idle.set()

    def _check_free(self) -> None:
        if self._admitted >= self._limit:
            self._rejections.labels("max_concurrency").inc()
            raise too_many(f"Too many requests, current max concurrency is {self._limit}.")

    async def wait_until_idle(self) -> None:
        """Return once no request is here."""
        await self._idle.wait()
