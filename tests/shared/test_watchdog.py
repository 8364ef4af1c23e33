"""Steps that hang end the process; steps that are slow, or a process that was halted, do not."""

import subprocess
import sys

import pytest
from machine import PATIENCE_S

from shared.watchdog import FACTOR, HUNG, FirstUse, Step, StepBounds, Watchdog

COMPILES = FirstUse(300.0, 0.0, compiles=True)
SLOW = FirstUse(0.0, 0.1, compiles=False)
NEITHER = FirstUse(0.0, 0.0, compiles=False)

_PROGRAM = """
import ctypes, threading
from shared import log
from shared.watchdog import FirstUse, Watchdog

log.setup("engine", "engine-0", "info")

def stuck_in_a_driver():
    {stuck}

watchdog = Watchdog({bound_s}, FirstUse(0.0, 0.0, compiles=False), lambda age: None)
watchdog.start()
with watchdog.watch("decode", 1):
    with watchdog.waiting():
        while {waits} and watchdog._timed:
            pass
    stuck_in_a_driver()
"""


def test_the_bound_is_the_larger_of_the_setting_and_what_the_kind_takes() -> None:
    bounds = StepBounds(20.0, NEITHER)
    assert bounds.bound("decode", 4) == 20.0
    bounds.record("decode", 4, 0.5)
    assert bounds.bound("decode", 4) == 20.0
    bounds.record("decode", 4, 2.0)
    bounds.record("decode", 4, 0.1)
    assert bounds.bound("decode", 4) == FACTOR * 2.0
    assert bounds.bound("prefill", 4) == 20.0


def test_the_first_use_of_a_size_may_take_longer() -> None:
    bounds = StepBounds(20.0, COMPILES)
    assert bounds.bound("prefill", 100) == 320.0
    bounds.record("prefill", 100, 60.0)
    assert bounds.bound("prefill", 100) == 20.0, "compiling says nothing about later steps"
    assert bounds.bound("prefill", 127) == 20.0
    assert bounds.bound("prefill", 128) == 320.0
    assert bounds.bound("decode", 100) == 320.0


def test_a_slow_machine_is_not_hung() -> None:
    bounds = StepBounds(20.0, SLOW)
    assert bounds.bound("prefill", 8000) == 820.0
    bounds.record("prefill", 8000, 700.0)
    assert bounds.bound("prefill", 8000) == FACTOR * 700.0


class Bench:
    """A watchdog that looks when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ages: list[float] = []
        self.expired: list[tuple[Step, float]] = []
        self.watchdog = Watchdog(
            10.0, NEITHER, self.ages.append, lambda step, age: self.expired.append((step, age)), lambda: self.now
        )

    def pass_time(self, seconds: float, looks: int) -> None:
        for _ in range(looks):
            self.now += seconds / looks
            self.watchdog.look()


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_step_that_outlasts_its_bound_hangs(bench: Bench) -> None:
    with bench.watchdog.watch("decode", 3):
        bench.pass_time(10.0, 20)
        assert not bench.expired
        assert bench.ages[-1] == 10.0
        bench.pass_time(1.0, 2)
    assert [(step.kind, step.rows) for step, _ in bench.expired[:1]] == [("decode", 3)]
    bench.watchdog.stop()


def test_a_step_that_waited_for_others_may_take_longer_by_that(bench: Bench) -> None:
    bench.watchdog.excuse(5.0)
    with bench.watchdog.watch("encode", 4):
        bench.watchdog.excuse(3.0)
        bench.watchdog.excuse(4.0)
        bench.pass_time(16.5, looks=33)
        assert bench.expired == []
        bench.pass_time(1.0, looks=2)
        assert [step.bound_s for step, _ in bench.expired] == [17.0]
    with bench.watchdog.watch("decode", 4):
        bench.pass_time(11.0, looks=22)
        assert len(bench.expired) > 1, "the next one has no excuse"


def test_a_wait_for_others_within_a_step_is_none_of_its_time(bench: Bench) -> None:
    for _ in range(2):  # nor is the next one's bound that of a step which has taken so long
        with bench.watchdog.watch("decode", 4):
            bench.pass_time(4.0, looks=8)
            with bench.watchdog.waiting():
                bench.pass_time(3600.0, looks=7200)
            assert bench.ages[-1] == 0.0
            bench.pass_time(5.5, looks=11)
            assert bench.ages[-1] == 9.5
            assert bench.expired == []
    with bench.watchdog.watch("decode", 4):
        with bench.watchdog.waiting():
            bench.pass_time(60.0, looks=120)
        bench.pass_time(FACTOR * 9.5 + 1.0, looks=600)
    assert {step.bound_s for step, _ in bench.expired} == {FACTOR * 9.5}, "what is after the wait is watched"
    with bench.watchdog.waiting():
        bench.pass_time(60.0, looks=120)
    assert bench.ages[-1] == 0.0, "nothing is under way"
    bench.watchdog.stop()


def test_between_steps_nothing_hangs(bench: Bench) -> None:
    for _ in range(50):
        with bench.watchdog.watch("decode", 1):
            bench.pass_time(1.0, 2)
        bench.pass_time(60.0, 120)
        assert bench.ages[-1] == 0.0
    assert not bench.expired
    bench.watchdog.stop()


def test_a_process_that_was_halted_in_a_step_does_not_hang_and_was_not_slow(bench: Bench) -> None:
    with bench.watchdog.watch("decode", 1):
        bench.pass_time(3600.0, 1)
    with bench.watchdog.watch("decode", 1):
        bench.pass_time(3600.0, 1)
        bench.pass_time(FACTOR * 2.5, 200)
        assert bench.expired, "the bound did not become that of a step of an hour"
    bench.watchdog.stop()


@pytest.mark.system
@pytest.mark.parametrize("waits", [False, True], ids=["at once", "after a wait"])
@pytest.mark.parametrize(
    ("stuck", "bound_s", "status"),
    [
        ("threading.Event().wait()", 1.0, HUNG),  # so that a pause of the process is no lock that is held
        ("ctypes.PyDLL(None).sleep(1000)", 0.1, 1),  # holds the interpreter lock
    ],
    ids=["lock free", "lock held"],
)
def test_the_process_ends_and_says_where_it_hung(stuck: str, bound_s: float, status: int, waits: bool) -> None:
    program = _PROGRAM.format(stuck=stuck, bound_s=bound_s, waits=waits)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert done.returncode == status, done.stderr
    assert "stuck_in_a_driver" in done.stderr
    assert ("a step hangs" in done.stderr) == (status == HUNG)
