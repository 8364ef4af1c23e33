"""The engine's loop with guessed tokens: every answer is what it is without, in fewer steps.

`test_engine_ahead.py` has the property, over whoever comes and goes; `test_engine_guided.py` every kind of sampling.
"""

from collections.abc import Sequence as Ordered
from typing import Any

import pytest
from engine_cases import SumRunner, continuation, sequence
from engine_loop import BLOCK, Bench, Script, prompt
from guesses import GUESSING, guessing
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.loop.mailbox import Abort, Add, Forget
from services.engine.schedule.speculation import Speculation
from shared.messages import Finish

CANCELLED = Finish("cancelled")


def adds(*lengths: int, **options: Any) -> Script:
    """A request for each length of an answer, all at once."""
    return {
        0: [
            Add(sequence(prompt(i, 5), request_id=str(i), max_tokens=length, **options))
            for i, length in enumerate(lengths)
        ]
    }


def guessed(script: Script, wrong: int = 0, **bounds: Any) -> Bench:
    with guessing(wrong=wrong):
        return Bench(script, **{"speculation": GUESSING, "max_num_seqs": 8, **bounds})


@pytest.mark.parametrize("overlaps", [True, False])
def test_right_guesses_are_taken_together(overlaps: bool) -> None:
    bench = guessed(adds(13, 13), overlaps=overlaps)
    assert bench.answer("0") == continuation(prompt(0, 5), 13)
    assert bench.answer("1") == continuation(prompt(1, 5), 13)
    assert bench.step_outputs == [{"0": 1, "1": 1}, *[{"0": 4, "1": 4}] * 3], "8 rows a step"
    assert bench.guessed == (18, 18)
    assert bench.metric("generation_tokens_total") == 26
    assert bench.ahead == 0, "a guess needs the token before it"


def test_wrong_guesses_are_dropped() -> None:
    bench = guessed(adds(30), wrong=3)
    drafted, right = bench.guessed
    assert bench.answer("0") == continuation(prompt(0, 5), 30)
    assert drafted > right > 0
    steps = [chunk.drafts for plan in bench.runner.plans for chunk in plan.chunks if chunk.drafts]
    assert bench.metric("spec_decode_num_drafts_total") == len(steps)
    assert sum(bench.right_at) == right
    assert bench.right_at == sorted(bench.right_at, reverse=True), "behind a wrong guess none is right"
    assert 0 < bench.metric("spec_decode_step_seconds_total") < bench.metric("engine_step_seconds_sum")


def test_without_a_guess_steps_run_ahead() -> None:
    """The sum model repeats nothing."""
    bench = Bench(adds(13), speculation=GUESSING)
    assert bench.guessed == (0, 0)
    assert bench.ahead == 12


@pytest.mark.parametrize("length", range(1, 9))
def test_nothing_is_guessed_beyond_the_end(length: int) -> None:
    bench = guessed(adds(length))
    assert bench.answer("0") == continuation(prompt(0, 5), length)
    assert bench.finish("0") == Finish("length")
    assert bench.guessed == (max(0, length - 2 - (length > 7)),) * 2


@pytest.mark.parametrize("at", range(1, 9))
def test_an_answer_ends_at_its_end_token_whatever_was_guessed_behind_it(at: int) -> None:
    answer = continuation(prompt(0, 5), 9)
    bench = guessed(adds(9, stop_token_ids=(answer[at - 1],)))
    assert bench.answer("0") == answer[:at]
    assert bench.finish("0") == Finish("stop", answer[at - 1])


def test_guesses_take_nobodys_room() -> None:
    """Neither blocks of those who run, nor tokens of a step from a prompt, nor more logits than there is memory for."""
    script = adds(12, 12) | {2: [Add(sequence(prompt(7, 40), request_id="long", max_tokens=3))]}
    bench = guessed(script, wrong=4, max_num_seqs=5, max_num_batched_tokens=12)
    assert bench.guessed[1] > 0
    for plan in bench.runner.plans:
        assert len(plan.draws()) <= 5
        assert not plan.drafts or plan.num_tokens <= 12
        assert not plan.drafts or all(chunk.samples for chunk in plan.chunks), "the prompt has all that is left"
    assert bench.answer("long") == continuation(prompt(7, 40), 3)


def test_guesses_preempt_nobody() -> None:
    """Four blocks are just enough for what is known of each."""
    plain = Bench(adds(6, 6), blocks=6, caching=False)
    bench = guessed(adds(6, 6), blocks=6, caching=False)
    assert bench.guessed[1] > 0
    for each in (plain, bench):
        assert not any(plan.preempted for plan in each.runner.plans)
        assert [each.answer(name) for name in "01"] == [continuation(prompt(i, 5), 6) for i in range(2)]


@pytest.mark.parametrize("wrong", [0, 2, 3])
def test_what_was_verified_is_a_prefix_for_others_and_nothing_else(wrong: int) -> None:
    """A block is named by its content once all of it was accepted: a wrong guess never finds its way to another."""
    answer = continuation(prompt(0, 5), 20)
    follow_up = [*prompt(0, 5), *answer, 50]
    script = adds(20) | {40: [Add(sequence(follow_up, request_id="next", max_tokens=9))]}
    bench = guessed(script, wrong=wrong)
    assert bench.answer("next") == continuation(follow_up, 9)
    [begin] = bench.begins["next"]
    assert begin.cached_tokens == (5 + 20 - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("cut", range(12))
def test_an_answer_goes_on_after_any_token(cut: int) -> None:
    whole = continuation(prompt(0, 5), 12)
    made = sequence(prompt(0, 5), whole[:cut], request_id="0", max_tokens=12)
    with guessing(wrong=5):
        bench = Bench({0: [Add(made)]}, resumed=cut, speculation=GUESSING, max_num_seqs=8)
    assert whole[:cut] + bench.answer("0") == whole


@pytest.mark.parametrize("gone", [Abort("0", CANCELLED), Forget("0")])
@pytest.mark.parametrize("turn", range(1, 6))
def test_what_is_gone_with_guesses_in_flight_says_no_more(turn: int, gone: Abort | Forget) -> None:
    again = sequence(prompt(3, 6), request_id="0", max_tokens=7)
    again.epoch = 2
    bench = guessed({**adds(20, 20), turn: [gone, Add(again)]}, wrong=4)
    first = bench.answer("0")
    assert first == continuation(prompt(0, 5), 20)[: len(first)]
    assert bench.answer("0 again") == continuation(prompt(3, 6), 7)
    assert bench.answer("1") == continuation(prompt(1, 5), 20)


class Circling(SumRunner):
    """Says a few tokens again and again, and now and then another one."""

    def _run(self, plan: Any) -> Any:
        sampled = super()._run(plan)
        return [s if s.token % self.rare == 0 else type(s)(10 + row.stop % 7) for s, row in
                zip(sampled, plan.draws(), strict=True)]  # fmt: skip

    rare = 13


def circling(lengths: Ordered[int], speculation: Speculation | None, rare: int = 13, **bounds: Any) -> Bench:
    runner = Circling(64, BLOCK, overlaps=True)
    runner.rare = rare
    return Bench(adds(*lengths), runner=runner, speculation=speculation, **{"max_num_seqs": 8, **bounds})


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    rare=st.integers(5, 40),
    most=st.integers(1, 7),
    ngram=st.integers(1, 4),
    caching=st.booleans(),
)
def test_a_drafter_s_guesses_change_nothing(
    lengths: list[int], rare: int, most: int, ngram: int, caching: bool
) -> None:
    plain = circling(lengths, None, rare, caching=caching)
    bench = circling(lengths, Speculation(most, ngram, max_batch=8), rare, caching=caching)
    for name in map(str, range(len(lengths))):
        assert bench.answer(name) == plain.answer(name)
        assert bench.finish(name) == plain.finish(name)
    assert len(bench.runner.plans) <= len(plain.runner.plans) + 1


def test_a_drafter_saves_steps_where_an_answer_repeats_itself() -> None:
    plain, bench = circling([60], None, 40), circling([60], GUESSING, 40)
    assert bench.answer("0") == plain.answer("0")
    assert len(bench.runner.plans) < 0.65 * len(plain.runner.plans)
    drafted, right = bench.guessed
    assert right > 0.7 * drafted
    assert bench.ahead > 5, "until guesses had been right for a while"
