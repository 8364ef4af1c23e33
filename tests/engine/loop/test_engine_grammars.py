"""Answers that follow grammars, by property: what is finished is valid, and the same from any token on.

The model is a digest of the tokens before, which picks among those that the mask allows.
"""

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from typing import Any

import numpy as np
import pytest
from engine_cases import THINK_CLOSE, VOCAB, SumRunner, sequence
from engine_loop import Bench, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from schemas import check_answer, schemas
from slow_masks import Clock, slow_down

from services.engine.loop.mailbox import Add
from services.engine.run import grammar_masks
from services.engine.run.grammar_masks import GrammarMasks
from services.engine.run.prompt_scorer import Scored
from services.engine.run.sampler import Sampled
from services.engine.run.sampling_plan import plan_sampling
from services.engine.schedule.plan import Plan
from shared.grammar import forms
from shared.messages import Finish, Grammar

CLOSING = np.frombuffer(b'"}],: 1', np.uint8)  # preferred, so that answers end


class Later:
    """A launched step that samples when it is told to."""

    def __init__(self, draw: Callable[[], list[Sampled]]) -> None:
        self._draw = draw
        self._sampled: list[Sampled] = []

    def sample(self) -> None:
        self._sampled = self._sampled or self._draw()

    def read(self) -> list[Sampled]:
        return self._sampled

    def scores(self) -> list[Scored]:
        return []


class MaskedRunner(SumRunner):
    """The sum model behind masks."""

    def __init__(self, num_blocks: int, block_size: int, overlaps: bool) -> None:
        super().__init__(num_blocks, block_size, overlaps)
        self._masks = GrammarMasks(VOCAB, 1)

    def launch(self, plan: Plan, meanwhile: Callable[[], None] = lambda: None) -> Any:
        meanwhile()
        free = [s.token for s in self._run(plan)]
        step = Later(lambda: self._draw(plan, free))
        if not plan.samples_later:
            step.sample()
        return step

    def _draw(self, plan: Plan, free: list[int]) -> list[Sampled]:
        made = plan_sampling(plan.draws(), self._masks)
        masks = dict(zip(made.masked_rows.tolist(), made.masks, strict=True))
        closing = set(made.thinking[made.must_close].tolist())
        tokens = [
            THINK_CLOSE if row in closing else token if row not in masks else allowed(masks[row], token)
            for row, token in enumerate(free)
        ]
        self._last[: len(tokens)] = tokens
        return [Sampled(token) for token in tokens]


def allowed(mask: Any, digest: int) -> int:
    """Return one of the tokens of a mask."""
    tokens = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
    closing = np.intersect1d(tokens, CLOSING)
    picked = closing if len(closing) and digest % 3 else tokens
    return int(picked[digest % len(picked)])


def answers(seeds: Ordered[int], grammar: Grammar, known: Ordered[int] = (), **options: Any) -> Bench:
    asked = {"max_tokens": 150, "thinking": True, "reasoning_max_tokens": 3, "grammar": grammar, **options}
    adds = [Add(sequence(prompt(seed, 5), known, request_id=str(seed), **asked)) for seed in seeds]
    blocks = 60 if len(seeds) > 1 else 50  # for several at once there is not room enough: some are preempted
    runner = MaskedRunner(blocks, 4, overlaps=True)
    return Bench({0: adds}, runner=runner, blocks=blocks, resumed=len(known), max_num_seqs=4)


@pytest.mark.slow
@settings(max_examples=30)
@given(schema=schemas, data=st.data())
def test_what_is_finished_is_valid_and_goes_on_from_any_token(schema: dict[str, Any], data: st.DataObject) -> None:
    grammar = Grammar(forms.write(forms.json_schema(schema), thinking=True), "field")
    together = answers([0, 1, 2], grammar)
    for seed in (0, 1, 2):
        answer, finish = together.answer(str(seed)), together.finish(str(seed))
        assert finish is not None
        assert finish.reason in ("stop", "length"), finish
        if finish.reason == "stop":
            text = bytes(answer[4 : -1 if finish.stop_token else None])
            check_answer(text, schema)
    cut = data.draw(st.integers(0, len(answer) - 1))
    rest = answers([2], grammar, known=answer[:cut])
    assert (answer[:cut] + rest.answer("2"), rest.finish("2")) == (answer, finish)


@pytest.mark.parametrize("least", [0, 40])
def test_an_answer_that_is_whole_ends(least: int) -> None:
    """Nothing may follow it, so it ends there, whatever the least number of tokens."""
    bench = answers([0], Grammar(forms.write(forms.choice(["ab"]), thinking=False), "choice"), thinking=False,
                    min_tokens=least, ignore_eos=True)  # fmt: skip
    assert bytes(bench.answer("0")) == b"ab"
    assert bench.finish("0") == Finish("stop")


def test_a_grammar_that_becomes_too_complex_ends_its_own_request_alone() -> None:
    hostile = Grammar(forms.write(forms.regex("(a?){500}a{500}"), thinking=False), "regex")
    other = Grammar(forms.write(forms.choice(["ab"]), thinking=False), "choice")
    bad = sequence(prompt(1, 5), request_id="bad", grammar=hostile)
    good = sequence(prompt(0, 5), request_id="good", grammar=other)
    bench = Bench({0: [Add(bad), Add(good)]}, runner=MaskedRunner(64, 4, overlaps=True))
    finish = bench.finish("bad")
    assert finish is not None
    assert finish.failure is not None
    assert finish.failure.status == 500
    assert "too many expressions" in finish.failure.message
    assert bytes(bench.answer("good")) == b"ab"


def test_a_grammar_whose_mask_takes_too_long_ends_its_own_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(grammar_masks, "time", clock)
    asked = Grammar(forms.write(forms.regex("[ab]{40}"), thinking=False), "regex")
    bad = sequence(prompt(1, 5), request_id="bad", grammar=asked)
    good = sequence(prompt(0, 5), request_id="good", grammar=asked)
    assert bad.grammar is not None
    slow_down(bad.grammar, clock, 1.0)
    bench = Bench({0: [Add(bad), Add(good)]}, runner=MaskedRunner(64, 4, overlaps=True))
    finish = bench.finish("bad")
    assert finish is not None
    assert finish.failure is not None
    assert (finish.reason, finish.failure.code) == ("error", "grammar_error")
    assert bytes(bench.answer("good")).strip(b"ab") == b""
    assert bench.finish("good") == Finish("length")
