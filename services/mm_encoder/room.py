"""Room of one request in the queue before the tower, in patches."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Room:
    """Semaphore by size. What is larger than all of it has it alone; `crowded`: somebody waits for room."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken = 0
        self._waiting = 0
        self._left = asyncio.Event()

    @property
    def crowded(self) -> bool:
        return self._waiting > 0

    @asynccontextmanager
    async def of(self, size: int) -> AsyncIterator[None]:
        """Have room of this size within the block."""
        self._waiting += 1
        try:
            while self._taken and self._taken + size > self._size:
                self._left.clear()
                await self._left.wait()
        finally:
            self._waiting -= 1
        self._taken += size
        try:
            yield
        finally:
            self._taken -= size
            self._left.set()
