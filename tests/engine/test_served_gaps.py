"""The benchmark of gaps between tokens: its figures, and that its device ends steps in order and by its clock."""

import time
from itertools import pairwise
from pathlib import Path

import pytest
from engine_bench import settings_for
from engine_cases import sequence

from benchmarks.served_gaps import figures, sent_at
from benchmarks.simulated_device import ClockedRunner, Step
from benchmarks.virtual_load import h200_ms
from cli.bench.load import Answer, Part
from services.engine.schedule.plan import Chunk, Plan

MODEL = Path(__file__).resolve().parents[2] / "cli" / "demo_checkpoint"


def steps() -> list[Step]:
    """Return steps of 10 and 20 ms. The output of the first goes out 1 ms after its read, that of the second 3 ms."""
    return [
        Step(planned=0.000, began=0.000, sent=0.000, launched=0.001, ended=0.010, read=0.011, tokens=2),
        Step(planned=0.001, began=0.010, sent=0.001, launched=0.002, ended=0.020, read=0.021, tokens=2, ahead=True),
        Step(planned=0.011, began=0.020, sent=0.012, launched=0.015, ended=0.040, read=0.041, tokens=3, prefill=True),
        Step(planned=0.021, began=0.041, sent=0.024, launched=0.025, ended=0.050, read=0.051, tokens=3, ahead=True),
    ]


def test_tokens_go_out_in_the_first_launch_after_their_read() -> None:
    assert sent_at(steps(), steps()) == [0.012, 0.024, 0.041, 0.051], "the last two with no launch, so at once"


def test_gaps_are_told_by_place() -> None:
    answer = Answer(prompt=5, sent=0.0, events=[0.012, 0.026, 0.040], tokens=3, ended=0.05)
    found = figures(steps(), [Part([answer], 0.1)], 0.05)
    assert found["gap"] == {
        "device": [10.0, 20.0, 20.0, 20.0],
        "read": [10.0, 20.0, 20.0, 20.0],
        "sent": [12.0, 17.0, 17.0, 17.0],
        "client": [14.0, 14.0, 14.0, 14.0],
    }
    assert (found["tok_s"], found["read_to_sent"], found["ttft"]) == (60, [0.5, 2.94], [12.0, 12.0])
    assert (found["idle"], found["steps"]) == (0.02, [1, 3, 2])


def test_a_failed_request_ends_the_benchmark() -> None:
    with pytest.raises(SystemExit, match="1 requests failed: no"):
        figures(steps(), [Part([Answer(prompt=5, sent=0.0, error="no")], 0.1)], 0.05)


def test_the_device_ends_a_step_so_long_after_the_one_before() -> None:
    trace: list[Step] = []
    settings = settings_for("unix:///unused", model=str(MODEL), max_num_seqs=8, max_num_batched_tokens=64)
    runner = ClockedRunner(settings, 1.0, 2.0, trace)
    made = sequence(range(10, 60), max_tokens=20)
    made.blocks.extend(range(60))
    plans = [Plan((Chunk(made, 0, 50, samples=True),)), Plan((Chunk(made, 50, 1, samples=True, source=0),))]
    launched = [runner.launch(plan, lambda: None) for plan in plans]
    for step, one in zip(trace, launched, strict=True):
        assert len(one.read()) == 1
        assert time.monotonic() >= step.read >= step.ended
    for (before, after), plan in zip(pairwise(trace), plans[1:], strict=True):
        assert after.ahead
        assert after.began == max(after.planned, before.ended)
        assert after.ended == max(after.began + 2.0 * h200_ms(plan) / 1000, after.launched)
    assert [(step.prefill, step.rows, step.tokens) for step in trace] == [(True, 50, 1), (False, 1, 1)]
