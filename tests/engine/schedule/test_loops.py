"""Loops of the thinking, by their definition, and as a sequence follows them."""

from engine_cases import THINK_CLOSE, sequence
from hypothesis import given
from hypothesis import strategies as st

from services.engine.schedule.loops import MIN_TOKENS, LoopDetector


def is_loop(tokens: list[int], repeats: int, longest: int) -> bool:
    """The definition: the text ends in `repeats` copies of an n-gram, which take MIN_TOKENS together."""
    for length in range(1, longest + 1):
        end = max(repeats * length, MIN_TOKENS)
        tail = tokens[-end:]
        if len(tail) == end and all(tail[i] == tail[i - length] for i in range(length, end)):
            return True
    return False


@given(
    head=st.lists(st.integers(0, 3), max_size=20),
    gram=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    copies=st.integers(1, 60),
    tail=st.lists(st.integers(0, 3), max_size=3),
    repeats=st.integers(2, 6),
    longest=st.integers(1, 24),
)
def test_loops_are_found_where_they_are(
    head: list[int], gram: list[int], copies: int, tail: list[int], repeats: int, longest: int
) -> None:
    text = [*head, *(gram * copies)[:200], *tail]
    detector = LoopDetector(repeats, longest)
    for count, token in enumerate(text, 1):
        detector.add(token)
        assert detector.found == is_loop(text[:count], repeats, longest)


def test_short_runs_are_no_loop() -> None:
    detector = LoopDetector(2, 8)
    for _ in range(MIN_TOKENS - 1):
        detector.add(7)
    assert not detector.found
    detector.add(7)
    assert detector.found


def test_a_loop_counts_in_the_thinking_alone() -> None:
    asked = {"thinking": True, "loop_repeats": 3, "loop_tokens": 4, "max_tokens": 200}
    looping = [97, 98] * (MIN_TOKENS // 2)
    assert sequence([5], looping, **asked).loops_in_thinking, "also where the tokens come from a journal"
    assert not sequence([5], looping[:-1], **asked).loops_in_thinking
    assert not sequence([5], [*looping, THINK_CLOSE], **asked).loops_in_thinking
    assert not sequence([5], [THINK_CLOSE, *looping], **asked).loops_in_thinking
    assert sequence([5], [], **asked | {"thinking": False}).loops is None
    assert sequence([5], [], **asked | {"loop_repeats": 0}).loops is None
