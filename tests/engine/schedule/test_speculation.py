"""How many guesses a step verifies: as many as bring more tokens for the time, and none where that is doubtful."""

import pytest
from engine_cases import sequence
from hypothesis import given
from hypothesis import strategies as st

from services.engine.schedule.blocks import BlockPool
from services.engine.schedule.plan import Plan
from services.engine.schedule.scheduler import Limits, Scheduler
from services.engine.schedule.speculation import (
    GAIN,
    MOST_WAIT_MS,
    QUIET,
    WAIT_MS,
    Measured,
    Speculation,
    Speculator,
    SquareRoot,
    worthwhile,
)
from services.engine.schedule.step_times import DecodeTimes

TIMES = DecodeTimes((1, 2, 4, 8, 16), (1.4, 1.8, 2.2, 2.8, 3.6), 0.0001)


def by_root(chances: list[list[float]], rows: int, room: int) -> list[int]:
    return worthwhile(chances, rows, room, SquareRoot(), [1] * len(chances))


def falling(chance: float, count: int) -> list[float]:
    """Return the chances of guesses each of which is right with this one."""
    return [chance ** (step + 1) for step in range(count)]


@pytest.mark.parametrize(
    ("chance", "taken"),
    [(1.0, 8), (0.95, 8), (0.7, 3), (0.6, 2), (0.5, 0), (0.0, 0)],
)
def test_the_surer_the_more(chance: float, taken: int) -> None:
    assert by_root([falling(chance, 8)], 1, 100) == [taken]


def test_the_surest_come_first() -> None:
    assert by_root([falling(0.1, 5), falling(1.0, 5), []], 3, 100) == [0, 5, 0]


def test_there_is_room_for_so_many() -> None:
    assert sum(by_root([[1.0] * 9, [1.0] * 9], 2, 7)) == 7


def test_a_large_batch_hardly_gains_by_one_of_its_sequences() -> None:
    assert by_root([[0.8], *[[]] * 3], 4, 100) == [0, 0, 0, 0]
    assert by_root([[0.8]] * 4, 4, 100) == [1, 1, 1, 1]


@given(
    chances=st.lists(st.lists(st.floats(0, 1), max_size=6).map(lambda c: sorted(c, reverse=True)), min_size=1),
    room=st.integers(0, 20),
)
def test_no_step_is_expected_to_be_slower(chances: list[list[float]], room: int) -> None:
    rows = len(chances)
    counts = by_root(chances, rows, room)
    assert all(0 <= count <= len(each) for count, each in zip(counts, chances, strict=True))
    assert sum(counts) <= room
    expected = sum(sum(each[:count]) for count, each in zip(counts, chances, strict=True))
    assert not sum(counts) or (rows + expected) / rows > GAIN * ((rows + sum(counts)) / rows) ** 0.5


@pytest.mark.parametrize(
    ("sequences", "limits", "guessed"),
    [
        (1, Speculation(most=3, ngram=2, max_batch=2), [3]),
        (2, Speculation(most=3, ngram=2, max_batch=2), [3, 3]),
        (3, Speculation(most=3, ngram=2, max_batch=2), []),
        (1, None, []),
    ],
)
def test_large_batches_are_left_alone(sequences: int, limits: Speculation | None, guessed: list[int]) -> None:
    speculator = Speculator(limits)
    prompt = [11, 12, 13, 14] * 20
    made = [sequence(prompt[:40], prompt[40:41], request_id=str(i), max_tokens=90) for i in range(sequences)]
    for one in made:
        speculator.guess([one], 1, 9)
        for token in prompt[41:70]:
            one.append(token)
            speculator.guess([one], 1, 9)
    assert [len(tokens) for tokens in speculator.guess(made, sequences, 99)] == guessed
    assert all(one.drafter is None for one in made) == (limits is None), "what is off costs nothing"


# ------------------------------------------------------------------------------------------------- by the measured time


@pytest.mark.parametrize(
    ("chance", "context", "taken"),
    [
        (1.0, 10, 7),  # eight rows: the ninth would be one of sixteen
        (0.9, 10, 7),
        (0.6, 10, 3),
        (0.5, 10, 0),
        (1.0, 20_000, 7),
        (0.8, 20_000, 0),  # each row reads all of its context again, which is longer than all else
    ],
)
def test_a_step_is_as_long_as_it_was_measured(chance: float, context: int, taken: int) -> None:
    assert worthwhile([falling(chance, 8)], 1, 100, Measured(TIMES), [context]) == [taken]


def test_a_step_beyond_those_measured_is_as_long_by_the_row() -> None:
    assert TIMES.of(32, 0) == 7.2
    assert TIMES.of(9, 1000) == 3.6 + 0.1


def test_waiting_is_measured_and_counts() -> None:
    """A host that needs longer than a step makes guesses pay for it."""
    cost = Measured(TIMES)
    for _ in range(100):
        cost.learn(8, 100, TIMES.of(8, 100) + 2.0)
    assert cost.wait_ms == pytest.approx(2.0, abs=0.01)
    assert worthwhile([falling(0.7, 8)], 1, 100, cost, [10]) == [0]
    cost.learn(8, 100, 1000.0)
    assert cost.wait_ms < 2.0 + MOST_WAIT_MS / 16, "a pause of the process is no rule"
    cost.learn(8, 100, 0.1)
    assert cost.wait_ms > WAIT_MS


def test_a_copy_is_guessed_however_long_steps_have_waited() -> None:
    """Otherwise nothing would ever be measured again."""
    cost = Measured(TIMES)
    for _ in range(100):
        cost.learn(8, 100, 1000.0)
    assert cost.wait_ms == pytest.approx(MOST_WAIT_MS, abs=0.01)
    assert worthwhile([falling(1.0, 8)], 1, 100, cost, [10]) == [8]


def test_guesses_are_tried_again_after_steps_that_were_slow() -> None:
    """Other work of the device makes some steps slow. Guessing comes back once it is over."""
    cost, chances = Measured(TIMES), [falling(0.7, 8)]

    def guessed() -> int:
        [count] = worthwhile(chances, 1, 100, cost, [10])
        return count

    usual = guessed()
    assert usual > 0
    while guessed():
        cost.learn(1 + guessed(), 100, 15.0)
    quiet = 0
    while not guessed():
        cost.forget()
        quiet += 1
        assert quiet < 4 * QUIET
    while guessed() < usual:
        cost.learn(1 + guessed(), 100, TIMES.of(1 + guessed(), 100) + WAIT_MS)


def test_a_wait_that_is_long_is_rarely_tried() -> None:
    cost, tried = Measured(TIMES), 0
    for _ in range(10_000):
        [count] = worthwhile([falling(0.7, 8)], 1, 100, cost, [10])
        if count:
            cost.learn(1 + count, 100, TIMES.of(1 + count, 100) + 3.0)
            tried += 1
        else:
            cost.forget()
    assert 0 < tried < 300


def test_a_wait_below_the_usual_is_not_forgotten() -> None:
    cost = Measured(TIMES)
    for _ in range(100):
        cost.learn(8, 100, TIMES.of(8, 100))
    short = cost.wait_ms
    assert short < WAIT_MS / 2
    cost.forget()
    assert cost.wait_ms == short


def test_the_scheduler_tells_of_every_step_without_guesses() -> None:
    scheduler = Scheduler(BlockPool(8, False), Limits(4, 16, True, 4, speculation=Speculation(3, 2, 4, TIMES)))
    cost = scheduler._speculator._cost
    assert isinstance(cost, Measured)
    cost.wait_ms = 2.0
    scheduler.learn(Plan(()), 5.0, 5.0)
    assert WAIT_MS < cost.wait_ms < 2.0
