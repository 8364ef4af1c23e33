"""The scheduler under a mixed load in virtual time: gaps between tokens, times to the first one, and who waits.

    python -m benchmarks.virtual_load [--device core] [--rate 0.1,0.2,0.3] [--clients 1,4,16] [--seconds 600]
        [--gaps 0,25] [--output FILE]
    python -m benchmarks.virtual_load --device h200 --rate 2,8 --clients 32,128,256 --seconds 60 --gaps 0,25,60

A step takes what the device's `step_ms` says of its rows and their context, so that the result is a function of the
scheduler alone: on a busy machine the stalls that clients see are mostly not its own. `core` is the demo checkpoint on
one core; prompts of 200 to 4,000 tokens arrive at random, or those of 200 to 1,000 in closed loops; answers have 96.
`h200` is the published model in wint4 on that GPU; prompts of 200 to 8,000 tokens arrive, or those of 1,024 come in
closed loops; answers have 256. Each load with steps filled (`full`) and with prefill beside those who decode bounded to
25 ms (`bound`) or as --gaps says. Asserts nothing.

  <way>.<load>.tok_s          tokens of the answers, a second
  <way>.<load>.gap            ms between tokens: p50, p99, p99.9, most
  <way>.<load>.ttft           ms to the first token, of all prompts: p50, p99
  <way>.<load>.ttft_short     the same of prompts up to 800 tokens
  <way>.<load>.ttft_long      the same of prompts of 2,000 and more
"""

import argparse
import json
import random
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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

FACTS = EngineFacts(load_model_config(Path("cli/demo_checkpoint")), 16_384, think_close_id=3)
SHORT, LONG = 800, 2000
USUAL_GAP_MS = 25
UNBOUNDED = StepTimes((1 << 20,), (1e-9,))  # a step of any size takes next to no time
FIXED_MS, DECODE_MS, CACHED_MS, ROW_MS, ATTENTION_MS = 12.0, 1.0, 0.0033, 0.36, 0.0003


def core_ms(plan: Plan) -> float:
    """Return the time of a step: of a row, and of each token that it attends to."""
    ms = FIXED_MS
    for chunk in plan.chunks:
        if chunk.length == 1:
            ms += DECODE_MS + CACHED_MS * chunk.stop
        else:
            ms += chunk.length * (ROW_MS + ATTENTION_MS * (chunk.start + chunk.length / 2))
    return ms


# As one H200 has measured at its start (benchmarks/results/mixed-steps-h200.json; decoding: engine-h200.json, whose
# sequences have 1,024 tokens in the cache).
H200 = StepTimes(
    (16, 64, 128, 256, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1536, 2048, 2304, 4640, 8192),
    (3.6, 4.9, 5.5, 6.8, 9.1, 10.1, 12.3, 13.6, 14.7, 15.8, 17.8, 20.0, 24.8, 31.5, 33.3, 67.4, 115.8),
    1.585e-5,
)
H200_DECODES, DECODED_AT = ((1, 8, 32, 64, 128, 256), (1.44, 2.84, 4.5, 5.44, 7.06, 10.22)), 1024
H200_ATTENTION_MS = (
    4e-7  # of a row of a chunk for each token before the chunk: 1,024 rows behind 7,168 take 8 ms, not 5
)


def h200_ms(plan: Plan) -> float:
    """Return the time of a step, between those that were measured."""
    decodes = [chunk.stop for chunk in plan.chunks if chunk.length == 1]
    chunks = [chunk for chunk in plan.chunks if chunk.length > 1]
    if not chunks:
        ms: float = np.interp(plan.num_tokens, *H200_DECODES)
        return ms + (sum(decodes) - DECODED_AT * len(decodes)) * H200.ms_per_cached_token
    ms = np.interp(plan.num_tokens, H200.rows, H200.ms) + sum(decodes) * H200.ms_per_cached_token
    return ms + sum(chunk.length * chunk.start * H200_ATTENTION_MS for chunk in chunks)


class Device(NamedTuple):
    """Hardware with the published model or the demo, and the requests that it gets."""

    step_ms: Callable[[Plan], float]
    times: Callable[[], StepTimes | LearnedTimes]
    max_num_seqs: int
    max_num_batched_tokens: int
    arriving: tuple[int, int]  # tokens of prompts that arrive at random
    looping: tuple[int, int]  # of those in closed loops
    answer: int  # tokens


DEVICES = {
    "core": Device(core_ms, LearnedTimes, 64, 512, (200, 4000), (200, 1000), 96),
    "h200": Device(h200_ms, lambda: H200, 256, 8192, (200, 8000), (1024, 1024), 256),
}


class Load:
    """Requests that run in virtual time, and when their tokens came."""

    def __init__(self, device: Device, gap_ms: float) -> None:
        """`gap_ms`: bound on a step with prefill beside those who decode; 0: steps are filled."""
        self._device = device
        budget = PrefillBudget(gap_ms, device.times()) if gap_ms else PrefillBudget(1.0, UNBOUNDED)
        limits = Limits(device.max_num_seqs, device.max_num_batched_tokens, True, 64, budget)
        self._scheduler = Scheduler(BlockPool(31_000, caching=False), limits)
        self._rng = random.Random(1)
        self.now = 0.0  # milliseconds
        self.sent: list[float] = []
        self.prompts: list[int] = []
        self.stamps: list[list[float]] = []

    def ask(self, prompt: int, at: float) -> None:
        number = len(self.sent)
        request = Request(f"{number}", "bench", 0, 0.0, Sampling(0, ignore_eos=True), Output(thinking=False))
        message = Generate(request, pack_ids([11] * prompt), self._device.answer, ())
        refused = self._scheduler.add(build(message, 1, (), (), FACTS))
        assert refused is None
        self.sent.append(at)
        self.prompts.append(prompt)
        self.stamps.append([])

    def step(self) -> list[Sequence]:
        """Run a step; return who has ended with it."""
        plan = self._scheduler.schedule()
        took = self._device.step_ms(plan)
        self.now += took
        self._scheduler.learn(plan, took, took)
        made = self._scheduler.commit(plan, [11] * len(plan.draws()))
        for one in made:
            self.stamps[int(one.sequence.request_id)].append(self.now)
        return [one.sequence for one in made if one.finish is not None]

    def arrive(self, rate: float, seconds: float) -> None:
        """Run Poisson arrivals to their end."""
        coming = [(1000 * one.at, one.prompt) for one in poisson(rate, seconds, self._device.arriving, 1)]
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
            self.ask(self._rng.randint(*self._device.looping), 0.0)
        while self._scheduler.has_work:
            for _ in self.step():
                if self.now < 1000 * seconds:
                    self.ask(self._rng.randint(*self._device.looping), self.now)

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
    parser.add_argument("--device", choices=DEVICES, default="core")
    parser.add_argument("--rate", type=lambda text: [float(word) for word in text.split(",")], default=[0.1, 0.2, 0.3])
    parser.add_argument("--clients", type=numbers, default=(1, 4, 16))
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--gaps", type=numbers, default=(0, 25), help="bounds in ms; 0: none (0,25)")
    parser.add_argument("--output", type=Path, help="the JSON file")
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for gap in args.gaps:
        way = "full" if not gap else "bound" if gap == USUAL_GAP_MS else f"bound to {gap}"
        figures = found.setdefault(way, {})
        for rate in args.rate:
            load = Load(DEVICES[args.device], gap)
            load.arrive(rate, args.seconds)
            figures[f"{rate:g}/s"] = load.figures()
        for clients in args.clients:
            load = Load(DEVICES[args.device], gap)
            load.loop(clients, args.seconds)
            figures[f"{clients}"] = load.figures()
        for name, row in figures.items():
            print(way, name, json.dumps(row), flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
