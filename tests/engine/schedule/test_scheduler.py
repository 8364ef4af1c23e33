"""The scheduler alone, with a model whose tokens depend on every token before: any wrong block shows in the output."""

from typing import Any

import pytest
from engine_cases import EOS, SumRunner, continuation, sequence
from guesses import GUESSING, guessing
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.schedule import sequence as sequences
from services.engine.schedule.blocks import BlockPool, block_hash
from services.engine.schedule.embeds import Embeds
from services.engine.schedule.plan import Plan
from services.engine.schedule.scheduler import Limits, Scheduler
from services.engine.schedule.sequence import Sequence
from services.engine.schedule.speculation import Speculation
from shared.messages import MediaSpan

BLOCK = 4


def limits(**changes: Any) -> Limits:
    return Limits(
        **{"max_num_seqs": 4, "max_num_batched_tokens": 16, "chunked_prefill": True, **changes}, block_size=BLOCK
    )


class Bench:
    """A scheduler, its pool and the sum model, run step by step with every invariant checked after each."""

    def __init__(self, blocks: int, bounds: Limits, *, caching: bool = True) -> None:
        self.limits = bounds
        self.pool = BlockPool(blocks, caching)
        self.scheduler = Scheduler(self.pool, bounds)
        self.runner = SumRunner(blocks, BLOCK)
        self.sequences: list[Sequence] = []
        self.finished: list[Sequence] = []

    def add(self, *sequences: Sequence) -> None:
        for added in sequences:
            assert self.scheduler.add(added) is None
            self.sequences.append(added)

    def step(self) -> Plan:
        plan = self.scheduler.schedule()
        assert plan.num_tokens <= self.limits.max_num_batched_tokens
        assert len(plan.chunks) <= self.scheduler.num_running <= self.limits.max_num_seqs
        assert len(plan.draws()) <= self.limits.max_num_seqs, "there is memory for the logits of so many"
        assert len({id(chunk.sequence) for chunk in plan.chunks}) == len(plan.chunks)
        for chunk in plan.chunks:
            assert chunk.length > 0
            assert chunk.stop == chunk.sequence.num_computed <= chunk.sequence.num_tokens + chunk.drafts
            assert len(chunk.sequence.blocks) * BLOCK >= chunk.start + chunk.length
        progress = self.scheduler.commit(plan, [sampled.token for sampled in self.runner.launch(plan).read()])
        self.finished += [made.sequence for made in progress if made.finish]
        for victim in set(plan.preempted) - {chunk.sequence for chunk in plan.chunks}:
            assert (victim.num_computed, len(victim.blocks)) == (0, 0)
        self.pool.check()
        held = [block for s in self.sequences for block in s.blocks]
        assert self.pool.used == len(set(held))
        for block in set(held):
            assert self.pool.references(block) == held.count(block)
        return plan

    def step_within_reach(self) -> bool:
        """Step; return whether there is more to do before embeddings come."""
        known = {s: s.embeds.stored for s in self.sequences}
        plan = self.step()
        for chunk in plan.chunks:
            for span, embeds in zip(chunk.sequence.spans, known[chunk.sequence], strict=True):
                inside = chunk.start < span.offset + span.length and span.offset < chunk.stop
                assert embeds is not None or not inside
        return bool(plan.chunks or plan.preempted)

    def run(self) -> list[Plan]:
        plans = []
        while self.scheduler.has_work:
            plans.append(self.step())
            assert plans[-1].chunks or plans[-1].preempted, "work, and nothing done"
            assert len(plans) < 10_000
        assert self.pool.used == 0
        return plans


def prompt(seed: int, length: int) -> list[int]:
    return [10 + (seed * 37 + i * i) % 90 for i in range(length)]


requests = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=12)


@settings(max_examples=150)
@given(
    asked=requests,
    blocks=st.integers(8, 20),
    budget=st.integers(1, 24),
    seqs=st.integers(1, 6),
    caching=st.booleans(),
    stagger=st.integers(0, 3),
    speculation=st.sampled_from([None, GUESSING]),
)
def test_everyone_gets_the_right_answer_whatever_the_room(
    asked: list[tuple[int, int, int]],
    blocks: int,
    budget: int,
    seqs: int,
    caching: bool,
    stagger: int,
    speculation: Speculation | None,
) -> None:
    bounds = limits(max_num_seqs=seqs, max_num_batched_tokens=budget, speculation=speculation)
    bench = Bench(blocks, bounds, caching=caching)
    with guessing():
        for number, (seed, length, answer) in enumerate(asked):
            bench.add(sequence(prompt(seed, length), request_id=str(number), max_tokens=answer))
            for _ in range(stagger):
                if bench.scheduler.has_work:
                    bench.step()
        bench.run()
    assert len(bench.finished) == len(asked)
    for made, (seed, length, answer) in zip(bench.sequences, asked, strict=True):
        assert made.generated.tolist() == continuation(prompt(seed, length), answer)


@settings(max_examples=60)
@given(asked=requests, blocks=st.integers(8, 12), seqs=st.integers(1, 6))
def test_without_chunking_every_prefill_is_one_chunk(asked: list[tuple[int, int, int]], blocks: int, seqs: int) -> None:
    bench = Bench(blocks, limits(max_num_seqs=seqs, max_num_batched_tokens=40, chunked_prefill=False), caching=False)
    for number, (seed, length, answer) in enumerate(asked):
        bench.add(sequence(prompt(seed, length), request_id=str(number), max_tokens=answer))
    for plan in bench.run():
        assert all(chunk.samples for chunk in plan.chunks)
    for made, (seed, length, answer) in zip(bench.sequences, asked, strict=True):
        assert made.generated.tolist() == continuation(prompt(seed, length), answer)


def test_first_tokens_come_in_order_of_arrival() -> None:
    bench = Bench(8, limits(max_num_seqs=2, max_num_batched_tokens=6))
    bench.add(*(sequence(prompt(i, 9), request_id=str(i), max_tokens=5) for i in range(6)))
    firsts = [chunk.sequence for plan in bench.run() for chunk in plan.chunks if chunk.samples]
    assert list(dict.fromkeys(firsts)) == bench.sequences


def test_decoding_goes_before_prefill() -> None:
    bench = Bench(20, limits(max_num_batched_tokens=8))
    bench.add(sequence(prompt(0, 4), request_id="a", max_tokens=9))
    bench.step()
    bench.add(sequence(prompt(1, 20), request_id="b"))
    lengths = [[chunk.length for chunk in bench.step().chunks] for _ in range(3)]
    assert lengths == [[1, 7], [1, 7], [1, 6]]


def test_a_prompt_is_cut_to_the_budget() -> None:
    bench = Bench(20, limits(max_num_batched_tokens=7))
    bench.add(sequence(prompt(0, 16), max_tokens=1))
    assert [[(c.start, c.length, c.samples) for c in plan.chunks] for plan in bench.run()] == [
        [(0, 7, False)],
        [(7, 7, False)],
        [(14, 2, True)],
    ]


def test_the_latest_arrival_gives_way_and_is_computed_again() -> None:
    bench = Bench(5, limits(max_num_seqs=2), caching=False)
    first, second = (sequence(prompt(i, 7), request_id=str(i), max_tokens=9) for i in range(2))
    bench.add(first, second)
    plans = bench.run()
    assert [victim for plan in plans for victim in plan.preempted] == [second]
    again = [chunk for plan in plans for chunk in plan.chunks if chunk.sequence is second and chunk.length > 1]
    assert [chunk.start for chunk in again] == [0, 0]
    assert again[1].length > 7, "the answer so far is computed with the prompt"
    assert [sum(s is second for s in plan.begun) for plan in plans].count(1) == 1
    assert second.generated.tolist() == continuation(prompt(1, 7), 9)


def test_a_newcomer_leaves_the_running_a_block_each() -> None:
    bench = Bench(6, limits())
    bench.add(sequence(prompt(0, 7), request_id="a", max_tokens=9), sequence(prompt(1, 7), request_id="b"))
    assert len(bench.step().chunks) == 2, "two blocks each, one left for each of those before"
    bench.add(sequence(prompt(2, 7), request_id="c"))
    assert len(bench.step().chunks) == 2, "two are free, but two run"


def test_a_preempted_sequence_comes_back_at_once_on_blocks_that_others_hold() -> None:
    bench = Bench(8, limits(max_num_batched_tokens=40))
    bench.add(*(sequence(prompt(0, 16), request_id=name, max_tokens=9) for name in "ab"))
    plans = bench.run()
    [plan] = [plan for plan in plans if plan.preempted]
    assert [chunk.sequence for chunk in plan.chunks] == bench.sequences
    assert plan.hit_tokens == 20
    for made in bench.sequences:
        assert made.generated.tolist() == continuation(prompt(0, 16), 9)


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    bench = Bench(5, limits(max_num_seqs=2))
    first, second = (sequence(prompt(i, 7), request_id=str(i), max_tokens=9) for i in range(2))
    bench.add(first, second)
    plans = bench.run()
    assert any(plan.preempted for plan in plans)
    assert sum(plan.hit_tokens for plan in plans) >= BLOCK
    assert second.cached_tokens == 0, "what a client is told counts the first admission"


def test_a_shared_prefix_is_computed_once() -> None:
    bench = Bench(20, limits())
    bench.add(sequence(prompt(0, 11), request_id="a", max_tokens=1))
    bench.run()
    bench.add(sequence(prompt(0, 11), request_id="b", max_tokens=1))
    plan = bench.step()
    assert [(c.start, c.length) for c in plan.chunks] == [(8, 3)]
    assert plan.hit_tokens == bench.sequences[1].cached_tokens == 8
    assert plan.asked_tokens == 11


def test_a_prefix_is_shared_within_a_salt_only() -> None:
    bench = Bench(40, limits())
    hits = []
    for number, salt in enumerate(["", "s", "s", "t", ""]):
        bench.add(sequence(prompt(0, 11), request_id=str(number), max_tokens=1, cache_salt=salt))
        hits.append(bench.step().hit_tokens)
    assert hits == [0, 0, 8, 0, 8]


def test_at_least_one_token_is_computed() -> None:
    bench = Bench(20, limits())
    for name in "ab":
        bench.add(sequence(prompt(0, 8), request_id=name, max_tokens=1))
        plan = bench.step()
    assert [(c.start, c.length) for c in plan.chunks] == [(4, 4)]
    assert bench.sequences[1].generated.tolist() == continuation(prompt(0, 8), 1)


def test_blocks_of_a_running_sequence_are_shared_once_computed() -> None:
    bench = Bench(20, limits())
    bench.add(sequence(prompt(0, 9), request_id="a", max_tokens=9), sequence(prompt(0, 9), request_id="b"))
    together = bench.step()
    assert together.hit_tokens == 0, "not before the first step has computed them"
    bench.add(sequence(prompt(0, 9), request_id="c"))
    assert bench.step().hit_tokens == 8


def test_a_prompt_that_waits_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no further than the cache knows it, until it is computed."""
    hashed: list[bytes] = []

    def count(parent: bytes, token_ids: bytes, media: list[tuple[int, int, str]]) -> bytes:
        hashed.append(token_ids)
        return block_hash(parent, token_ids, media)

    monkeypatch.setattr(sequences, "block_hash", count)
    bench = Bench(12, limits())
    first, second = sequence(prompt(0, 5), request_id="a", max_tokens=9), sequence(prompt(1, 41), max_tokens=1)
    own = [second.tokens[start : start + BLOCK].tobytes() for start in range(0, 40, BLOCK)]
    bench.add(first, second)
    for _ in range(8):
        assert [chunk.sequence for chunk in bench.step().chunks] == [first], "there are not enough blocks for both"
        assert [block for block in hashed if block in own] == own[:1]
    bench.run()
    assert bench.finished == [first, second]
    assert [block for block in hashed if block in own] == own


def test_an_answer_is_a_prefix_too() -> None:
    bench = Bench(20, limits())
    bench.add(sequence(prompt(0, 5), request_id="a", max_tokens=8))
    bench.run()
    follow_up = prompt(0, 5) + continuation(prompt(0, 5), 8) + [50]
    bench.add(sequence(follow_up, request_id="b", max_tokens=1))
    assert bench.step().hit_tokens == 12
    assert bench.sequences[1].generated.tolist() == continuation(follow_up, 1)


def media(key: str) -> tuple[MediaSpan, ...]:
    return (MediaSpan("image", key, 1, 6, (1, 4, 6)),)


def test_another_image_is_another_prefix() -> None:
    bench = Bench(20, limits())
    ids = [11, *[200] * 6, 12, 13]
    hits = []
    for name, key in ("a", "cat"), ("b", "dog"), ("c", "cat"):
        bench.add(sequence(ids, request_id=name, max_tokens=1, spans=media(key)))
        hits.append(bench.step().hit_tokens)
    assert hits == [0, 0, 8]


def test_resuming_is_being_further_behind() -> None:
    whole = continuation(prompt(0, 6), 10)
    for cut in range(10):
        bench = Bench(20, limits(max_num_batched_tokens=5))
        bench.add(sequence(prompt(0, 6), whole[:cut], max_tokens=10))
        bench.run()
        assert bench.sequences[0].generated.tolist() == whole


def test_removal_frees_everything_waiting_or_running() -> None:
    bench = Bench(8, limits(max_num_seqs=2))
    bench.add(*(sequence(prompt(i, 9), request_id=str(i)) for i in range(3)))
    bench.step()
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (2, 1)
    for name in "012":
        assert bench.scheduler.remove(name) is not None
        assert bench.scheduler.remove(name) is None
        bench.pool.check()
    assert not bench.scheduler.has_work
    assert bench.pool.used == 0


@pytest.mark.parametrize(
    ("length", "answer", "changes"),
    [(30, 20, {}), (10, 10, {"chunked_prefill": False})],
    ids=["more than all blocks", "more than one step"],
)
def test_what_never_fits_is_refused_with_numbers(length: int, answer: int, changes: dict[str, bool]) -> None:
    bench = Bench(10, limits(**changes))
    refused = bench.scheduler.add(sequence(prompt(0, length), max_tokens=answer))
    assert refused is not None
    assert refused.status == 400
    assert str(length + answer - 1) in refused.message
    assert not bench.scheduler.has_work


def test_what_just_fits_runs() -> None:
    bench = Bench(10, limits())
    bench.add(sequence(prompt(0, 30), max_tokens=11))
    bench.run()
    assert bench.sequences[0].generated.tolist() == continuation(prompt(0, 30), 11)


def test_an_end_token_ends_it() -> None:
    bench = Bench(10, limits())
    made = sequence(prompt(0, 4), max_tokens=5)
    bench.add(made)
    plan = bench.scheduler.schedule()
    bench.runner.launch(plan)
    [(ended, _, _, finish)] = bench.scheduler.commit(plan, [EOS])
    assert ended is made
    assert finish is not None
    assert (finish.reason, finish.stop_token) == ("stop", EOS)
    assert not bench.scheduler.has_work
    assert bench.pool.used == 0


EMBEDS = Embeds(b"", "float32")


def shown(seed: int, lengths: tuple[int, int], request_id: str, **options: Any) -> Sequence:
    """A prompt with a picture of 4 tokens after each of these lengths of text; no embeddings are here yet."""
    first, second = lengths[0], lengths[0] + 4 + lengths[1]
    spans = tuple(MediaSpan("image", f"{seed} {at}", at, 4, (1, 4, 4)) for at in (first, second))
    tokens = prompt(seed, second + 6)
    return sequence(tokens, request_id=request_id, spans=spans, embeds=(None, None), **options)


@settings(max_examples=150)
@given(
    asked=st.lists(
        st.tuples(st.integers(0, 2), st.tuples(st.integers(0, 5), st.integers(0, 5)), st.integers(1, 6)),
        min_size=1,
        max_size=6,
    ),
    arrivals=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1), st.integers(0, 3)), max_size=12),
    blocks=st.integers(8, 40),
    seqs=st.integers(1, 6),
    caching=st.booleans(),
)
def test_nothing_is_computed_before_its_embeddings_are_here(
    asked: list[tuple[int, tuple[int, int], int]],
    arrivals: list[tuple[int, int, int]],
    blocks: int,
    seqs: int,
    caching: bool,
) -> None:
    """Every other request is text; embeddings come in any order, with any number of steps between."""
    bench = Bench(blocks, limits(max_num_seqs=seqs), caching=caching)
    texts = [sequence(prompt(9, 5 + i), request_id=f"text {i}", max_tokens=3) for i in range(len(asked))]
    shows = [shown(seed, lengths, str(i), max_tokens=answer) for i, (seed, lengths, answer) in enumerate(asked)]
    for text, show in zip(texts, shows, strict=True):
        bench.add(text, show)
    last = [(number, index, 50) for number in range(len(shows)) for index in (1, 0)]
    for number, index, steps in [*arrivals, *last]:
        for _ in range(steps):
            if not bench.step_within_reach():
                break
        bench.scheduler.supply(str(number), {index: EMBEDS})
    bench.run()
    for made in bench.sequences:
        assert made.generated.tolist() == continuation(made.tokens[: made.prompt_len].tolist(), made.max_tokens)


def test_a_prompt_stops_at_its_first_picture_and_others_go_on() -> None:
    bench = Bench(20, limits())
    show, text = shown(0, (5, 2), "show", max_tokens=2), sequence(prompt(1, 3), request_id="text", max_tokens=3)
    bench.add(show, text)
    plans = [bench.step() for _ in range(3)]
    assert [(c.sequence, c.start, c.length) for p in plans for c in p.chunks if c.sequence is show] == [(show, 0, 5)]
    assert bench.finished == [text]
    assert bench.step().chunks == (), "nothing to do before embeddings come"
    bench.scheduler.supply("show", {0: EMBEDS})
    assert [(c.start, c.length) for c in bench.step().chunks] == [(5, 6)]
    bench.scheduler.supply("show", {1: EMBEDS})
    bench.run()
    assert bench.finished == [text, show]


def test_prompts_that_wait_for_embeddings_leave_half_of_the_cache_to_others() -> None:
    bench = Bench(12, limits(), caching=False)
    shows = [shown(i, (5, 2), f"show {i}", max_tokens=1) for i in range(2)]
    text = sequence(prompt(1, 12), request_id="text", max_tokens=2)
    bench.add(*shows, text)
    assert [chunk.sequence for chunk in bench.step().chunks] == [shows[0], text], "each takes 5 blocks"
    bench.step()
    bench.scheduler.supply("show 1", {0: EMBEDS, 1: EMBEDS})
    for _ in range(4):
        bench.step()
    assert bench.finished == [text, shows[1]]
    bench.scheduler.supply("show 0", {0: EMBEDS, 1: EMBEDS})
    bench.run()


def test_a_prompt_that_waits_does_not_stop_steps_from_being_launched_ahead() -> None:
    bench = Bench(20, limits())
    show, text = shown(0, (5, 2), "show", max_tokens=2), sequence(prompt(1, 3), request_id="text", max_tokens=5)
    bench.add(show, text)
    first = bench.scheduler.schedule()
    ahead = bench.scheduler.schedule_ahead()
    assert ahead is not None
    assert [chunk.sequence for chunk in ahead.chunks] == [text]
    bench.scheduler.supply("show", {0: EMBEDS})
    further = bench.scheduler.schedule_ahead()
    assert further is not None
    assert [chunk.sequence for chunk in further.chunks] == [text, show], "its prefill goes on beside the other"
    for plan in (first, ahead, further):
        bench.scheduler.commit(plan, [sampled.token for sampled in bench.runner.launch(plan).read()])
    bench.scheduler.supply("show", {1: EMBEDS})
    bench.run()
    assert text.generated.tolist() == continuation(prompt(1, 3), 5)
