"""Rates of counters over the last seconds, for the load that a replica publishes in its lease."""

import time
from collections import deque
from collections.abc import Callable, Mapping

SPAN_S = 10.0
_STEP_S = 0.2  # calls closer together than this keep no new sample, so that frequent calls do not shorten the span


class Recent:
    """Samples of counters, which never fall, over about the last `SPAN_S` seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, Mapping[str, float]]] = deque()

    def growth(self, totals: Mapping[str, float]) -> "Growth":
        """Return the growth of `totals` since the oldest sample in the span."""
        now = self._clock()
        while len(self._samples) > 1 and self._samples[1][0] <= now - SPAN_S:
            self._samples.popleft()
        if not self._samples or now - self._samples[-1][0] >= _STEP_S:
            self._samples.append((now, dict(totals)))
        then, before = self._samples[0]
        return Growth(now - then, {name: total - before[name] for name, total in totals.items()})


class Growth:
    """Growth of counters in `seconds`, by name."""

    def __init__(self, seconds: float, added: Mapping[str, float]) -> None:
        self._seconds = seconds
        self._added = added

    def per_second(self, name: str) -> float:
        """Return the rate of a counter."""
        return self._added[name] / self._seconds if self._seconds else 0.0

    def ratios(self, named: Mapping[str, tuple[str, str]]) -> dict[str, float]:
        """Return {name: growth of the first counter / growth of the second}; omit it if the second did not grow."""
        return {
            name: self._added[part] / self._added[whole] for name, (part, whole) in named.items() if self._added[whole]
        }
