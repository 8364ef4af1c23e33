"""The rehearsal meets every class of launches, and what it has missed is told."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from small_model import ON_GPU, PAGE, SEQS, SMALL, Computed, decode_rows, runner, small_model

from services.engine.__main__ import prefill_budget, speculation, warn_of_first_use
from services.engine.kernels.first_use import note_first_use, report_first_uses
from services.engine.kernels.triton.attention import paged_attention, whole_prompt
from services.engine.kernels.triton.dense import linear
from services.engine.kernels.triton.moe import grouped, grouped_quantized
from services.engine.kernels.triton.moe.tiles import plan
from services.engine.metrics import EngineMetrics
from services.engine.model.ernie import ErnieModel
from services.engine.model.inputs import KVCache
from services.engine.run.graphs import DecodeGraphs
from services.engine.run.pieces import ALIGNMENT, captured_sizes, padded_rows
from services.engine.run.rehearsal import ROWS, Rehearsal, compute_steps, larger_sizes, planned_chunks
from services.engine.run.runner import ModelRunner
from services.engine.schedule.prefill_budget import LEAST_ROOM
from services.engine.schedule.speculation import Speculation
from services.engine.schedule.step_times import StepTimes
from services.engine.settings import EngineSettings, SpeculativeConfig
from shared.card_page import SIZE, CardPage

GUESSES = SpeculativeConfig(method="ngram", num_speculative_tokens=8)


class Spied(ErnieModel):
    """Notes the numbers of sequences and the lengths that attention was called with, and the rows of whole steps."""

    def __init__(self, model: ErnieModel) -> None:
        super().__init__(model.config, model.weights, model._ops)
        self.counts: set[int] = set()
        self.lengths: set[tuple[int, int]] = set()
        self.beside: set[int] = set()
        self.planned: set[int] = set()
        self.rows: set[int] = set()

    def attend(self, calls: Any, keys: Any, values: Any) -> None:
        for part, _ in calls:
            if part.max_query_len == 1:
                (self.beside if part.beside else self.counts).add(len(part.lengths))
            else:
                self.planned.add(part.max_query_len)
            self.lengths.update(part.lengths)
        super().attend(calls, keys, values)

    def embed(self, token_ids: Any, embed_rows: Any, embeds: Any) -> Any:
        self.rows.add(len(token_ids))
        return super().embed(token_ids, embed_rows, embeds)


def is_finite(cache: KVCache) -> bool:
    return all(bool(each.isfinite().all()) for each in (cache.keys, cache.values))


@pytest.mark.parametrize("piece_rows", [0, 64])
def test_every_number_of_sequences_and_every_size_is_met(piece_rows: int) -> None:
    """Whether steps are captured, or launched whole where memory is short."""
    model = Spied(small_model())
    made = runner(model, ModelRunner, piece_rows=piece_rows)
    assert made.pieces is not None
    model.counts.clear()
    model.lengths.clear()
    model.rows.clear()
    times = Rehearsal(model, made.cache, made.pieces, SMALL, SEQS).run(300, 250)
    assert model.counts == model.beside == set(range(1, SEQS + 1))
    assert model.planned >= set(planned_chunks(250))
    assert (2, 2) in model.lengths
    assert model.rows == set(captured_sizes(300))
    assert times.rows == captured_sizes(300)


@pytest.mark.skipif(ON_GPU, reason="its steps are captured")
@pytest.mark.parametrize(("longest", "rows"), [(300, ROWS), (40, 39), (1, 1)])
def test_a_cpu_computes_a_few_steps_before_the_first_request(longest: int, rows: int) -> None:
    """They touch the weights and the memory that a first request would wait for, and no more of the cache."""
    model = Spied(small_model())
    made = runner(model, ModelRunner, captured=False)
    compute_steps(made, SMALL, longest)
    assert model.lengths == {(rows, rows), (1, rows + 1)}
    assert is_finite(made.cache)


def test_captured_steps_are_computed_as_they_will_be() -> None:
    """A step with prefill in pieces, and one that decodes, which leave no number that is none in the cache."""
    model = small_model()
    made = runner(model, ModelRunner, piece_rows=64)
    assert made.pieces is not None
    made.cache.clear()
    compute_steps(made, SMALL, 300)
    written = made.cache.keys.float().abs().sum((0, 2, 3, 4)) > 0
    assert written.sum() >= (ROWS + 1) // PAGE
    assert is_finite(made.cache)


def test_no_row_of_a_rehearsed_step_is_media() -> None:
    """Media visit experts of their own: a step with three such rows in a hundred takes a fifth longer."""
    model = small_model()
    made = runner(model, ModelRunner, piece_rows=64)
    assert made.pieces is not None
    step = Rehearsal(model, made.cache, made.pieces, SMALL, SEQS).step([(4000, 4000)])
    assert step.token_ids.max() == SMALL.image_patch_id - 1 < SMALL.vocab_size - 1


def test_decode_steps_of_every_captured_size_are_measured() -> None:
    model = small_model()
    made = runner(model, ModelRunner)
    assert made.pieces is not None
    graphs = (DecodeGraphs if ON_GPU else Computed)(model, made.cache, decode_rows(model), SEQS)
    times = Rehearsal(model, made.cache, made.pieces, SMALL, SEQS).measure_decodes(graphs, 4, 0.5)
    assert (times.rows, times.ms_per_cached_token) == ((1, 2, 4), 0.5)
    assert speculation(GUESSES, made) == Speculation(8, 3, 16), "nothing was measured"
    made.step_times = StepTimes((64,), (5.0,), decode=times)
    assert speculation(GUESSES, made) == Speculation(8, 3, 16, times)


def test_a_decode_step_takes_no_longer_than_a_larger_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    made = runner(model, ModelRunner)
    assert made.pieces is not None
    graphs = (DecodeGraphs if ON_GPU else Computed)(model, made.cache, decode_rows(model), SEQS)
    measured = iter((20.0, 5.0, 6.0))
    monkeypatch.setattr("services.engine.run.rehearsal.measure_ms", lambda run: next(measured))
    times = Rehearsal(model, made.cache, made.pieces, SMALL, SEQS).measure_decodes(graphs, 4, 0.5)
    assert times.ms == (5.0, 5.0, 6.0)


# Multiprocessors: RTX 5090, 4090, L20, A30, A100, H20, H200.
@pytest.mark.parametrize("processors", [170, 128, 92, 56, 108, 78, 132])
@pytest.mark.parametrize("heads", [20, 10, 5])
@pytest.mark.parametrize("longest", [2, 64, 65, 512, 2048, 8192])
def test_every_shape_of_tiles_is_met(longest: int, heads: int, processors: int) -> None:
    """Of those that chunks of up to so many tokens can have: however many at once, behind however many tokens."""

    def shape(queries: int, context: int, sequences: int) -> paged_attention.PrefillShape:
        return paged_attention.chunk_shape(queries, context, heads * sequences / (2 * processors))

    queries = {2, 64, *range(65, 2049, 64), 2049, 8192}
    possible = {
        shape(new, context, sequences)
        for new in queries if new <= longest
        for context in (new, 131072)
        for sequences in range(1, 65)
    }  # fmt: skip
    assert len(possible) == (1 if longest < 65 else 3), "as the card and the number of sequences choose"
    assert {shape(new, 2, 1) for new in planned_chunks(longest)} == possible


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("max_rows", [512, 2048, 8192])
def test_steps_that_are_launched_whole_meet_no_tiles_that_were_not_rehearsed(max_rows: int, bits: int) -> None:
    """They are padded to multiples of 16, and a few of these are rehearsed."""
    sizes = captured_sizes(max_rows)
    rehearsed = {*sizes, *larger_sizes(sizes[-1], max_rows)}
    possible = {padded_rows(rows, 0) for rows in range(1, max_rows + 1)}
    assert len(rehearsed) < len(possible)
    choices: list[Callable[[int], object]] = [
        lambda rows: plan(6 * rows, 64, bits),
        lambda rows: plan(6 * rows, 128, bits),
        lambda rows: 6 * rows >= grouped.ROWS_PER_EXPERT * 128,
        lambda rows: 6 * rows >= grouped.INT8_ROWS_PER_EXPERT * 128,
        lambda rows: grouped_quantized.tile_rows(bits, 6 * rows / 128),
        lambda rows: [rows >= least for least in (linear.PLAIN_ROWS, linear.LIBRARY_ROWS)],
        lambda rows: [rows <= most for most in (linear.UNSPLIT_ROWS, linear.UNSPLIT_PLAIN_ROWS, linear.EARLY_ROWS)],
        lambda rows: linear._tiles(rows, 2560, bits),
    ]
    for choice in choices:
        assert {str(choice(rows)) for rows in rehearsed} == {str(choice(rows)) for rows in possible}


def test_every_plan_of_the_library_is_made() -> None:
    """Of each padded length that a prompt of one step can have, a prompt is tried."""
    model = small_model()
    made = runner(model, ModelRunner, piece_rows=64)
    assert made.pieces is not None
    tried = Rehearsal(model, made.cache, made.pieces, SMALL, SEQS)._attentions(8192, 131072)
    whole = {lengths[0][0] for lengths in tried if whole_prompt.is_whole_prompt(lengths[0])}
    possible = {whole_prompt.planned_length(length) for length in range(4096, 8193)}
    assert {whole_prompt.planned_length(length) for length in whole} == possible


@pytest.mark.parametrize(("captured", "most"), [(2304, 8192), (2304, 16384), (2304, 2400)])
def test_larger_sizes_double_up_to_the_largest(captured: int, most: int) -> None:
    sizes = larger_sizes(captured, most)
    assert sizes[0] == captured + ALIGNMENT
    assert sizes[-1] == most
    assert all(later <= 2 * size for size, later in pairwise(sizes))


def test_a_step_that_was_all_captured_has_no_larger_size() -> None:
    assert larger_sizes(64, 64) == []


@pytest.fixture
def told() -> Iterator[list[str]]:
    found: list[str] = []
    report_first_uses(found.append)
    yield found
    report_first_uses(None)


def test_a_kernel_compiled_after_the_start_is_told(told: list[str]) -> None:
    from triton import knobs

    hook: Any = knobs.runtime.jit_post_compile_hook
    hook(key="k", repr="r", fn=SimpleNamespace(name="_sort_kernel"), compile={}, is_manual_warmup=False)
    assert told == ["_sort_kernel"]


def test_a_plan_of_the_library_is_told_once(told: list[str]) -> None:
    whole_prompt._note_plan.cache_clear()
    for length in (2048, 2304, 2048):
        whole_prompt._note_plan(length)
    assert told == ["library plan for 2048 tokens", "library plan for 2304 tokens"]


def test_a_first_use_is_counted_and_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry)
    report_first_uses(lambda what: warn_of_first_use(metrics, what))
    note_first_use("_sort_kernel")
    report_first_uses(None)
    note_first_use("nobody asked for this one")
    assert registry.get_sample_value("millrace_kernel_first_uses_total") == 1
    assert [(record.levelname, record.what) for record in caplog.records] == [("WARNING", "_sort_kernel")]  # type: ignore[attr-defined]


def test_a_bound_on_the_gap_takes_measured_times_or_learns_them() -> None:
    made = runner(small_model(), ModelRunner)
    told = EngineSettings(redis_url="unix:///x", model="m", max_token_gap_ms=20.0)
    unmeasured = prefill_budget(told, made)
    assert unmeasured is not None
    assert unmeasured.learns
    assert unmeasured.room(10, 0, 8192) == LEAST_ROOM
    unmeasured.learn(100, 1.0)
    assert unmeasured.room(10, 0, 8192) == 1990
    made.step_times = StepTimes((64, 512), (5.0, 12.0), 0.001)
    budget = prefill_budget(told, made)
    assert budget is not None
    assert not budget.learns
    assert budget.room(10, 0, 8192) == 502
    assert budget.room(0, 0, 8192) == 8192
    page = CardPage(bytearray(SIZE))
    shared = prefill_budget(told, made, page)
    assert shared is not None
    assert shared.room(10, 0, 8192) == 502, "no encoder works"
    page.note_work()
    assert shared.room(10, 0, 8192) == 502, "0.65 of 20 ms are enough for a step of 12"
    assert shared.room(10, 2000, 8192) == LEAST_ROOM
    assert shared.room(0, 0, 8192) == 8192, "nobody waits for tokens"
    off = EngineSettings(redis_url="unix:///x", model="m", max_token_gap_ms=0)
    assert prefill_budget(off, made) is None
