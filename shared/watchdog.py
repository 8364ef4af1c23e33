"""Watchdog over the steps of the thread that computes: it ends a process whose step hangs.

The event loop renews the lease while that thread hangs in a device's driver, so the replica would look ready for ever
and nobody would take over. The watchdog is a thread of its own. Where a step holds the interpreter's lock no thread
runs, and the lease expires by itself; a timer of `faulthandler`, which needs no lock, then ends the process.

What may take long without being hung is not watched (loading, capturing) or has a longer bound (first use of a size).
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

from shared.log import logger

HUNG = 3  # exit status
FACTOR = 30  # of the slowest step so far
LOCKED_FACTOR = 10  # of the bound: until the timer ends a process in which the watchdog cannot run
LAST_WORDS_S = 5.0  # for the log; its lock may be what the step hangs on

_log = logger(__name__)
Watch = Callable[[str, int], AbstractContextManager[None]]


def unwatched(kind: str, rows: int) -> AbstractContextManager[None]:
    """Watch nothing: for tests, and where `step_timeout_s` is 0."""
    return nullcontext()


@dataclass(frozen=True, slots=True)
class FirstUse:
    """Time that the first step of a size may take besides: `seconds`, and `row_seconds` for each of its rows.

    `compiles`: this time says nothing about later steps.
    """

    seconds: float
    row_seconds: float
    compiles: bool


class StepBounds:
    """Bounds on the time of steps: the larger of a setting and FACTOR times the slowest step of the same kind.

    The size of a step is its number of rows, by powers of two.
    """

    def __init__(self, timeout_s: float, first_use: FirstUse) -> None:
        self._timeout_s = timeout_s
        self._first_use = first_use
        self._slowest: defaultdict[str, float] = defaultdict(float)
        self._known: set[tuple[str, int]] = set()

    def bound(self, kind: str, rows: int) -> float:
        """Return the seconds that a step of so many rows may take."""
        usual = max(self._timeout_s, FACTOR * self._slowest[kind])
        if (kind, rows.bit_length()) in self._known:
            return usual
        return usual + self._first_use.seconds + self._first_use.row_seconds * rows

    def record(self, kind: str, rows: int, seconds: float) -> None:
        """Learn from a step that has ended."""
        size = (kind, rows.bit_length())
        if size in self._known or not self._first_use.compiles:
            self._slowest[kind] = max(self._slowest[kind], seconds)
        self._known.add(size)


@dataclass(frozen=True, slots=True)
class Step:
    """A step under way. `started` is on the watchdog's own clock."""

    kind: str
    rows: int
    bound_s: float
    started: float


class Watchdog:
    """Watches one thread's steps. Its clock stands still while the process does, so a halt is no hang."""

    def __init__(
        self,
        timeout_s: float,
        first_use: FirstUse,
        report_age: Callable[[float], None],
        expire: Callable[[Step, float], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            timeout_s: above 0, see StepBounds.
            report_age: told the age of the step under way at every look, 0 without one.
            expire: called with a step that hangs and its age; by default it ends the process.
        """
        self._bounds = StepBounds(timeout_s, first_use)
        self._look_s = min(max(timeout_s / 20, 0.05), 1.0)
        self._report_age = report_age
        self._expire = expire or end_process
        self._step: Step | None = None
        self._waited_s = 0.0  # of the step under way
        self._timed = False  # the timer runs
        self._timing = threading.Lock()
        self._clock = clock
        self._awake_s = 0.0  # the watchdog's own clock
        self._looked = clock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._looked = self._clock()
        self._thread.start()

    def stop(self) -> None:
        """Stop to watch."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        self._stop_timer()

    @contextmanager
    def watch(self, kind: str, rows: int) -> Iterator[None]:
        """Watch what is inside, a step of so many rows. One at a time."""
        started, self._waited_s = self._clock(), 0.0
        self._step = step = Step(kind, rows, self._bounds.bound(kind, rows), self._awake_s)
        if not self._timed:
            self._start_timer(step)
        try:
            yield
        finally:
            step, self._step = self._step or step, None
        # The watchdog's clock knows of halts, the machine's is finer.
        awake = self._awake_s - step.started + 2 * self._look_s
        self._bounds.record(kind, rows, min(self._clock() - started - self._waited_s, awake))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Do not count what is inside in the step under way, in whose thread this is: it waits for others, however
        long."""
        step, self._step = self._step, None
        began, awake_began = self._clock(), self._awake_s
        try:
            yield
        finally:
            self._waited_s += self._clock() - began
            if step is not None:
                self._step = step = replace(step, started=step.started + self._awake_s - awake_began)
                if not self._timed:  # a look has stopped it, and none may come again
                    self._start_timer(step)

    def excuse(self, seconds: float) -> None:
        """Let the step under way, in whose thread this is called, take longer: by what it waited for others."""
        if (step := self._step) is not None:
            self._step = replace(step, bound_s=step.bound_s + seconds)

    def _run(self) -> None:
        while not self._stopped.wait(self._look_s):
            self.look()

    def look(self) -> None:
        """Advance the clock, and judge the step under way."""
        now = self._clock()
        self._awake_s += min(now - self._looked, 2 * self._look_s)
        self._looked = now
        step = self._step
        age = 0.0 if step is None else self._awake_s - step.started
        self._report_age(age)
        if step is None:
            self._stop_timer()
        elif age > step.bound_s:
            self._expire(step, age)
        else:
            self._start_timer(step)

    def _start_timer(self, step: Step) -> None:
        """Start the timer, again if it runs. Takes longer than a lock, so not for every step."""
        with self._timing:
            self._timed = True
            end_process_later(LOCKED_FACTOR * step.bound_s)

    def _stop_timer(self) -> None:
        """Stop the timer, unless a step has begun."""
        with self._timing:
            if self._timed and self._step is None:
                faulthandler.cancel_dump_traceback_later()
                self._timed = False


def end_process(step: Step, age: float, **more: str) -> None:
    """Log where every thread is, and what `more` there is to say, and end the process."""
    end_process_later(LAST_WORDS_S)
    _log.error(
        "a step hangs; ending this process, so that another replica takes its requests over",
        extra={
            "step": step.kind,
            "rows": step.rows,
            "seconds": round(age, 1),
            "bound_s": round(step.bound_s, 1),
            "threads": stacks(),
            **more,
        },
    )
    sys.stderr.flush()
    os._exit(HUNG)


def end_process_later(seconds: float) -> None:
    """Write stack traces to stderr and end the process then, unless called again; needs no interpreter lock."""
    if sys.__stderr__ is not None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)


def stacks() -> str:
    """Return the stack traces of all threads."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
