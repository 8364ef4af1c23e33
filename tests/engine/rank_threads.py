"""Ranks as threads of one process, which compute one at a time and meet wherever they exchange."""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
PATIENCE_S = 60.0


class Meeting:
    """Exchange between threads."""

    def __init__(self, size: int) -> None:
        self._turn = threading.Lock()
        self._barrier = threading.Barrier(size)
        self._parts: list[Tensor] = [torch.empty(0)] * size
        self.exchanges = 0

    def gather(self, rank: int, own: Tensor) -> Tensor:
        self._parts[rank] = own.clone()
        self._turn.release()
        self._barrier.wait(PATIENCE_S)
        self._turn.acquire()
        parts = torch.stack(self._parts)
        self._turn.release()
        self._barrier.wait(PATIENCE_S)  # nobody writes the next before all have read these
        self._turn.acquire()
        self.exchanges += rank == 0
        return parts

    def run(self, rank: int, work: Callable[[Callable[[Tensor], Tensor]], T], into: dict[int, T]) -> None:
        with self._turn:
            try:
                into[rank] = work(lambda own: self.gather(rank, own))
            except BaseException:
                self._barrier.abort()
                raise


def on_ranks(size: int, work: Callable[[int, Callable[[Tensor], Tensor]], T]) -> tuple[list[T], int]:
    """Return what `work` returns on each rank, given its gather, and the number of exchanges."""
    meeting, found = Meeting(size), dict[int, T]()

    def of(rank: int) -> Callable[[Callable[[Tensor], Tensor]], T]:
        return lambda gather: work(rank, gather)

    threads = [threading.Thread(target=meeting.run, args=(rank, of(rank), found)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(size)], meeting.exchanges
