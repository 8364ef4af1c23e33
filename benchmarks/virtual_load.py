"""The scheduler under a mixed load in virtual time: gaps between tokens, times to the first one, and who waits.

    python -m benchmarks.virtual_load [--rate 0.2,0.3] [--clients 4,16] [--seconds 600] [--output FILE]

A step takes what `step_ms` says of its rows and their context, fitted to the demo checkpoint on one core, so that the
result is a function of the scheduler alone: on a busy machine the stalls that clients see are mostly not its own.
Prompts of 200 to 4,000 tokens arrive at random, or those of 200 to 1,000 in closed loops; answers have 96. Each load
with steps filled (`full`) and with prefill beside those who decode bounded by learned times (`bound`). Asserts nothing.

  <way>.<load>.tok_s          tokens of the answers, a second
  <way>.<load>.gap            ms between tokens: p50, p99, p99.9, most
  <way>.<load>.ttft           ms to the first token, of all prompts: p50, p99
  <way>.<load>.ttft_short     the same of prompts up to 800 tokens
  <way>.<load>.ttft_long      the same of prompts of 2,000 and more
"""

import argparse
import json
import random
from collections.abc import Sequence as Ordered
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.engine import numbers
from cli.bench.figures import quantile
from cli.bench.load import poisson
from services.engine.schedule.blocks import BlockPool
from services.engine.schedule.plan import Plan
from services.engine.schedule.prefill_budget import PrefillBudget
from services.engine.schedule.scheduler import Limits, Scheduler
from services.engine.schedule.sequence import EngineFacts, Sequence, build
from services.engine.schedule.step_times import LearnedTimes, StepTimes
from shared.messages import Generate, Output, Request, Sampling, pack_ids
from shared.model.config import load_model_config

FACTS = EngineFacts(load_model_config(Path("cli/demo_checkpoint")), 8192, think_close_id=3)
SHORT, LONG = 800, 2000
OUTPUT = 96
TARGET_MS = 25.0
UNBOUNDED = StepTimes((1 << 20,), (0.0,))  # a step of any size takes no time
FIXED_MS, DECODE_MS, CACHED_MS, ROW_MS, ATTENTION_MS = 12.0, 1.0, 0.0033, 0.36, 0.0003


def step_ms(plan: Plan) -> float:
    """Return the time of a step: of a row, and of each token that it attends to."""
    ms = FIXED_MS
    for chunk in plan.chunks:
        if chunk.length == 1:
            ms += DECODE_MS + CACHED_MS * chunk.stop
        else:
            ms += chunk.length * (ROW_MS + ATTENTION_MS * (chunk.start + chunk.length / 2))
    return ms


class Load:
    """Requests that run in virtual time, and when their tokens came."""

    def __init__(self, times: StepTimes | LearnedTimes) -> None:
        self._budget = PrefillBudget(TARGET_MS, times)
        limits = Limits(64, 512, True, 64, self._budget)
        self._scheduler = Scheduler(BlockPool(4000, caching=False), limits)
        self._rng = random.Random(1)
        self.now = 0.0  # milliseconds
        self.sent: list[float] = []
        self.prompts: list[int] = []
        self.stamps: list[list[float]] = []

    def ask(self, prompt: int, at: float) -> None:
        number = len(self.sent)
        request = Request(f"{number}", "bench", 0, 0.0, Sampling(0, ignore_eos=True), Output(thinking=False))
        message = Generate(request, pack_ids([11] * prompt), OUTPUT, ())
        refused = self._scheduler.add(build(message, 1, (), (), FACTS))
        assert refused is None
        self.sent.append(at)
        self.prompts.append(prompt)
        self.stamps.append([])

    def step(self) -> list[Sequence]:
        """Run a step; return who has ended with it."""
        plan = self._scheduler.schedule()
        took = step_ms(plan)
        self.now += took
        self._scheduler.learn(plan, took, took)
        made = self._scheduler.commit(plan, [11] * len(plan.draws()))
        for one in made:
            self.stamps[int(one.sequence.request_id)].append(self.now)
        return [one.sequence for one in made if one.finish is not None]

    def arrive(self, rate: float, seconds: float) -> None:
        """Run Poisson arrivals to their end."""
        coming = [(1000 * one.at, one.prompt) for one in poisson(rate, seconds, (200, 4000), 1)]
        while coming or self._scheduler.has_work:
            if not self._scheduler.has_work:
                self.now = max(self.now, coming[0][0])
            while coming and coming[0][0] <= self.now:
                at, prompt = coming.pop(0)
                self.ask(prompt, at)
            self.step()

    def loop(self, clients: int, seconds: float) -> None:
        """Run clients that ask again at once until the time is up, and what is open then to its end."""
        for _ in range(clients):
            self.ask(self._rng.randint(200, 1000), 0.0)
        while self._scheduler.has_work:
            for _ in self.step():
                if self.now < 1000 * seconds:
                    self.ask(self._rng.randint(200, 1000), self.now)

    def figures(self) -> dict[str, Any]:
        gaps = sorted(after - before for stamps in self.stamps for before, after in pairwise(stamps))
        first = [(stamps[0] - sent, n) for stamps, sent, n in zip(self.stamps, self.sent, self.prompts, strict=True)]
        return {
            "tok_s": round(1000 * sum(map(len, self.stamps)) / self.now, 1),
            "gap": rounded(gaps, (0.5, 0.99, 0.999, 1.0)),
            "ttft": rounded(sorted(ms for ms, _ in first), (0.5, 0.99)),
            "ttft_short": rounded(sorted(ms for ms, n in first if n <= SHORT), (0.5, 0.99)),
            "ttft_long": rounded(sorted(ms for ms, n in first if n >= LONG), (0.5, 0.99)),
        }


def rounded(values: list[float], shares: Ordered[float]) -> list[float] | None:
    return [round(quantile(values, share), 1) for share in shares] if values else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=lambda text: [float(word) for word in text.split(",")], default=[0.1, 0.2, 0.3])
    parser.add_argument("--clients", type=numbers, default=(1, 4, 16))
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--output", type=Path, help="the JSON file")
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for way in ("full", "bound"):
        figures = found.setdefault(way, {})
        for rate in args.rate:
            load = Load(UNBOUNDED if way == "full" else LearnedTimes())
            load.arrive(rate, args.seconds)
            figures[f"{rate:g}/s"] = load.figures()
        for clients in args.clients:
            load = Load(UNBOUNDED if way == "full" else LearnedTimes())
            load.loop(clients, args.seconds)
            figures[f"{clients}"] = load.figures()
        for name, row in figures.items():
            print(way, name, json.dumps(row), flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
