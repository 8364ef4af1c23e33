"""Bound on the lines of one batch that are in memory: those that have begun and have no result yet."""

import asyncio

MOST_BYTES = 32 << 20


class Place:
    """Place of one line in a window: the bytes of the line, and of its result if that waits for room in files."""

    __slots__ = ("result", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.result = 0


class Window:
    """Count of lines and of their bytes. A line that is larger than all of it passes alone."""

    def __init__(self, most_lines: int) -> None:
        self._most_lines = most_lines
        self._lines = 0
        self._results = 0  # that wait
        self._left = asyncio.Event()
        self.bytes = 0

    async def enter(self, size: int) -> Place:
        """Wait for room, and take it. One caller at a time may wait."""
        while self._lines >= self._most_lines or (self._lines and self.bytes + size > MOST_BYTES):
            self._left.clear()
            await self._left.wait()
        self._lines += 1
        self.bytes += size
        return Place(size)

    def hold(self, place: Place, size: int) -> bool:
        """Hold a result that waits, beside its line; return False if there is no room and another one waits."""
        if self._results and self.bytes + size > MOST_BYTES:
            return False
        place.result = size
        self._results += 1
        self.bytes += size
        return True

    def let_go(self, place: Place) -> None:
        """Give the room of a result back, if one is held: it waits no more."""
        self._results -= place.result > 0
        self.bytes -= place.result
        place.result = 0
        self._left.set()

    def leave(self, place: Place) -> None:
        """Give the room of a line back, and of its result."""
        self._lines -= 1
        self.bytes -= place.size
        self.let_go(place)
