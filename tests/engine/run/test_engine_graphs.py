"""Decode steps at fixed addresses, with tokens in flight: on a GPU as graphs, elsewhere computed from the same buffers.

A small model of random weights, whose tokens are the vision experts' as often as not.
"""

import warnings
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from engine_cases import THINK_CLOSE, sequence
from engine_loop import Bench, Script, prompt
from small_model import ON_GPU, PAGE, SEQS, SMALL, SMALL_FACTS, StepByStep, runner, small_model

from services.engine.loop.mailbox import Add
from services.engine.model.ernie import ErnieModel
from services.engine.run.runner import Launched, ModelRunner
from services.engine.schedule.plan import Plan
from shared.grammar.forms import json_schema, write
from shared.messages import Finish, Grammar


class Quiet(ModelRunner):
    """Notes whenever the launch of a step that runs ahead waits for the device."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.waited: list[str] = []

    def launch(self, plan: Plan, meanwhile: Callable[[], None]) -> Launched:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                launched = super().launch(plan, meanwhile)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        if any(chunk.source is not None for chunk in plan.chunks):
            self.waited += [str(w.message) for w in warned if "called a synchronizing" in str(w.message)]
        return launched


@pytest.fixture(scope="module")
def model() -> ErnieModel:
    return small_model()


def script(**options: Any) -> Script:
    """Answers of several lengths; the last two begin when the others are under way."""
    made = [
        sequence(prompt(i, 3 + 2 * i), request_id=str(i), max_tokens=12 + 3 * i, facts=SMALL_FACTS, seed=i, **options)
        for i in range(6)
    ]
    return {0: [Add(one) for one in made[:4]], 7: [Add(one) for one in made[4:]]}


OPTIONS: list[dict[str, Any]] = [{"ignore_eos": True}, {"temperature": 1.0, "top_p": 0.9, "logprobs": 2}]


SCHEMA = {"type": "array", "minItems": 2, "items": {"enum": ["a", 12, {"b": None}]}}
JSON = Grammar(write(json_schema(SCHEMA), thinking=True), "field")
# Their sampling needs the tokens in flight.
LOOKS_BACK: list[dict[str, Any]] = [
    {"temperature": 1.0, "grammar": JSON, "thinking": True, "reasoning_max_tokens": 5},
    {"temperature": 1.0, "grammar": JSON, "thinking": True, "ignore_eos": True, "reasoning_max_tokens": 0},
    {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "bad_words": ((70,), (80, 81))},
]


@pytest.mark.parametrize("options", LOOKS_BACK, ids=["grammar", "no end", "penalties"])
def test_sampling_knows_the_tokens_in_flight(model: ErnieModel, options: dict[str, Any]) -> None:
    ahead = Bench(script(**options), runner=runner(model, ModelRunner), max_num_seqs=SEQS, block_size=PAGE)
    known = Bench(script(**options), runner=runner(model, StepByStep), max_num_seqs=SEQS, block_size=PAGE)
    assert ahead.ahead > 20
    for i in range(6):
        assert ahead.answer(str(i)) == known.answer(str(i))
        assert ahead.finish(str(i)) == known.finish(str(i))


@pytest.mark.parametrize("seed", [1, 2])
def test_an_answer_with_a_grammar_goes_on_after_any_token(model: ErnieModel, seed: int) -> None:
    options: dict[str, Any] = {"facts": SMALL_FACTS, "max_tokens": 28, "seed": seed, **LOOKS_BACK[0]}

    captured = runner(model, ModelRunner)

    def go_on(known: list[int]) -> Bench:
        made = sequence(prompt(seed, 5), known, request_id="0", **options)
        script: Script = {0: [Add(made)]}
        return Bench(script, runner=captured, resumed=len(known), max_num_seqs=SEQS, block_size=PAGE)

    whole = go_on([])
    answer, finish = whole.answer("0"), whole.finish("0")
    text = bytes(answer[answer.index(THINK_CLOSE) + 1 :])
    assert finish == Finish("length") or msgspec.json.decode(text, type=list[str | int | dict[str, None]])
    for count in range(1, len(answer)):
        rest = go_on(answer[:count])
        assert answer[:count] + rest.answer("0") == answer
        assert rest.finish("0") == finish


@pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "drawn"])
def test_tokens_in_flight_are_those_that_were_sampled(model: ErnieModel, options: dict[str, Any]) -> None:
    ahead = Bench(script(**options), runner=runner(model, ModelRunner), max_num_seqs=SEQS, block_size=PAGE)
    known = Bench(script(**options), runner=runner(model, StepByStep), max_num_seqs=SEQS, block_size=PAGE)
    assert ahead.ahead > 50
    assert known.ahead == 0
    for i in range(6):
        assert ahead.answer(str(i)) == known.answer(str(i))
        assert ahead.finish(str(i)) == known.finish(str(i))
    tokens = [token for i in range(6) for token in ahead.answer(str(i))]
    assert 10 < sum(token >= SMALL.image_patch_id for token in tokens) < len(tokens) - 10


@pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "drawn"])
def test_steps_at_fixed_addresses_are_steps(model: ErnieModel, options: dict[str, Any]) -> None:
    """Padded, and with block tables of which only what changed is brought in."""
    fixed = Bench(script(**options), runner=runner(model, StepByStep), max_num_seqs=SEQS, block_size=PAGE)
    plain = Bench(
        script(**options), runner=runner(model, ModelRunner, captured=False), max_num_seqs=SEQS, block_size=PAGE
    )
    for i in range(6):
        assert fixed.answer(str(i)) == plain.answer(str(i))


@pytest.mark.skipif(not ON_GPU, reason="a GPU says when it is waited for")
@pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "drawn"])
def test_no_launch_waits_for_the_device(model: ErnieModel, options: dict[str, Any]) -> None:
    quiet = runner(model, Quiet)
    Bench(script(**options), runner=quiet, max_num_seqs=SEQS, block_size=PAGE)  # compiles what was not captured
    assert isinstance(quiet, Quiet)
    quiet.waited.clear()
    bench = Bench(script(**options), runner=quiet, max_num_seqs=SEQS, block_size=PAGE)
    assert bench.ahead > 50
    assert quiet.waited == []
