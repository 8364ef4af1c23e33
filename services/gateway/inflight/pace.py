"""Pace of the engines: how long who joins the queue now will wait, by the requests that have ended lately. Pure."""

from collections import deque

WINDOW_S = 60.0
LEAST_ENDED = 16  # within the window; fewer say nothing of a rate


class Pace:
    """Numbers of requests that had ended, by time."""

    def __init__(self) -> None:
        self._ended: deque[tuple[float, int]] = deque()

    def note(self, now: float, ended: int) -> None:
        """Note how many had ended at `now`, in seconds. A count that has become less begins anew."""
        if self._ended and ended < self._ended[-1][1]:
            self._ended.clear()
        self._ended.append((now, ended))
        while self._ended[0][0] < now - WINDOW_S:
            self._ended.popleft()

    def wait_s(self, waiting: int) -> float | None:
        """Return the seconds until as many as `waiting` have ended; None if too few have lately."""
        if len(self._ended) < 2:
            return None
        (since, before), (now, after) = self._ended[0], self._ended[-1]
        if after - before < LEAST_ENDED or now <= since:
            return None
        return waiting * (now - since) / (after - before)
