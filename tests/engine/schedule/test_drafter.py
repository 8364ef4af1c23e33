"""Guesses of the next tokens: what followed the last occurrence of the last few, with chances that were counted."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.schedule import drafter as module
from services.engine.schedule.drafter import CHANCE, Drafter

LONG = list(range(100, 200))


def drafter(tokens: list[int], known: int | None = None, ngram: int = 3) -> Drafter:
    """Return a drafter that was told of the first `known` tokens, one by one."""
    made = Drafter(np.array(tokens, np.int64), ngram)
    for count in range(1, (len(tokens) if known is None else known) + 1):
        made.follow(count)
    return made


def guess(made: Drafter, most: int, after: int = 0) -> list[int]:
    return [token for token, _ in made.guess(most, after)]


def test_what_followed_before_is_guessed() -> None:
    made = drafter([*LONG, 7, *LONG[20:23]])
    assert guess(made, 4) == LONG[23:27]
    assert guess(made, 4, after=2) == LONG[25:29]


def test_the_last_of_several_occurrences_counts() -> None:
    assert guess(drafter([1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2, 3]), 2) == [5, 9]


def test_a_match_goes_on_where_it_began() -> None:
    """Also where the same few tokens came once more in between."""
    made = drafter([1, 2, 3, 4, 5, 6, 2, 3, 4, 9, 9, 1, 2, 3, 4], ngram=3)
    assert guess(made, 2) == [5, 6]


def test_what_repeats_goes_round() -> None:
    assert guess(drafter([7, 8, 9] * 3), 7) == [7, 8, 9, 7, 8, 9, 7]
    assert guess(drafter([7] * 5), 3) == [7, 7, 7]


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3], LONG, [1, 2, 3, 9, 4, 2, 3]])
def test_nothing_is_guessed_of_what_is_new(tokens: list[int]) -> None:
    made = drafter(tokens)
    assert made.guess(5) == []
    assert made.guess(5, after=1) == []


def test_a_wrong_guess_ends_the_match() -> None:
    made = drafter([*LONG, 7, *LONG[:5], 8])
    assert made.guess(3) == []


def test_chances_are_those_of_the_guesses_that_were_right() -> None:
    """Nothing has to be verified for them: every guess is compared with the token that came."""
    [(_, unknown)] = drafter([*LONG, 7, *LONG[:3]]).guess(1)
    assert unknown == CHANCE
    right = drafter(LONG * 3).guess(4)
    chances = [chance for _, chance in right]
    assert chances == sorted(chances, reverse=True)
    assert chances[0] > 0.99
    rng = random.Random(0)
    often_wrong = [token for _ in range(60) for token in (1, 2, 3, rng.randrange(10, 1000))]
    [(_, chance)] = drafter([*often_wrong, 1, 2, 3]).guess(1)
    assert chance < CHANCE / 2


tokens = st.lists(st.integers(0, 3), max_size=150)


@settings(max_examples=200)
@given(tokens=tokens, ngram=st.integers(1, 4), cut=st.integers(0, 150), most=st.integers(1, 6))
def test_a_guess_is_a_continuation_of_the_text(tokens: list[int], ngram: int, cut: int, most: int) -> None:
    """Of an occurrence of the last tokens before, round and round."""
    made = Drafter(np.array(tokens + [0] * 100, np.int64), ngram)
    made.follow(min(cut, len(tokens)))  # at once where that is much
    made.follow(len(tokens))
    found = guess(made, most)
    ends = [end for end in range(ngram, len(tokens)) if tokens[end - ngram : end] == tokens[len(tokens) - ngram :]]
    assert found == [] or found in [(tokens[end:] * most)[:most] for end in ends]
    assert guess(made, most, after=2) == guess(made, most + 2)[2:]


@settings(max_examples=100)
@given(tokens=st.lists(st.integers(0, 103_423), min_size=module.BULK, max_size=200), ngram=st.integers(1, 4))
def test_many_tokens_at_once_are_indexed_as_one_by_one(tokens: list[int], ngram: int) -> None:
    together = Drafter(np.array(tokens, np.int64), ngram)
    together.follow(len(tokens))
    assert np.array_equal(together._ends, drafter(tokens, ngram=ngram)._ends)
    assert np.count_nonzero(together._ends) > 0


def test_its_memory_is_bounded() -> None:
    made = Drafter(np.zeros(10_000, np.int64), 3)
    assert made._ends.nbytes <= 8 * 10_000
