"""Bound on the lines of one batch that are in memory: those that have begun and have no result yet."""

import asyncio

MOST_BYTES = 32 << 20


class Window:
    """Count of lines and of their bytes. A line that is larger than all of it passes alone."""

    def __init__(self, most_lines: int) -> None:
        self._most_lines = most_lines
        self._lines = 0
        self._bytes = 0
        self._left = asyncio.Event()

    async def enter(self, size: int) -> None:
        """Wait for room, and take it. One caller at a time may wait."""
        while self._lines >= self._most_lines or (self._lines and self._bytes + size > MOST_BYTES):
            self._left.clear()
            await self._left.wait()
        self._lines += 1
        self._bytes += size

    def leave(self, size: int) -> None:
        """Give the room of a line back."""
        self._lines -= 1
        self._bytes -= size
        self._left.set()
