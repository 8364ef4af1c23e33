"""Time of steps as measured on this device at the start, or learned from those that run."""

from bisect import bisect_left
from dataclasses import dataclass

FORGOTTEN = 0.1  # of what steps before have told, with each one that is learned from
# Share of the best speed, in prompt tokens a millisecond, that a smaller step must reach. From 1,000 rows on a step
# computes prompts about as fast as larger ones, and is better for sequences that decode: each step brings them a token.
NEARLY = 0.97


@dataclass(frozen=True, slots=True)
class DecodeTimes:
    """Milliseconds of a captured decode step, by the number of rows that it is padded to. Rows ascend."""

    rows: tuple[int, ...]
    ms: tuple[float, ...]
    ms_per_cached_token: float = 0.0  # besides, for each token in the cache that a row attends to

    def __post_init__(self) -> None:
        assert len(self.rows) == len(self.ms) > 0
        assert sorted(self.rows) == list(self.rows)

    def of(self, rows: int, cached: int) -> float:
        """Return the milliseconds of a step; one that is larger than all that were measured is as long by the row as
        the largest.

        Args:
            cached: tokens in the cache that its rows attend to, in all.
        """
        nth = bisect_left(self.rows, rows)
        ms = self.ms[nth] if nth < len(self.ms) else self.ms[-1] * rows / self.rows[-1]
        return ms + cached * self.ms_per_cached_token


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Milliseconds of a step with prefill, by its number of rows. Both ascend."""

    rows: tuple[int, ...]
    ms: tuple[float, ...]
    ms_per_cached_token: float = 0.0  # besides, for each token that a sequence which decodes has in the cache
    decode: DecodeTimes | None = None  # of steps without prefill, where they were measured

    def __post_init__(self) -> None:
        assert len(self.rows) == len(self.ms) > 0
        assert sorted(self.rows) == list(self.rows)
        assert sorted(self.ms) == list(self.ms)

    def rows_within(self, ms: float, decoding: int, cached: int) -> int:
        """Return the fewest rows of a step that takes no longer and computes prompts nearly as fast as any of these; of
        all measured steps the least, if none has room for prompts or nothing was measured: that stands as 0.

        Args:
            decoding: sequences that have a row each.
            cached: tokens that these have in the cache.
        """
        beside = cached * self.ms_per_cached_token
        measured = zip(self.rows, self.ms, strict=True)
        speeds = [(rows, (rows - decoding) / (took + beside)) for rows, took in measured if 0 < took + beside <= ms]
        enough = NEARLY * max((speed for _, speed in speeds), default=0.0)
        return next((rows for rows, speed in speeds if speed >= enough > 0), self.rows[0])


class LearnedTimes:
    """Time of steps with prefill where nothing was measured at the start, by the row of the last ones."""

    def __init__(self) -> None:
        self._ms = self._rows = 0.0

    def learn(self, rows: int, ms: float) -> None:
        """Learn from a step with prefill."""
        self._ms += ms - FORGOTTEN * self._ms
        self._rows += rows - FORGOTTEN * self._rows

    def rows_within(self, ms: float, decoding: int = 0, cached: int = 0) -> int:
        """Return the rows of a step that takes so long; none before anything is known. What tokens in the cache take is
        in the time of the rows."""
        return max(0, int(ms * self._rows / self._ms)) if self._ms else 0
