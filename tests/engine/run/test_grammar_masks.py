"""Masks of grammars: the same whoever computes them."""

import numpy as np
import pytest
from engine_cases import VOCAB, compile_grammar

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
