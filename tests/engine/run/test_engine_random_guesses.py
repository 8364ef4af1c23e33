"""Guesses that are right, wrong, impossible or right for a while change no answer, whatever a request asks for and
whoever comes and goes beside it.
"""

import random
from collections import defaultdict
from typing import Any

import pytest
from engine_cases import EOS, PATCH, THINK_CLOSE, TOOL_CALL, VOCAB, sequence
from engine_loop import Bench, prompt
from guesses import careless
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import BLOCKS, PAGE, SEQS, SMALL_FACTS, StepByStep, runner, small_model

from services.engine.loop.mailbox import Abort, Add, Command
from services.engine.model.ernie import ErnieModel
from services.engine.run.runner import ModelRunner
from services.engine.schedule.sequence import Sequence
from services.engine.schedule.speculation import Speculation
from shared.grammar import forms
from shared.messages import Finish, Grammar

pytestmark = pytest.mark.slow

LENGTH = 30
CANCELLED = Finish("cancelled")
ROOM: dict[str, Any] = {"max_num_seqs": SEQS, "block_size": PAGE, "caching": False}
GUESSES = Speculation(SEQS - 1, 1, max_batch=SEQS)
WORDS = Grammar(forms.write(forms.regex("((ab|cd){2} ){3,9}"), thinking=True), "regex")
LOOPS = {"logit_bias": {40: 90.0}, "loop_repeats": 2, "loop_tokens": 3}  # says one token until it is closed
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5}
THINKING = {"thinking": True, "reasoning_max_tokens": 7}
ASKED: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0, "logprobs": 2},
    {**PENALTIES, "logprobs": 1},
    {**THINKING, "bad_words": ((7,), (8, 9)), "min_tokens": 20, "stop_token_ids": tuple(range(10, 90))},
    {**THINKING, "grammar": WORDS, "prompt_logprobs": 2},
    {**THINKING, "grammar": WORDS, **PENALTIES, "ignore_eos": True, "temperature": 0.0},
    {"thinking": True, **LOOPS, "max_tokens": 80},
    {**THINKING, "allowed_token_ids": (40, 41, 42), "top_k": 2},
    {"stop_token_ids": tuple(range(10, 40)), "min_tokens": 6},
    {"logit_bias": {EOS: 1.0}, "top_p": 0.9, "min_p": 0.01},
)
LOOPING = 6
STRANGE = (EOS, THINK_CLOSE, TOOL_CALL, PATCH, VOCAB - 1, 0)


def ask(number: int, known: list[int] | None = None) -> Sequence:
    """Return the request of this number, of whose answer some tokens are known."""
    asked = {"temperature": 1.0, "seed": number, "max_tokens": LENGTH, **ASKED[number]}
    return sequence(prompt(number % 3, 9 + number), known or (), request_id=f"{number}", facts=SMALL_FACTS, **asked)


def said(bench: Bench, number: int) -> tuple[list[int], Finish | None]:
    return bench.answer(f"{number}"), bench.finish(f"{number}")


def reported(bench: Bench, number: int) -> list[float]:
    found = [one for run in bench.runs[f"{number}"] for one in run.logprobs or ()]
    return [value for one in found for value in (one.logprob, *(top for _, top in one.top))]


@pytest.fixture(scope="module")
def model() -> ErnieModel:
    return small_model()


@pytest.fixture(scope="module")
def alone(model: ErnieModel) -> list[Bench]:
    """Each request by itself, one token a step."""
    return [Bench({0: [Add(ask(n))]}, runner=runner(model, StepByStep), **ROOM) for n in range(len(ASKED))]


def test_the_requests_are_telling(alone: list[Bench]) -> None:
    answers = [said(bench, number) for number, bench in enumerate(alone)]
    assert {finish.reason for _, finish in answers if finish} == {"stop", "length"}
    assert alone[LOOPING].metric("thinking_loops_total") == 1
    assert [number for number, (answer, _) in enumerate(answers) if THINK_CLOSE in answer] == [3, 4, 5, 6, 7]
    assert all(len(answer) > 5 for answer, _ in answers), answers


@pytest.mark.parametrize("number", range(len(ASKED)))
def test_right_guesses_bring_the_same_in_fewer_steps(model: ErnieModel, alone: list[Bench], number: int) -> None:
    plain, known = alone[number], ask(number)
    texts = [known.tokens[: known.prompt_len].tolist() + plain.answer(f"{number}")]
    with careless(texts, 1.0, random.Random(number)):
        bench = Bench({0: [Add(ask(number))]}, runner=runner(model, ModelRunner), **ROOM, speculation=GUESSES)
    assert said(bench, number) == said(plain, number)
    assert reported(bench, number) == pytest.approx(reported(plain, number), abs=1e-3)
    assert bench.guessed[1] > 5
    assert len(bench.runner.plans) < 0.8 * len(plain.runner.plans)
    assert bench.metric("thinking_loops_total") == plain.metric("thinking_loops_total")


VISITS = st.lists(
    st.tuples(
        st.integers(0, len(ASKED) - 1),
        st.integers(0, 25),  # the turn in which it comes
        st.sampled_from([0, 0, 1, 6, 12, 21, 40]),  # tokens of the answer that are known; 0, where it has fewer
        st.sampled_from([None, None, 3, 9]),  # turns after which it is cancelled
    ),
    min_size=1,
    max_size=7,
    unique_by=lambda visit: visit[0],
)


@settings(max_examples=40)
@given(
    visits=VISITS,
    right=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**32),
    most=st.integers(1, SEQS - 1),
    blocks=st.integers(30, BLOCKS),
    budget=st.integers(2, 40),
    caching=st.booleans(),
    kind=st.sampled_from([ModelRunner, StepByStep]),
)
def test_careless_guesses_change_nothing(
    model: ErnieModel,
    alone: list[Bench],
    visits: list[tuple[int, int, int, int | None]],
    right: float,
    seed: int,
    most: int,
    blocks: int,
    budget: int,
    caching: bool,
    kind: type[ModelRunner],
) -> None:
    whole = {number: said(alone[number], number) for number, *_ in visits}
    texts = [ask(n).tokens[: ask(n).prompt_len].tolist() + whole[n][0] for n in whole]
    script: dict[int, list[Command]] = defaultdict(list)
    resumed = {}
    for number, turn, cut, gone in visits:
        known = whole[number][0][:cut] if cut < len(whole[number][0]) else []
        resumed[f"{number}"] = len(known)
        script[turn].append(Add(ask(number, known)))
        if gone is not None:
            script[turn + gone].append(Abort(f"{number}", CANCELLED))
    with careless(texts, right, random.Random(seed), STRANGE):
        bench = Bench(
            script,
            runner=runner(model, kind),
            resumed=resumed,
            blocks=blocks,
            caching=caching,
            block_size=PAGE,
            max_num_seqs=SEQS,
            max_num_batched_tokens=budget,
            speculation=Speculation(most, 1, max_batch=SEQS),
        )
    for number, _, _, gone in visits:
        (answer, finish), before = whole[number], resumed[f"{number}"]
        now, reason = said(bench, number)
        if gone is not None and reason == CANCELLED:
            assert now == answer[before:][: len(now)]
            continue
        assert (answer[:before] + now, reason) == (answer, finish), number
        if not before:
            assert reported(bench, number) == pytest.approx(reported(alone[number], number), abs=1e-3)
