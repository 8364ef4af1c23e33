"""Lengths and the step time of the engine's decode benchmarks, in process and through Redis."""

import statistics
from collections.abc import Sequence

PROMPT = 1024  # tokens
GENERATED = 72  # tokens
WARM_STEPS = 8


def step_ms(stamps: Sequence[tuple[float, int]], requests: int) -> float:
    """Return the mean milliseconds of the steps in which all requests decode, but for the first few.

    Args:
        stamps: when each step's tokens came, in seconds, and how many.
    """
    full = [i for i, (_, tokens) in enumerate(stamps) if tokens == requests][WARM_STEPS:]
    return 1000 * statistics.fmean(stamps[i][0] - stamps[i - 1][0] for i in full)
