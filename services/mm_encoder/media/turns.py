"""Threads for the frames of a video, or the bands of one image: Pillow lets go of Python's lock while it resizes."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager


class Turns:
    """Threads of one process, for one file at a time: so many beside the caller's, or with 1 the caller's alone."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, "frames") if threads > 1 else None

    @contextmanager
    def all_done(self) -> Iterator[Callable[[Callable[[], None]], None]]:
        """Yield a function that has work done, now or soon, and wait for all of it at the end of the block.

        At most a piece for each thread is under way: whoever adds one more waits for the first. An error of one is
        raised where another is added, or at the end.
        """
        running: deque[Future[None]] = deque()

        def add(work: Callable[[], None]) -> None:
            if self._pool is None:
                work()
                return
            if len(running) == self.threads:
                running.popleft().result()
            running.append(self._pool.submit(work))

        try:
            yield add
            for future in running:
                future.result()
        finally:
            for future in running:
                future.exception()
