"""Sequences: built from a message or from a message and a journal, which must be the same."""

import numpy as np
import pytest
from engine_cases import EOS, FACTS, PATCH, THINK_CLOSE, VOCAB, continuation, generate, last, sequence
from hypothesis import given
from hypothesis import strategies as st

from services.engine.run.grammar_masks import GrammarMasks
from services.engine.run.sampling_plan import plan_sampling
from services.engine.schedule.sequence import Sequence
from services.engine.transport.resume import announcement
from shared.errors import RequestError
from shared.messages import Finish, MediaSpan, unpack_ids


def state(made: Sequence) -> object:
    """Everything that can steer what comes next, as plain values."""
    flat = {
        name: array.tolist() for name, array in plan_sampling(last([made]), GrammarMasks(VOCAB, 1)).arrays().items()
    }
    return flat, made.thinking, made.finish(), made.tokens[: made.num_tokens].tolist()


OPTIONS = {
    "max_tokens": 20,
    "thinking": True,
    "reasoning_max_tokens": 4,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.1,
    "min_tokens": 5,
    "stop_token_ids": (40,),
    "bad_words": ((7,), (5, 6), (5, 5, 8)),
    "logit_bias": {9: 1.5},
    "temperature": 0.8,
    "logprobs": 3,
}


@given(generated=st.lists(st.sampled_from([5, 5, 6, 8, 30, THINK_CLOSE, EOS, 40]), max_size=20))
def test_a_journal_restores_the_state(generated: list[int]) -> None:
    grown = sequence([5, 30, 30, 31], **OPTIONS)
    for token in generated:
        grown.append(token)
    assert state(grown) == state(sequence([5, 30, 30, 31], generated, **OPTIONS))


def test_positions_go_on_after_the_prompt_and_its_media() -> None:
    span = MediaSpan("image", "cat", 2, 6, (1, 4, 6))
    made = sequence([11, PATCH + 1, *[PATCH] * 6, 12], continuation([1], 3), spans=(span,), max_tokens=9)
    assert made.positions(0, 3).T.tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    assert made.positions(7, 12).T.tolist() == [[2, 3, 4], [5, 5, 5], [6, 6, 6], [7, 7, 7], [8, 8, 8]]
    assert made.positions(10, 11).T.tolist() == [[7, 7, 7]]
    whole = made.positions(0, 12)
    for cut in range(13):
        np.testing.assert_array_equal(np.concatenate([made.positions(0, cut), made.positions(cut, 12)], 1), whole)


@pytest.mark.parametrize(
    ("generated", "options", "expected"),
    [
        ([10], {}, None),
        ([10, EOS], {}, Finish("stop", stop_token=EOS)),
        ([10, EOS], {"ignore_eos": True}, None),
        ([10, 40], {"stop_token_ids": (40,)}, Finish("stop", stop_token=40)),
        ([10, 40], {"stop_token_ids": (40,), "ignore_eos": True}, Finish("stop", stop_token=40)),
        ([10, 11], {"max_tokens": 2}, Finish("length")),
        ([10, EOS], {"max_tokens": 2}, Finish("stop", stop_token=EOS)),
        ([], {"max_tokens": 2}, None),
        # In reasoning only the ids that end a sequence end it, unless the request says otherwise.
        ([10, 40], {"stop_token_ids": (40,), "thinking": True}, None),
        ([10, 40], {"stop_token_ids": (40,), "thinking": True, "max_tokens": 2}, Finish("length")),
        ([40, THINK_CLOSE, 9], {"stop_token_ids": (40,), "thinking": True}, None),
        ([THINK_CLOSE, 40], {"stop_token_ids": (40,), "thinking": True}, Finish("stop", stop_token=40)),
        ([THINK_CLOSE], {"stop_token_ids": (THINK_CLOSE,), "thinking": True}, Finish("stop", stop_token=THINK_CLOSE)),
        ([10, EOS], {"stop_token_ids": (40,), "thinking": True}, Finish("stop", stop_token=EOS)),
        (
            [EOS],
            {"stop_token_ids": (40, EOS), "thinking": True, "ignore_eos": True},
            Finish("stop", stop_token=EOS),
        ),
        (
            [10, 40],
            {"stop_token_ids": (40,), "thinking": True, "stop_in_reasoning": True},
            Finish("stop", stop_token=40),
        ),
    ],
)
def test_finish(generated: list[int], options: dict[str, object], expected: Finish | None) -> None:
    assert sequence([5], generated, **options).finish() == expected


def test_stop_ids_are_not_held_back_by_min_tokens_where_they_do_not_end_the_answer() -> None:
    made = sequence([5], thinking=True, stop_token_ids=(40,), min_tokens=3)
    assert made.ending_ids == (EOS,)
    assert made.depends_on_tokens, "which tokens end it depends on whether </think> is in flight"
    made.append(THINK_CLOSE)
    assert (made.ending_ids, made.depends_on_tokens) == ((EOS, 40), False)


def test_the_context_bounds_the_answer() -> None:
    made = sequence([5] * (FACTS.max_model_len - 3), max_tokens=1000)
    assert made.max_tokens == 3


def test_begin_counts_the_prompt() -> None:
    spans = (MediaSpan("image", "a", 1, 6, (1, 4, 6)), MediaSpan("video", "b", 8, 2, (2, 2, 4)))
    begin = sequence([5, *[PATCH] * 6, 6, *[PATCH] * 2], [10], spans=spans).begin()
    assert (begin.index, begin.prompt_tokens, begin.image_tokens, begin.video_tokens) == (1, 10, 6, 2)


@pytest.mark.parametrize("asked", [True, False])
def test_begin_says_the_prompt_to_who_asked_for_token_ids(asked: bool) -> None:
    prompt = [5, *[PATCH] * 6, 6]
    spans = (MediaSpan("image", "a", 1, 6, (1, 4, 6)),)
    first = sequence(prompt, spans=spans, return_token_ids=asked).begin()
    again = sequence(prompt, [10, 11], spans=spans, return_token_ids=asked).begin()
    announced = announcement(generate("r", prompt, spans=spans, return_token_ids=asked), 1)
    assert [unpack_ids(begin.prompt) for begin in (first, again, announced)] == [prompt if asked else []] * 3


@pytest.mark.parametrize(
    ("prompt", "options", "status", "named"),
    [
        ([], {}, 400, "messages"),
        ([5] * FACTS.max_model_len, {}, 400, "messages"),
        ([VOCAB], {}, 500, None),
        ([5], {"stop_token_ids": (VOCAB,)}, 400, "stop_token_ids"),
        ([5], {"logit_bias": {-1: 1.0}}, 400, "logit_bias"),
        ([5], {"allowed_token_ids": (10**9,)}, 400, "allowed_token_ids"),
        ([5], {"bad_words": ((1, VOCAB),)}, 400, "bad_words"),
        ([5], {"bad_words": ((),)}, 400, "bad_words"),
        ([PATCH] * 3, {"spans": (MediaSpan("image", "a", 0, 6, (1, 4, 6)),)}, 500, None),
    ],
)
def test_what_would_break_a_step_is_refused(
    prompt: list[int], options: dict[str, object], status: int, named: str | None
) -> None:
    with pytest.raises(RequestError) as refused:
        sequence(prompt, **options)
    assert (refused.value.failure.status, refused.value.failure.param) == (status, named)


def test_the_budget_is_for_thinking_with_a_limit_only() -> None:
    assert sequence([5], thinking=True).budget is None
    assert sequence([5], reasoning_max_tokens=3).budget is None
    assert sequence([5], thinking=True, reasoning_max_tokens=-1).budget is None
    limited = sequence([5], thinking=True, reasoning_max_tokens=3)
    assert limited.thinking
    limited.append(THINK_CLOSE)
    assert not limited.thinking
