"""Masks of grammars: the same whoever computes them, and neither one nor those of a step take long."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from engine_cases import VOCAB, compile_grammar
from slow_masks import Clock, SlowExecutor, slow_down

from services.engine.run import grammar_masks
from services.engine.run.grammar_masks import GrammarMasks
from services.engine.schedule.grammar_state import GrammarState
from shared.grammar.forms import json_schema, write


def test_masks_of_the_caller_are_those_of_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    text = write(json_schema({"type": "array", "items": {"enum": ["a", "b", 1]}}), thinking=False)
    states = [GrammarState(compile_grammar(text)) for _ in range(5)]
    for state, answer in zip(states, (b"", b"[", b'["', b'["a', b'["a"'), strict=True):
        for token in answer:
            state.advance(token)
    masks = GrammarMasks(VOCAB, 2)
    monkeypatch.setattr(grammar_masks, "ALONE_S", 0)
    by_threads = masks.compute(states)
    monkeypatch.setattr(grammar_masks, "ALONE_S", 3600)
    assert np.array_equal(masks.compute(states), by_threads)
    assert len({mask.tobytes() for mask in by_threads}) == len(states), "no two positions are alike here"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(grammar_masks, "time", made)
    return made


def states_that_take(clock: Clock, *seconds: float) -> list[GrammarState]:
    made = [GrammarState(compile_grammar(write(json_schema({}), thinking=False))) for _ in seconds]
    for place, (state, each) in enumerate(zip(made, seconds, strict=True)):
        for token in b'[{"'[:place]:
            state.advance(token)
        slow_down(state, clock, each)
    return made


def failed(states: list[GrammarState]) -> list[bool]:
    return [state.failure is not None for state in states]


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> GrammarMasks:
    made = GrammarMasks(VOCAB, 1)
    monkeypatch.setattr(made, "_executor", SlowExecutor())
    return made


def test_a_mask_that_takes_too_long_ends_its_own_answer(clock: Clock, masks: GrammarMasks) -> None:
    slow, quick = states_that_take(clock, grammar_masks.MASK_S, 0.0)
    masks.compute([quick, slow])
    assert slow.failure is not None
    assert slow.failure.code == "grammar_error"
    assert f"more than {grammar_masks.MASK_S:g} s" in slow.failure.message
    assert quick.failure is None


def test_one_that_is_slow_in_a_thread_is_found_in_the_next_step(clock: Clock, masks: GrammarMasks) -> None:
    """The first mask takes the caller's time, so threads have the others."""
    states = states_that_take(clock, grammar_masks.MASK_S / 2, 0.0, 0.0, 2 * grammar_masks.MASK_S)
    expected = masks.compute(states)
    assert len({mask.tobytes() for mask in expected}) == len(expected)
    assert failed(states) == [False] * 4
    assert np.array_equal(masks.compute(states), expected), "whoever computes them"
    assert failed(states) == [False, False, False, True]


def test_the_slowest_end_until_the_masks_of_a_step_fit(clock: Clock, masks: GrammarMasks) -> None:
    """None of them takes too long by itself."""
    states = states_that_take(clock, *(grammar_masks.MASK_S * share for share in (0.25, 0.5, 0.35, 0.45, 0.4)))
    for _ in range(2):
        masks.compute(states)
    assert failed(states) == [False] * 5, "as many that begin at once may be"
    masks.compute(states)
    assert failed(states) == [False, True, False, True, True]
    assert states[1].failure is not None
    assert "takes 0.05 s, the longest beside other answers'; all of a step have 0.1 s" in states[1].failure.message
    began = clock.now
    masks.compute([states[0], states[2]])
    assert clock.now - began < grammar_masks.MASK_S
    assert failed(states) == [False, True, False, True, True]


def test_many_that_begin_at_once_are_spared_up_to_a_sum(clock: Clock, masks: GrammarMasks) -> None:
    states = states_that_take(clock, *(grammar_masks.MASK_S * share for share in (0.91, 0.92, 0.93, 0.94)))
    masks.compute(states)
    assert failed(states) == [False] * 4, "nobody knows yet what each takes"
    masks.compute(states)
    assert failed(states) == [False, False, True, True]


@pytest.fixture
def same(clock: Clock) -> Callable[[int, float], list[GrammarState]]:
    matcher = compile_grammar(write(json_schema({}), thinking=False))

    def make(count: int, seconds: float) -> list[GrammarState]:
        made = [GrammarState(matcher.deep_copy()) for _ in range(count)]
        for state in made:
            slow_down(state, clock, seconds)
        return made

    return make


def test_those_that_are_slow_step_after_step_end(
    clock: Clock, masks: GrammarMasks, same: Callable[[int, float], list[GrammarState]]
) -> None:
    """No step's masks take too long, but together they would hold up everybody."""
    states = same(9, 0.01) + same(3, 0.001)
    while not any(failed(states)):
        assert clock.now < 2 * grammar_masks.LASTING_S
        masks.compute(states)
    assert failed(states) == [True] * 9 + [False] * 3
    assert clock.now > grammar_masks.LASTING_S
    assert states[0].failure is not None
    assert "takes 0.01 s, step after step" in states[0].failure.message
    alone = same(1, 0.01)
    for _ in range(2 * grammar_masks.TIMED_STEPS):
        masks.compute(alone + states[9:])
    assert not any(failed(alone + states[9:])), "few hold up nobody"


def test_many_that_take_what_is_usual_go_on(
    clock: Clock, masks: GrammarMasks, same: Callable[[int, float], list[GrammarState]]
) -> None:
    """Some of them are slow at first, and all take longer than a slow step of few."""
    states = same(60, 0.0009)
    for step in range(300):
        masks.compute(states if step % 10 else [*same(2, 0.007), *states])
    assert clock.now > 10 * grammar_masks.LASTING_S
    assert not any(failed(states))


def test_each_core_has_as_much_time(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = GrammarMasks(VOCAB, 2)
    monkeypatch.setattr(masks, "_timed", ThreadPoolExecutor(1))  # of one clock
    monkeypatch.setattr(masks, "_executor", SlowExecutor())
    states = states_that_take(clock, *(grammar_masks.MASK_S * share for share in (0.9, 0.8, 0.2)))
    for _ in range(3):
        masks.compute(states)
    assert failed(states) == [False] * 3
    states += states_that_take(clock, grammar_masks.MASK_S * 0.2)
    for _ in range(2):
        masks.compute(states)
    assert failed(states) == [True, False, False, False]


def test_one_that_is_slow_now_and_then_is_found(clock: Clock, masks: GrammarMasks) -> None:
    slow, other = states_that_take(clock, 2 * grammar_masks.MASK_S, grammar_masks.ALONE_S)
    masks.compute([other, slow])
    for _ in range(grammar_masks.TIMED_STEPS - 1):
        masks.compute([other])
    assert not failed([slow, other])[0]
    masks.compute([other, slow])
    assert failed([slow, other]) == [True, False]


def test_a_busy_machine_ends_nothing(clock: Clock, masks: GrammarMasks) -> None:
    states = states_that_take(clock, 0.0, 0.0)
    for state in states:
        slow_down(state, clock, 2 * grammar_masks.MASK_S, waits=True)
    for _ in range(3):
        masks.compute(states)
    assert clock.now > 1
    assert failed(states) == [False, False]


def test_the_time_of_a_copy_is_its_answers(clock: Clock, masks: GrammarMasks) -> None:
    """As of a guessed token."""
    [state] = states_that_take(clock, 0.0)
    copies = [state.copy(), state.copy()]
    copies[1].note_slow()
    assert state.was_slow
    assert copies[0].was_slow
    slow_down(copies[0], clock, grammar_masks.MASK_S)
    masks.compute(copies)
    assert failed([state, *copies]) == [True, True, False]
