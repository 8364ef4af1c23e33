"""What a step has for prefill, and who gets it."""

import msgspec
import pytest
from engine_cases import FACTS, SumRunner, continuation, sequence
from engine_loop import Bench as EngineBench
from hypothesis import given
from hypothesis import strategies as st

from services.engine.loop.mailbox import Add
from services.engine.schedule.blocks import BlockPool
from services.engine.schedule.plan import Plan
from services.engine.schedule.prefill_budget import LEAST_ROOM, PrefillBudget, reaches, shares
from services.engine.schedule.scheduler import Limits, Scheduler
from services.engine.schedule.sequence import Sequence
from services.engine.schedule.step_times import LearnedTimes, StepTimes

LONG = msgspec.structs.replace(FACTS, max_model_len=8192)
TIMES = StepTimes((16, 512, 1024, 2048), (4.0, 11.0, 19.0, 30.0), 0.001)
backlogs = st.lists(st.integers(1, 400), min_size=1, max_size=12)
rooms = st.integers(0, 500)


@given(backlogs, rooms)
def test_no_room_is_left_while_a_prompt_waits_for_it(asked: list[int], room: int) -> None:
    given_ = shares(asked, room)
    assert all(0 <= tokens <= backlog for tokens, backlog in zip(given_, asked, strict=True))
    assert sum(given_) == min(room, sum(asked))


@given(backlogs, rooms)
def test_half_of_the_room_is_the_earliest_arrivals(asked: list[int], room: int) -> None:
    assert shares(asked, room)[0] >= min(asked[0], room / 2)


@given(backlogs, rooms)
def test_of_the_others_no_one_waits_for_a_longer_one(asked: list[int], room: int) -> None:
    others = list(zip(asked, shares(asked, room), strict=True))[1:]
    for backlog, tokens in others:
        if tokens:
            assert all(theirs == needed for needed, theirs in others if needed < backlog)


@given(backlogs, st.integers(1, 400), rooms)
def test_a_newcomer_is_admitted_if_it_would_get_tokens(asked: list[int], newcomer: int, room: int) -> None:
    assert reaches(asked, newcomer, room) == (shares([*asked, newcomer], room)[-1] > 0)


@given(st.integers(0, 300), st.integers(0, 5000), st.integers(1, 9000), st.floats(0.1, 100))
def test_the_room_keeps_a_step_as_short_as_was_asked(decoding: int, cached: int, limit: int, target: float) -> None:
    room = PrefillBudget(target, TIMES).room(decoding, cached, limit)
    assert 0 <= room <= max(0, limit - decoding)
    if not decoding:
        assert room == limit
    elif room > LEAST_ROOM:
        left = target - cached * TIMES.ms_per_cached_token
        fitting = [rows for rows, ms in zip(TIMES.rows, TIMES.ms, strict=True) if ms <= left]
        assert decoding + room <= max(fitting)
    else:
        assert room == min(LEAST_ROOM, max(0, limit - decoding))


# As measured on a GPU: from 1,024 rows on, a row takes as long whatever the step.
LEVEL = StepTimes((512, 768, 1024, 1280, 1536, 2048), (11.0, 14.5, 16.5, 20.8, 25.0, 31.5), 1e-5)


@pytest.mark.parametrize(
    ("target", "decoding", "rows"),
    [
        (25.0, 8, 1024),  # 61.6 prompt tokens a millisecond, of 61.6
        (25.0, 128, 1280),  # 55.4 of 56.3; 1,024 have 54.3, which is less than 97 %
        (25.0, 256, 1536),  # 51.2; 1,280 have 49.2
        (21.0, 64, 1024),  # 58.2 of 58.5
        (14.6, 8, 768),
        (14.4, 8, 512),
    ],
)
def test_a_step_is_no_larger_than_pays(target: float, decoding: int, rows: int) -> None:
    assert PrefillBudget(target, LEVEL).room(decoding, 0, 8192) == rows - decoding


def test_what_decodes_read_counts_in_the_speed_as_in_the_time() -> None:
    """300,000 tokens in the cache take 3 ms of any step: a larger one shares them among more tokens."""
    assert PrefillBudget(30.0, LEVEL).room(64, 0, 8192) == 1024 - 64
    assert PrefillBudget(30.0, LEVEL).room(64, 300_000, 8192) == 1280 - 64


def test_a_time_of_nothing_is_no_time() -> None:
    """Where no clock was there, all times are 0: then a step is the least, as where none is short enough."""
    assert StepTimes((16, 512), (0.0, 0.0)).rows_within(25.0, 4, 0) == 16
    assert StepTimes((16, 512), (0.0, 11.0)).rows_within(25.0, 4, 0) == 512


class Bench:
    """A scheduler with such a budget: each step with sequences that decode has 512 rows."""

    def __init__(self, times: StepTimes | LearnedTimes = TIMES) -> None:
        self._pool = BlockPool(4000, caching=False)
        limits = Limits(64, 4096, True, 4, PrefillBudget(12.0, times))
        self.scheduler = Scheduler(self._pool, limits)
        self._runner = SumRunner(4000, 4)

    def add(self, name: str, length: int, answer: int) -> Sequence:
        prompt = [10 + nth * nth % 90 for nth in range(length)]
        made = sequence(prompt, request_id=name, max_tokens=answer, facts=LONG)
        assert self.scheduler.add(made) is None
        return made

    def step(self) -> Plan:
        plan = self.scheduler.schedule()
        self.scheduler.commit(plan, [sampled.token for sampled in self._runner.launch(plan).read()])
        return plan

    def steps_beside_short_ones(self, made: Sequence, length: int) -> int:
        """Return the number of steps until a sequence has a token, with a new prompt of `length` tokens in each."""
        steps = 0
        while made.num_generated == 0:
            self.add(f"short {steps}", length, 1)
            self.step()
            steps += 1
        return steps


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    bench = Bench()
    bench.add("decodes", 5, 100)
    bench.step()
    long = bench.add("long", 3000, 1)
    plans = [bench.step()]
    assert [chunk.length for chunk in plans[0].chunks] == [1, 511]
    short = bench.add("short", 200, 1)
    plans += [bench.step() for _ in range(10)]
    served = [
        next(i for i, plan in enumerate(plans) if made in [c.sequence for c in plan.sampling]) for made in (short, long)
    ]
    assert served == [1, 6], "it comes in the step after, and the other one no later than its tokens need"
    assert all(plan.num_tokens <= 512 for plan in plans)


def test_a_short_prompt_passes_a_long_one_that_still_waits() -> None:
    bench = Bench()
    bench.add("decodes", 5, 100)
    bench.step()
    bench.add("long", 3000, 1)
    bench.step()
    longer, short = bench.add("longer", 3500, 1), bench.add("short", 50, 1)
    assert short in [chunk.sequence for chunk in bench.step().sampling]
    assert longer.num_computed == 0
    assert bench.steps_beside_short_ones(longer, 400) <= 26, (
        "each of the long ones gets half of 511 tokens a step while it is the earliest"
    )


def test_without_anyone_decoding_a_prompt_gets_the_whole_step() -> None:
    bench = Bench()
    made = bench.add("long", 4096, 2)
    assert [chunk.length for chunk in bench.step().chunks] == [4096]
    assert made.generated.tolist() == continuation(made.tokens[:4096].tolist(), 1)


def test_a_long_prompt_goes_on_however_many_short_ones_come() -> None:
    bench = Bench()
    bench.add("decodes", 5, 100)
    bench.step()
    long = bench.add("long", 2000, 1)
    assert bench.steps_beside_short_ones(long, 500) <= 8, "half of 511 tokens a step"


# ------------------------------------------------------------------------------------------- where nothing was measured


def test_until_a_step_was_seen_prefill_beside_others_is_as_little_as_ever() -> None:
    budget = PrefillBudget(25.0, LearnedTimes())
    assert budget.room(3, 5, 512) == LEAST_ROOM
    assert budget.room(0, 0, 512) == 512


@given(st.floats(0.02, 5.0), st.floats(0.0, 20.0), st.integers(1, 600))
def test_the_room_is_learned_from_steps_that_run(row_ms: float, fixed_ms: float, first: int) -> None:
    """Whatever came first, steps come to be as long as asked, if that is more than the least and less than a step."""
    budget, decoding, rows = PrefillBudget(25.0, LearnedTimes()), 4, first
    for _ in range(400):
        budget.learn(rows, fixed_ms + rows * row_ms)
        rows = decoding + budget.room(decoding, 100, 512)
    fitting = (25.0 - fixed_ms) / row_ms
    assert rows == pytest.approx(min(512, max(decoding + LEAST_ROOM, fitting)), abs=0.02 * fitting + 1)


def test_a_scheduler_learns_from_steps_with_prefill_alone() -> None:
    bench = Bench(LearnedTimes())
    bench.add("decodes", 5, 100)
    bench.scheduler.learn(bench.step(), 0.0, 0.01)
    bench.scheduler.learn(bench.step(), 0.0, 1000.0)
    bench.add("long", 3000, 1)
    assert [chunk.length for chunk in bench.step().chunks] == [1, 3000], "5 tokens took 10 us, and 1 tells nothing"
    bench.add("another", 3000, 1)
    plan = bench.step()
    bench.scheduler.learn(plan, 0.0, 1000.0)
    bench.add("third", 3000, 1)
    assert [chunk.length for chunk in bench.step().chunks] == [1, LEAST_ROOM]


def test_an_engine_tells_what_its_steps_took() -> None:
    times = LearnedTimes()
    EngineBench({0: [Add(sequence([11] * 9))]}, prefill=PrefillBudget(25.0, times))
    assert times.rows_within(1e6) > 0
