"""Masks of grammars: the same whoever computes them, and none that takes long."""

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


def test_a_mask_that_takes_too_long_ends_its_own_answer(clock: Clock) -> None:
    slow, quick = states_that_take(clock, grammar_masks.MASK_S, 0.0)
    masks = GrammarMasks(VOCAB, 1)
    masks.compute([quick, slow])
    assert slow.failure is not None
    assert slow.failure.code == "grammar_error"
    assert f"more than {grammar_masks.MASK_S:g} s" in slow.failure.message
    assert quick.failure is None


def test_one_that_is_slow_in_a_thread_is_found_by_the_caller(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first mask takes the caller's time, so threads have the others."""
    short = grammar_masks.MASK_S / 2
    *others, slow = states_that_take(clock, short, 0.0, 0.0, 4 * short)
    masks = GrammarMasks(VOCAB, 1)
    monkeypatch.setattr(masks, "_executor", SlowExecutor())
    expected = masks.compute([*others, slow])
    assert len({mask.tobytes() for mask in expected}) == len(expected)
    assert slow.failure is None
    assert [state.suspect for state in (*others, slow)] == [False, True, True, True]
    assert np.array_equal(masks.compute([*others, slow]), expected), "each at its place, whoever is first"
    assert slow.failure is not None
    assert [state.failure for state in others] == [None] * 3
    masks.compute(others)
    assert not any(state.suspect for state in others)


@pytest.mark.parametrize("before", [20, 64])
def test_a_slow_one_is_found_among_many_that_take_some_time(
    before: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller computes 15 masks a step, and would come to others each time if all were suspects anew."""
    tenth = grammar_masks.ALONE_S / 15
    made = [GrammarState(compile_grammar(write(json_schema({}), thinking=False))) for _ in range(before + 1)]
    for state in made:
        slow_down(state, clock, tenth if state is not made[-1] else 3 * grammar_masks.MASK_S)
    masks = GrammarMasks(VOCAB, 1)
    monkeypatch.setattr(masks, "_executor", SlowExecutor())
    for _ in range(2 + before // 10):
        masks.compute(made)
    assert made[-1].failure is not None
    assert [state.failure for state in made[:-1]] == [None] * before
