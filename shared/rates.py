"""How counters have grown of late: what a replica says of itself in its lease is of now, not of its whole life."""

import time
from collections import deque
from collections.abc import Callable, Mapping

SPAN_S = 10.0
_STEP_S = 0.2  # looks closer together than this change nothing, so that many lookers do not shorten the span


class Recent:
    """Remembers what counters said up to about `SPAN_S` seconds ago. Counters never fall."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looks: deque[tuple[float, Mapping[str, float]]] = deque()

    def look(self, totals: Mapping[str, float]) -> "Growth":
        """How `totals` differ from those of the oldest look within the span; the first look has nothing to say."""
        now = self._clock()
        while len(self._looks) > 1 and self._looks[1][0] <= now - SPAN_S:
            self._looks.popleft()
        if not self._looks or now - self._looks[-1][0] >= _STEP_S:
            self._looks.append((now, dict(totals)))
        then, before = self._looks[0]
        return Growth(now - then, {name: total - before[name] for name, total in totals.items()})


class Growth:
    """What was added in `seconds`, by counter."""

    def __init__(self, seconds: float, added: Mapping[str, float]) -> None:
        self._seconds = seconds
        self._added = added

    def per_second(self, name: str) -> float:
        return self._added[name] / self._seconds if self._seconds else 0.0

    def ratios(self, named: Mapping[str, tuple[str, str]]) -> dict[str, float]:
        """{name: added to the first counter / added to the second}, without those whose second did not grow."""
        return {
            name: self._added[part] / self._added[whole] for name, (part, whole) in named.items() if self._added[whole]
        }
