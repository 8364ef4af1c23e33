"""How many guesses a step verifies: as many as bring more tokens for the time, and none where that is doubtful."""

import pytest
from engine_cases import sequence
from hypothesis import given
from hypothesis import strategies as st

from services.engine.schedule.speculation import GAIN, Speculation, Speculator, worthwhile


def falling(chance: float, count: int) -> list[float]:
    """Return the chances of guesses each of which is right with this one."""
    return [chance ** (step + 1) for step in range(count)]


@pytest.mark.parametrize(
    ("chance", "taken"),
    [(1.0, 8), (0.95, 8), (0.7, 3), (0.6, 2), (0.5, 0), (0.0, 0)],
)
def test_the_surer_the_more(chance: float, taken: int) -> None:
    assert worthwhile([falling(chance, 8)], 1, 100) == [taken]


def test_the_surest_come_first() -> None:
    assert worthwhile([falling(0.1, 5), falling(1.0, 5), []], 3, 100) == [0, 5, 0]


def test_there_is_room_for_so_many() -> None:
    assert sum(worthwhile([[1.0] * 9, [1.0] * 9], 2, 7)) == 7


def test_a_large_batch_hardly_gains_by_one_of_its_sequences() -> None:
    assert worthwhile([[0.8], *[[]] * 3], 4, 100) == [0, 0, 0, 0]
    assert worthwhile([[0.8]] * 4, 4, 100) == [1, 1, 1, 1]


@given(
    chances=st.lists(st.lists(st.floats(0, 1), max_size=6).map(lambda c: sorted(c, reverse=True)), min_size=1),
    room=st.integers(0, 20),
)
def test_no_step_is_expected_to_be_slower(chances: list[list[float]], room: int) -> None:
    rows = len(chances)
    counts = worthwhile(chances, rows, room)
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
