"""Share of a step that prefill gets: how many tokens beside sequences that decode, and whose."""

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass

from services.engine.schedule.step_times import LearnedTimes, StepTimes

LEAST_ROOM = 128  # tokens of prefill in a step, however many sequences decode: prompts must go on
# Of the target, while an encoder uses the same GPU: one alone sends three pieces during a step, of 2 ms by default.
BESIDE_ENCODER = 0.65


@dataclass(frozen=True, slots=True)
class PrefillBudget:
    """Bound on a step in which sequences decode, so that their tokens come in time."""

    target_ms: float
    times: StepTimes | LearnedTimes
    encoder_works: Callable[[], bool] = lambda: False  # on the same GPU

    def room(self, decoding: int, cached: int, limit: int) -> int:
        """Return the tokens of prefill in a step.

        Args:
            decoding: sequences that decode in it.
            cached: tokens that these have in the cache.
            limit: tokens of the step.
        """
        if not decoding:
            return limit - decoding
        target_ms = self.target_ms * (BESIDE_ENCODER if self.encoder_works() else 1.0)
        rows = self.times.rows_within(target_ms, decoding, cached)
        return max(0, min(limit - decoding, max(LEAST_ROOM, rows - decoding)))

    @property
    def learns(self) -> bool:
        """True if the time of steps was not measured."""
        return isinstance(self.times, LearnedTimes)

    def learn(self, rows: int, ms: float) -> None:
        """Learn from a step with prefill how long such steps take."""
        if isinstance(self.times, LearnedTimes):
            self.times.learn(rows, ms)


def shares(backlogs: Ordered[int], room: int) -> list[int]:
    """Return the tokens that each prefill gets in a step.

    A half of the room is the earliest arrival's, so that every prompt comes to its end in bounded time. The rest goes
    to those that need the fewest tokens, so that none waits for a longer one.

    Args:
        backlogs: tokens to compute, by arrival.
        room: tokens in all.
    """
    given, rest, left = _reserve(backlogs, room)
    for nth in sorted(range(len(rest)), key=lambda nth: rest[nth]):
        more = min(rest[nth], left)
        given[nth] += more
        left -= more
    return given


def reaches(backlogs: Ordered[int], newcomer: int, room: int) -> bool:
    """Return True if a prefill that comes last would get tokens in this step."""
    _, rest, left = _reserve(backlogs, room)
    return sum(tokens for tokens in rest if tokens <= newcomer) < left


def _reserve(backlogs: Ordered[int], room: int) -> tuple[list[int], list[int], int]:
    """Return what each gets before the shortest do, what it needs beyond, and the room that is left."""
    reserved = min(backlogs[0], -(-room // 2)) if backlogs else 0
    given = [reserved if nth == 0 else 0 for nth in range(len(backlogs))]
    return given, [tokens - own for tokens, own in zip(backlogs, given, strict=True)], room - reserved
