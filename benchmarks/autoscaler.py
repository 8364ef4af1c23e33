"""Simulation of the autoscaler's decisions: how long requests wait, engine-hours, and how often replicas change.

    python -m benchmarks.autoscaler [--seed 1] [--trace FILE.csv [--speed 4] [--slower 10]] [--show]

The policy is the real one (cli/autoscaler/policy.py); the engines, Kubernetes and the load are simulated, in steps of
half a second. An engine runs up to 32 sequences and holds 4 more, as the real one does; a step takes 3.3 ms for one
sequence and 11.4 ms for 32, and 40,000 tokens of prompts one second (`--slower` divides both, for recorded loads); a
new one loads weights for 90 s; a draining one accepts nothing new and finishes its requests. The policies are

  always N       that many engines, all the time
  xlen 300 s     the length of the stream, as KEDA and an HPA follow it with the chart's settings: a look every 15 s, a
                 tolerance of a tenth, five minutes of less work before the first decrease, one fewer a minute
  no cool-down   this policy with a cool-down of 0 s
  millrace N s   this policy

The table has: requests' wait until an engine runs them (the backlog's age, by request), the longest backlog,
engine-hours (with those that start and leave), the most engines at a time, how often their number changed, and flaps:
changes up less than five minutes after one down. Nothing is asserted.
"""

import argparse
import itertools
import math
import random
import statistics
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from benchmarks.loads import SYNTHETIC, Arrival, read
from cli.autoscaler.policy import Memory, Rules, Seen, decide

TICK_S = 0.5
OBSERVE_S = 5.0
RUNS, HOLDS = 32, 36
LOAD_S = 90.0
PREFILL = 40_000.0  # tokens a second
STEP_MS = ((1, 3.26), (8, 7.78), (32, 11.42))
MOST = 6
FLAP_S = 300.0
TAIL_S = 600.0
PICTURE = 72  # columns of --show


class Policy(Protocol):
    def replicas(self, work: int, leaving: int, current: int, now: float, added: int) -> int:
        """Return the number of replicas for a stream of `work` entries, `leaving` of them held by draining engines.
        The stream has had `added` in all."""
        ...


class Always:
    def __init__(self, number: int) -> None:
        self._number = number

    def replicas(self, work: int, leaving: int, current: int, now: float, added: int) -> int:
        return self._number


class Ours:
    def __init__(self, cooldown_s: float = 300.0) -> None:
        self._rules = Rules(deployment="engine", target=RUNS, least=0, most=MOST, cooldown_s=cooldown_s)
        self._memory = Memory(-math.inf)

    def replicas(self, work: int, leaving: int, current: int, now: float, added: int) -> int:
        self._memory, decision = decide(self._rules, Seen(work - leaving, current, added=added), self._memory, now)
        return decision.replicas if decision.step in ("out", "in") else current


class Hpa:
    """Policy of KEDA's ScaledObject and an HPA over the length of the stream, with the chart's settings."""

    def __init__(self) -> None:
        self._wanted: deque[tuple[float, int]] = deque()
        self._next = 0.0
        self._worked = -math.inf
        self._fewer = -math.inf

    def replicas(self, work: int, leaving: int, current: int, now: float, added: int) -> int:
        self._worked = now if work else self._worked
        if current == 0:
            return 1 if work else 0
        if not work and now - self._worked >= 300:
            return 0
        if now < self._next:
            return current
        self._next = now + 15
        ratio = work / (RUNS * current)
        asked = current if abs(ratio - 1) <= 0.1 else math.ceil(work / RUNS)
        self._wanted.append((now, min(MOST, max(1, asked))))
        while self._wanted[0][0] <= now - 300:
            self._wanted.popleft()
        calm = max(number for _, number in self._wanted)
        if self._wanted[-1][1] > current:
            return self._wanted[-1][1]
        if calm < current and now - self._fewer >= 60:
            self._fewer = now
            return current - 1
        return current


class Engine:
    """Replica with `held` requests, [prompt left, tokens left] in order of arrival, of which the first RUNS run."""

    __slots__ = ("arrivals", "held", "leaving", "ready_at")

    def __init__(self, ready_at: float) -> None:
        self.ready_at = ready_at
        self.leaving = False
        self.held: list[list[float]] = []
        self.arrivals: list[float] = []  # of requests that were accepted and do not run yet

    def accept(self, arrival: Arrival) -> None:
        self.held.append([arrival.prompt, arrival.output])
        self.arrivals.append(arrival.at)

    def record_waits(self, now: float, waits: list[float]) -> None:
        """Append the waits of the requests that run from now on."""
        waiting = max(0, len(self.held) - RUNS)
        while len(self.arrivals) > waiting:
            waits.append(now - self.arrivals.pop(0))

    def run(self, seconds: float) -> None:
        running = self.held[:RUNS]
        prefill = seconds * PREFILL
        for each in running:
            done = min(each[0], prefill)
            each[0] -= done
            prefill -= done
        share = prefill / (seconds * PREFILL)  # of the time, left by prompts for decoding
        decoding = [each for each in running if each[0] <= 0]
        if decoding:
            tokens = seconds * share / _step_s(len(decoding))
            for each in decoding:
                each[1] -= tokens
        self.held = [each for each in self.held if each[1] > 0]


def _step_s(sequences: int) -> float:
    for (few, fast), (many, slow) in itertools.pairwise(STEP_MS):
        if sequences <= many:
            return (fast + (slow - fast) * (sequences - few) / (many - few)) / 1000
    return STEP_MS[-1][1] / 1000


class Outcome:
    """Figures of one simulated run."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.longest = 0  # backlog
        self.engine_s = 0.0
        self.replicas: list[tuple[float, int]] = [(0.0, 0)]  # (when, asked for from then on)
        self.seconds = 0.0

    @property
    def changes(self) -> int:
        return len(self.replicas) - 1

    @property
    def flaps(self) -> int:
        changes = list(itertools.pairwise(self.replicas))
        fell = [when for (_, old), (when, new) in changes if new < old]
        rose = [when for (_, old), (when, new) in changes if new > old]
        return sum(any(0 < up - down < FLAP_S for down in fell) for up in rose)


def simulate(load: Sequence[Arrival], policy: Policy, slower: float) -> Outcome:
    """Simulate until the load is served, and at least ten minutes after its last request."""
    outcome = Outcome()
    queue: deque[Arrival] = deque()
    engines: list[Engine] = []
    coming = deque(load)
    asked = policy.replicas(0, 0, 0, 0.0, 0)
    if asked:
        engines = [Engine(0.0) for _ in range(asked)]
        outcome.replicas = [(0.0, asked)]
    now, next_observation, end = 0.0, 0.0, load[-1].at + TAIL_S
    while now < end or queue or any(engine.held for engine in engines):
        while coming and coming[0].at <= now:
            queue.append(coming.popleft())
        _hand_out(queue, engines, now, outcome.waits)
        for engine in engines:
            engine.run(TICK_S / slower)
        engines = [engine for engine in engines if engine.held or not engine.leaving]
        outcome.engine_s += TICK_S * len(engines)
        outcome.longest = max(outcome.longest, len(queue))
        if now >= next_observation:
            next_observation += OBSERVE_S
            leaving = sum(len(engine.held) for engine in engines if engine.leaving)
            work = len(queue) + sum(len(engine.held) for engine in engines)
            number = policy.replicas(work, leaving, asked, now, len(load) - len(coming))
            if number != asked:
                _change(engines, number - asked, now)
                outcome.replicas.append((now, number))
                asked = number
        now += TICK_S
    outcome.seconds = now
    return outcome


def _hand_out(queue: deque[Arrival], engines: list[Engine], now: float, waits: list[float]) -> None:
    """Hand entries in turn to the engines that have room, as Redis does to blocked readers of a stream."""
    ready = deque(engine for engine in engines if not engine.leaving and engine.ready_at <= now)
    while queue and ready:
        engine = ready.popleft()
        if len(engine.held) < HOLDS:
            engine.accept(queue.popleft())
            ready.append(engine)
    for engine in engines:
        engine.record_waits(now, waits)


def _change(engines: list[Engine], by: int, now: float) -> None:
    """Add pods, or drain as Kubernetes does: first those that are not ready, then those with the lowest cost."""
    engines += [Engine(now + LOAD_S) for _ in range(by)]
    staying = [engine for engine in engines if not engine.leaving]
    for engine in sorted(staying, key=lambda each: (each.ready_at <= now, len(each.held)))[: max(0, -by)]:
        engine.leaving = True


# ----------------------------------------------------------------------------------------------------------- output


def policies() -> dict[str, Policy]:
    return {
        "always 1": Always(1),
        f"always {MOST}": Always(MOST),
        "xlen 300 s": Hpa(),
        "no cool-down": Ours(cooldown_s=0.0),
        "millrace 60 s": Ours(cooldown_s=60.0),
        "millrace 300 s": Ours(),
    }


HEADER = (
    "| load | policy | wait p50 / p95 / max s | longest backlog | engine-hours | most | changes | flaps |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|"
)


def line(load: str, policy: str, outcome: Outcome) -> str:
    waits = sorted(outcome.waits)
    p95 = waits[int(0.95 * (len(waits) - 1))]
    most = max(number for _, number in outcome.replicas)
    return (
        f"| {load} | {policy} | {statistics.median(waits):.1f} / {p95:.1f} / {waits[-1]:.1f} | {outcome.longest} "
        f"| {outcome.engine_s / 3600:.2f} | {most} | {outcome.changes} | {outcome.flaps} |"
    )


def picture(load: Sequence[Arrival], outcome: Outcome) -> str:
    """Draw arrivals and replicas over time, a digit a column."""
    width = outcome.seconds / PICTURE
    arrivals = [0] * (PICTURE + 1)
    for arrival in load:
        arrivals[int(arrival.at / width)] += 1
    peak = max(arrivals)
    shares = "".join(" " if not each else str(min(9, each * 10 // peak)) for each in arrivals[:PICTURE])
    numbers = ""
    for column in range(PICTURE):
        numbers += str([number for when, number in outcome.replicas if when <= (column + 1) * width][-1])
    return f"    arrivals, tenths of {peak / width:.2f}/s  |{shares}|\n    replicas {'':21}|{numbers}|"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trace", type=Path, action="append", default=[], help="a recorded load; see benchmarks.loads")
    parser.add_argument("--speed", type=float, default=1.0, help="factor by which recorded requests arrive faster")
    parser.add_argument("--slower", type=float, default=1.0, help="factor by which engines are slower for them")
    parser.add_argument("--show", action="store_true", help="draw replicas over time")
    given = parser.parse_args()
    loads = [(name, make(random.Random(given.seed)), 1.0) for name, make in SYNTHETIC.items()]
    for path in given.trace:
        recorded = [Arrival(at / given.speed, prompt, output) for at, prompt, output in read(path)]
        loads.append((path.stem, recorded, given.slower))
    print(HEADER)
    for name, load, slower in loads:
        for title, policy in policies().items():
            outcome = simulate(load, policy, slower)
            print(line(name, title, outcome), flush=True)
            if given.show and title.startswith("millrace"):
                print(picture(load, outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main())
