"""Signs of life of the ranks, in memory that all of them see: counters that each rank alone raises."""

import mmap

import numpy as np

PAGE = 4096
_FIELDS = ("beats", "orders", "exchanges", "serving")
_STRIDE = 8  # a cache line each


class Pulse:
    """Counters of one rank."""

    def __init__(self, memory: mmap.mmap, rank: int) -> None:
        """`memory` begins with a page of such counters."""
        start = rank * 8 * _STRIDE
        self._counters = np.frombuffer(memory, np.int64, len(_FIELDS), start)

    def beat(self) -> None:
        """Say that the process runs."""
        self._counters[0] += 1

    def take_order(self) -> None:
        self._counters[1] += 1

    def exchange(self) -> None:
        """Say that another exchange between the ranks has ended."""
        self._counters[2] += 1

    def serve(self) -> None:
        """Say that loading has ended."""
        self._counters[3] = 1

    @property
    def beats(self) -> int:
        return int(self._counters[0])

    @property
    def progress(self) -> tuple[int, int]:
        """Return the orders taken and the exchanges ended."""
        return int(self._counters[1]), int(self._counters[2])

    @property
    def serving(self) -> bool:
        return bool(self._counters[3])
