"""Speculative decoding that changes no answer: which guessed tokens a step verifies, and which of them become tokens.

Behind a sequence's last token its step computes guessed ones, and samples a token behind each of these, too. The draw
at a place is a function of the seed and the tokens before it. So where the guesses before a place are what was drawn,
the token drawn there is the one that would have come without any guess, and all others are dropped: keys and values of
a wrong guess are written over by the step that computes what was drawn instead.
"""

from collections import Counter
from collections.abc import Sequence as Ordered

import msgspec

from services.engine.schedule.drafter import Drafter
from services.engine.schedule.sequence import Sequence
from services.engine.schedule.step_times import DecodeTimes
from shared.messages import Finish

# Tokens for the time, against no guesses, that guesses must promise: the estimates may be off, and the host works more.
GAIN = 1.1
# Milliseconds that a step takes longer for having waited until the one before was read; measured from the first such
# step on. The mean forgets all but the last few, and no pause of the process counts for more than MOST_WAIT_MS. What is
# above WAIT_MS is forgotten over QUIET steps without guesses, too: else guessing, once stopped, would never be tried.
WAIT_MS, MOST_WAIT_MS, REMEMBERED, QUIET = 0.4, 4.0, 16, 256


class Speculation(msgspec.Struct, frozen=True):
    """Limits of guessing."""

    most: int  # guessed tokens of a sequence in a step
    ngram: int  # tokens that must have come before in the same order, for a guess of what follows
    max_batch: int  # sequences that decode in a step, above which nothing is guessed
    times: DecodeTimes | None = None  # of steps on this device; None: not measured


class SquareRoot:
    """Cost of guesses where nothing was measured: a step of n times the rows is taken to last sqrt(n) times as long."""

    def of(self, rows: int, added: int, cached: int, more: int) -> float:
        """Return the time of a step with guesses over that of the step without.

        Args:
            rows: without guesses.
            added: by them.
            cached: tokens in the cache that rows attend to, without guesses.
            more: that the guesses' rows attend to.
        """
        return float(((rows + added) / rows) ** 0.5)


class Measured:
    """Cost of guesses by the time of steps, and by what is lost where the device waits for the host meanwhile."""

    def __init__(self, times: DecodeTimes) -> None:
        self._times = times
        self.wait_ms = WAIT_MS

    def of(self, rows: int, added: int, cached: int, more: int) -> float:
        """Return the same as `SquareRoot.of`."""
        return (self._times.of(rows + added, cached + more) + self.wait_ms) / self._times.of(rows, cached)

    def learn(self, rows: int, cached: int, ms: float) -> None:
        """Learn from a step with guesses, and `ms` from the end of the one before to its own."""
        waited = min(max(ms - self._times.of(rows, cached), 0.0), MOST_WAIT_MS)
        self.wait_ms += (waited - self.wait_ms) / REMEMBERED

    def forget(self) -> None:
        """Forget a little of a long wait, for a step without guesses."""
        self.wait_ms -= max(self.wait_ms - WAIT_MS, 0.0) / QUIET


Cost = SquareRoot | Measured


class Speculator:
    """Guesser for all sequences of a scheduler."""

    def __init__(self, limits: Speculation | None) -> None:
        """`limits`: None if nothing is ever guessed."""
        self._limits = limits
        times = None if limits is None else limits.times
        self._cost: Cost = SquareRoot() if times is None else Measured(times)

    def guess(self, sequences: Ordered[Sequence], rows: int, room: int, after: int = 0) -> list[list[int]]:
        """Return the guessed tokens of each sequence that are worth their rows in a step, or [] if there are none.

        Args:
            sequences: all of whose tokens are known, but for `after`.
            rows: of the step without guesses.
            room: the most rows to add.
            after: tokens of each that are being drawn, and that are not guessed.
        """
        limits = self._limits
        if limits is None or room <= 0 or not 0 < len(sequences) <= limits.max_batch:
            return []
        guesses = []
        for sequence in sequences:
            if sequence.drafter is None:
                sequence.drafter = Drafter(sequence.tokens, limits.ngram)
            sequence.drafter.follow(sequence.num_tokens)
            most = min(limits.most, room, sequence.max_tokens - sequence.num_generated - 1 - after)
            guesses.append(sequence.drafter.guess(most, after) if most > 0 else [])
        chances = [[chance for _, chance in guessed] for guessed in guesses]
        counts = worthwhile(chances, rows, room, self._cost, [sequence.num_tokens for sequence in sequences])
        return [[token for token, _ in guessed[:n]] for guessed, n in zip(guesses, counts, strict=True)]

    def learn(self, rows: int, cached: int, ms: float) -> None:
        """Learn from a step that verified guesses how long they take; see `Measured.learn`."""
        if isinstance(self._cost, Measured):
            self._cost.learn(rows, cached, ms)

    def forget(self) -> None:
        """Count a step without guesses; see `Measured.forget`."""
        if isinstance(self._cost, Measured):
            self._cost.forget()


def worthwhile(chances: Ordered[Ordered[float]], rows: int, room: int, cost: Cost, contexts: Ordered[int]) -> list[int]:
    """Return how many guesses of each sequence to verify, so that most tokens come for the time.

    Args:
        chances: of each sequence that draws a token in any case, the chances that its first, second, ... guess is
            reached and right; they never rise.
        rows: of the step without guesses.
        room: the most rows to add.
        contexts: tokens of each sequence, to which each of its rows attends.
    """
    # Of equal chances the earlier guess counts first, so that sequences take turns.
    guesses = ((chance, -step, index) for index, each in enumerate(chances) for step, chance in enumerate(each))
    likeliest = sorted(guesses, reverse=True)[:room]
    expected, cached, more = float(len(chances)), sum(contexts), 0
    best, count = GAIN, 0
    for added, (chance, _, index) in enumerate(likeliest, 1):
        expected += chance
        more += contexts[index]
        gain = expected / len(chances) / cost.of(rows, added, cached, more)
        if gain > best:
            best, count = gain, added
    taken = Counter(index for *_, index in likeliest[:count])
    return [taken[index] for index in range(len(chances))]


def accept(sequence: Sequence, drawn: Ordered[int]) -> tuple[int, Finish | None]:
    """Append the first token drawn, and each further one as long as the guess before it was drawn as well.

    Returns:
        How many were appended, and why the sequence has ended or None.
    """
    if not sequence.drafts:
        sequence.append(drawn[0])
        return 1, sequence.finish()
    known = sequence.num_tokens
    guessed = sequence.tokens[known : known + sequence.drafts].tolist()
    for appended, token in enumerate(drawn, 1):
        sequence.append(token)
        finish = sequence.finish()
        # After a loop of the thinking, too: whoever counts loops looks once a step.
        if finish is not None or sequence.loops_in_thinking or guessed[appended - 1 : appended] != [token]:
            break
    sequence.num_computed = sequence.num_tokens - 1
    sequence.drafts = 0
    return appended, finish
