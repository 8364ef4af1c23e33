"""The engine's loop where steps are launched before the ones before them are read: every answer is what it is without.

The sum model takes a token in flight from what it sampled itself, by the source that the plan names.
"""

from collections import defaultdict
from collections.abc import Sequence as Ordered
from typing import Any

import pytest
from engine_cases import continuation, sequence
from engine_loop import Bench, Script, prompt
from guesses import GUESSING, guessing
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.loop.mailbox import Abort, Add, Command, Forget, Supply
from services.engine.schedule.embeds import Embeds
from services.engine.schedule.prefill_budget import PrefillBudget
from services.engine.schedule.speculation import Speculation
from services.engine.schedule.step_times import StepTimes
from shared.messages import Finish, MediaSpan

CANCELLED = Finish("cancelled")


class FixedRoom(PrefillBudget):
    """As many tokens of prefill beside others, however many decode."""

    _tokens: int

    def __init__(self, tokens: int) -> None:
        super().__init__(1.0, StepTimes((1,), (1.0,)))
        object.__setattr__(self, "_tokens", tokens)

    def room(self, decoding: int, cached: int, limit: int) -> int:
        return max(0, min(limit - decoding, self._tokens)) if decoding else limit


def until(tokens: Ordered[int], stops: Ordered[int]) -> list[int]:
    """As far as the first of the tokens that end it."""
    ends = [i for i, token in enumerate(tokens) if token in stops]
    return list(tokens[: ends[0] + 1]) if ends else list(tokens)


@st.composite
def asked(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "prompt": prompt(draw(st.integers(0, 3)), draw(st.integers(1, 20))),
        "max_tokens": draw(st.integers(1, 14)),
        "stop_token_ids": tuple(draw(st.lists(st.integers(10, 99), max_size=12))),
        "bad_words": draw(st.sampled_from([(), (), (), ((5, 6),)])),  # no effect on the sum model, but on the order
        "turn": draw(st.integers(0, 30)),
        "gone": draw(st.sampled_from([None, None, None, Abort, Forget])),
        "after": draw(st.integers(0, 12)),
    }


@settings(max_examples=400)
@given(
    requests=st.lists(asked(), min_size=1, max_size=10),
    speculation=st.sampled_from([None, GUESSING]),
    wrong=st.integers(0, 5),
    overlaps=st.booleans(),
    blocks=st.integers(9, 24),
    budget=st.integers(1, 24),
    seqs=st.integers(1, 6),
    caching=st.booleans(),
    chunked=st.booleans(),
    room=st.sampled_from([None, 1, 5, 12]),
)
def test_every_answer_is_right_whoever_comes_and_goes(
    requests: list[dict[str, Any]],
    speculation: Speculation | None,
    wrong: int,
    overlaps: bool,
    blocks: int,
    budget: int,
    seqs: int,
    caching: bool,
    chunked: bool,
    room: int | None,
) -> None:
    script: dict[int, list[Command]] = defaultdict(list)
    for number, one in enumerate(requests):
        options = {name: one[name] for name in ("max_tokens", "stop_token_ids", "bad_words")}
        script[one["turn"]].append(Add(sequence(one["prompt"], request_id=str(number), **options)))
    for number, one in enumerate(requests):
        gone = {Abort: Abort(str(number), CANCELLED), Forget: Forget(str(number))}.get(one["gone"])
        if gone is not None:
            script[one["turn"] + one["after"]].append(gone)
    with guessing(wrong=wrong):
        bench = Bench(
            script,
            overlaps=overlaps,
            blocks=blocks,
            caching=caching,
            max_num_seqs=seqs,
            max_num_batched_tokens=budget if chunked else 40,
            chunked_prefill=chunked,
            speculation=speculation,
            prefill=None if room is None else FixedRoom(room),
        )
    for number, one in enumerate(requests):
        whole = until(continuation(one["prompt"], one["max_tokens"]), one["stop_token_ids"])
        answer = bench.answer(str(number))
        if one["gone"] is None or (bench.runs[str(number)] and bench.finish(str(number)) not in (None, CANCELLED)):
            assert answer == whole
            stopped = whole[-1] in one["stop_token_ids"]
            assert bench.finish(str(number)) == (Finish("stop", whole[-1]) if stopped else Finish("length"))
        else:
            assert answer == whole[: len(answer)]
            assert one["gone"] is Forget or bench.finish(str(number)) == CANCELLED
    said = sum(len(run.tokens) for runs in bench.runs.values() for run in runs)
    assert bench.metric("generation_tokens_total") == said


def adds(*lengths: int, **options: Any) -> Script:
    """A request for each length of an answer, all at once."""
    return {
        0: [
            Add(sequence(prompt(i, 5), request_id=str(i), max_tokens=length, **options))
            for i, length in enumerate(lengths)
        ]
    }


def test_decoding_runs_ahead() -> None:
    bench = Bench(adds(8, 8, 5))
    assert bench.ahead == 7 + 7 + 4, "all but the tokens that the prefill gives"
    assert [len(plan.chunks) for plan in bench.runner.plans] == [3, 3, 3, 3, 3, 2, 2, 2], "no row is wasted on a length"
    for i, length in enumerate((8, 8, 5)):
        assert bench.answer(str(i)) == continuation(prompt(i, 5), length)


def test_the_last_tokens_are_said_while_the_next_step_runs() -> None:
    bench = Bench(adds(4))
    assert bench.step_outputs == [{"0": 1}] * 4


def test_who_ends_unexpectedly_has_one_row_too_many() -> None:
    answer = continuation(prompt(0, 5), 9)
    bench = Bench(adds(9, stop_token_ids=(answer[3],)))
    assert bench.answer("0") == answer[:4]
    assert bench.finish("0") == Finish("stop", answer[3])
    assert len(bench.runner.plans) == 5
    assert bench.metric("generation_tokens_total") == 4


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.2},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"bad_words": ((5, 6),)},
        {"thinking": True, "reasoning_max_tokens": 4},
        {"thinking": True, "loop_repeats": 2, "loop_tokens": 4},
    ],
)
def test_what_looks_back_samples_once_the_tokens_before_are_known(options: dict[str, Any]) -> None:
    bench = Bench(adds(6, 6, **options))
    assert bench.ahead == 10
    assert [plan.samples_later for plan in bench.runner.plans] == [False] + [True] * 5
    assert bench.answer("1") == continuation(prompt(1, 5), 6)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1.0, "top_p": 0.5}, {"min_tokens": 3}, {"logit_bias": {7: 1.0}}, {"logprobs": 2}, {}],
)
def test_what_only_counts_samples_at_once(options: dict[str, Any]) -> None:
    bench = Bench(adds(6, 6, **options))
    assert bench.ahead == 10
    assert not any(plan.samples_later for plan in bench.runner.plans)


def test_a_newcomer_is_taken_in_as_soon_as_it_has_room() -> None:
    """Without room, the others run ahead."""

    def script() -> Script:
        return adds(12) | {4: [Add(sequence(prompt(7, 5), request_id="new", max_tokens=2))]}

    plans = Bench(script()).runner.plans
    first = next(i for i, plan in enumerate(plans) if len(plan.chunks) == 2)
    assert [chunk.source for chunk in plans[first].chunks] == [0, None], "the other one's token is still in flight"
    assert first == 4, "four steps were launched before it came"
    crowded = Bench(script(), max_num_seqs=1)
    assert crowded.ahead == 11 + 1
    assert crowded.answer("new") == continuation(prompt(7, 5), 2)


def test_blocks_run_short() -> None:
    """A preempted sequence has no token in flight: nothing is lost, and it is computed again."""
    bench = Bench(adds(12, 12, 12), blocks=8, caching=False)
    assert any(plan.preempted for plan in bench.runner.plans)
    assert bench.ahead > 12
    for i in range(3):
        assert bench.answer(str(i)) == continuation(prompt(i, 5), 12)


def test_a_preemption_that_leaves_nothing_to_compute_is_counted() -> None:
    """A prompt keeps its blocks while it waits for a picture; the answer beside it, a later one, needs one more."""
    spans = (MediaSpan("image", "picture", 5, 4, (1, 4, 4)),)
    show = sequence(prompt(0, 17), request_id="show", spans=spans, embeds=(None,), max_tokens=1)
    text = sequence(prompt(1, 3), request_id="text", max_tokens=30)
    picture = Supply("show", {0: Embeds(b"", "float32")})
    bench = Bench({0: [Add(show), Add(text)], 1000: [picture]}, blocks=10, caching=False)
    assert not any(plan.preempted for plan in bench.runner.plans)
    assert bench.metric("num_preemptions_total") == text.timeline.preemptions == 1
    assert bench.answer("text") == continuation(prompt(1, 3), 30)


def test_a_runner_that_does_not_overlap_is_read_at_once() -> None:
    bench = Bench(adds(6, 6), overlaps=False)
    assert bench.ahead == 0
    assert len(bench.runner.plans) == 6
    assert bench.step_outputs == [{"0": 1, "1": 1}] * 6


@pytest.mark.parametrize("turn", range(1, 9))
def test_what_is_cancelled_with_a_step_in_flight_says_no_more(turn: int) -> None:
    bench = Bench({**adds(10, 10), turn: [Abort("0", CANCELLED)]})
    assert bench.finish("0") == CANCELLED
    assert bench.answer("0") == continuation(prompt(0, 5), 10)[: turn - 1], "what was read before"
    assert bench.answer("1") == continuation(prompt(1, 5), 10)


@pytest.mark.parametrize("turn", range(1, 9))
def test_what_comes_again_with_a_step_in_flight_begins_anew(turn: int) -> None:
    again = sequence(prompt(3, 6), request_id="0", max_tokens=3)
    again.epoch = 2
    bench = Bench({**adds(10, 10), turn: [Forget("0"), Add(again)]})
    assert bench.answer("0 again") == continuation(prompt(3, 6), 3)
    assert bench.answer("1") == continuation(prompt(1, 5), 10)
