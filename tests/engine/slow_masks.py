"""Grammars whose masks take time, by a clock that only they move."""

from typing import Any

from llguidance import LLMatcher

from services.engine.schedule.grammar_state import GrammarState


class Clock:
    """Stand-in for the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waited = 0.0  # of it, while others had the core

    def perf_counter(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.now - self.waited


class SlowMatcher:
    """Matcher whose masks take some seconds each."""

    def __init__(self, matcher: LLMatcher, clock: Clock, seconds: float, waits: bool) -> None:
        self.real = matcher
        self._clock = clock
        self._seconds = seconds
        self._waits = waits

    def unsafe_compute_mask_ptr(self, address: int, length: int) -> None:
        self.real.unsafe_compute_mask_ptr(address, length)
        self._clock.now += self._seconds
        self._clock.waited += self._seconds * self._waits

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class SlowExecutor:
    """Stand-in for the library's threads, which computes one mask after the other."""

    def unsafe_compute_mask_ptr(
        self, jobs: list[tuple[SlowMatcher, int]], address: int, length: int, count: int
    ) -> None:
        assert len(jobs) <= count
        for matcher, row in jobs:
            matcher.unsafe_compute_mask_ptr(address + row * length, length)


def slow_down(state: GrammarState, clock: Clock, seconds: float, *, waits: bool = False) -> None:
    """Have each mask of a state take so long; `waits`: for a core."""
    state.matcher = SlowMatcher(state.matcher, clock, seconds, waits)  # type: ignore[assignment]
