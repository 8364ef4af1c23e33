"""Steps with prefill at the full model's size: captured in pieces against launched whole, in one run; and what first
requests wait for.

    python -m benchmarks.mixed_steps [--quantization wint4] [--output FILE.json]

Weights and configuration are those of benchmarks.engine. Prints

  step_ms.<decodes>+<tokens>   milliseconds of a step of so many tokens of one prompt beside so many sequences with a
                               context of 1,024, by device events around it, the median of five: launched whole, and in
                               pieces, by itself; in_a_row: in pieces, launched while the device computes another, as
                               the engine does; host_ms is how long launching took the host
  routing.<tokens>             how evenly a prompt of so many tokens visits the experts: see benchmarks.routing
  agreement                    of a prompt alone: the largest difference between both, relative to the largest value
  first_ms, tenth_ms           from a request to its only token, by the length of its prompt, beside 8 sequences that
                               decode: of the first request of that length after the start, and the median of the
                               tenth to the twelfth
  first_uses                   kernels compiled, and plans made, after the start
  serving.<gap>.<clients>      that many clients that ask again as soon as they are answered, 1,024 tokens in and 256
                               out: output tokens a second, and the gap between steps
  memory, startup_s            of the whole engine; kept_gib: what captured steps keep
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import count, product
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.engine import CONFIG, Bench
from benchmarks.routing import expert_loads, spread
from services.engine.kernels.first_use import report_first_uses
from services.engine.kernels.triton.moe import moe
from services.engine.loop.mailbox import Add, Mailbox
from services.engine.loop.step_output import StepOutput
from services.engine.run.rehearsal import Rehearsal, measure_ms
from services.engine.run.runner import ModelRunner
from services.engine.schedule.sequence import Sequence
from shared.messages import Sampling
from shared.model.drawn_weights import ATTENTION_STD, STD

CONTEXT = 1024
REPEATS = 5
LENGTHS = (17, 400, 1024, 3000, 8000, 30000)


class Steps:
    """Steps of one loaded engine, both ways."""

    def __init__(self, bench: Bench) -> None:
        runner = bench.runner
        assert isinstance(runner, ModelRunner)
        assert runner.pieces is not None
        self._model, self._cache, self._pieces = runner.model, runner.cache, runner.pieces
        self._shapes = Rehearsal(self._model, self._cache, self._pieces, CONFIG, 256)

    def routing(self, tokens: int) -> dict[str, float]:
        step, model = self._shapes.step([(tokens, tokens)]), self._model
        moved = step.to(model.device, self._cache.block_size)
        return spread(expert_loads(lambda: model.hidden(moved, self._cache), moe, CONFIG.num_experts))

    def compare(self, decodes: int, tokens: int) -> dict[str, float]:
        lengths = [(1, CONTEXT)] * decodes + ([(tokens, tokens)] if tokens else [])
        step, model, size = self._shapes.step(lengths), self._model, self._cache.block_size

        def whole() -> torch.Tensor:
            return model.hidden(step.to(model.device, size), self._cache)

        def pieces() -> torch.Tensor:
            return self._pieces.hidden(step)

        found = {}
        if not decodes:  # the sequences that decode have the same blocks, and write them in any order
            x, y = whole().float(), pieces().float()
            found["agreement"] = float((x - y).abs().max() / x.abs().max())
        for name, run in (("whole", whole), ("pieces", pieces)):
            found[f"{name}_ms"], found[f"{name}_host_ms"] = timed(lambda run=run: model.project(run()[-1:]))  # type: ignore[misc]
        found["in_a_row_ms"] = measure_ms(lambda: model.project(pieces()[-1:]))
        return {name: round(value, 4) for name, value in found.items()}


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Return the median milliseconds of the device, and of the host until it has launched."""
    run()
    device, host = [], []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        at = time.perf_counter()
        started.record()
        run()
        ended.record()
        host.append(1000 * (time.perf_counter() - at))
        ended.synchronize()
        device.append(started.elapsed_time(ended))
    return statistics.median(device), statistics.median(host)


class Clients:
    """Sink that asks again whenever a request has ended, and notes when tokens came."""

    def __init__(self, mailbox: Mailbox, clients: int, waiting: list[Sequence]) -> None:
        self._mailbox, self._left, self._waiting = mailbox, clients + len(waiting), waiting
        self.stamps: list[tuple[float, int]] = []

    def __call__(self, output: StepOutput) -> None:
        tokens = sum(len(run.tokens) for message in output.messages().values() for run in message.runs)
        self.stamps.append((time.perf_counter(), tokens))
        for _ in output.ended:
            self._left -= 1
            if self._left == 0:
                self._mailbox.close()
                return
            if self._waiting:
                self._mailbox.put(Add(self._waiting.pop()))


def serving(bench: Bench, clients: int, rounds: int) -> dict[str, float]:
    """Run clients that ask again at once; the beginning and the end are not measured."""
    index, mailbox = count(10**6), Mailbox()
    waiting = [bench.sequence(next(index), CONTEXT, 256) for _ in range(clients * (rounds - 1))]
    sink = Clients(mailbox, clients, waiting)
    # Staggered answers, as they are after a while.
    asked = [bench.sequence(next(index), CONTEXT, 1 + 255 * (nth + 1) // clients) for nth in range(clients)]
    bench.drive(asked, mailbox, sink)
    stamps = sink.stamps
    first, last = len(stamps) // 5, len(stamps) * 9 // 10
    gaps = sorted(1000 * (stamps[i + 1][0] - stamps[i][0]) for i in range(first, last))
    tokens = sum(given for _, given in stamps[first + 1 : last + 1])
    return {
        "tok_s": round(tokens / (stamps[last][0] - stamps[first][0])),
        **{f"gap_p{p}": round(gaps[min(len(gaps) - 1, int(len(gaps) * p / 100))], 2) for p in (50, 99, 99.9)},
    }


def first_and_tenth(bench: Bench, length: int) -> tuple[float, float]:
    """Return milliseconds to the token of the first request of a length, and of the tenth, beside 8 that decode."""
    took = []
    for nth in range(12):
        mailbox = Mailbox()
        sink = First(bench, mailbox, length, 5000 + nth)
        bench.drive([bench.sequence(i, 64, 400) for i in range(8)], mailbox, sink)
        took.append(sink.took_ms)
    return took[0], statistics.median(took[9:])


class First:
    """Sink that asks once the others decode, and ends with the answer."""

    def __init__(self, bench: Bench, mailbox: Mailbox, length: int, index: int) -> None:
        self._mailbox, self._asked = mailbox, bench.sequence(index, length, 1)
        self._steps, self._at, self.took_ms = 0, 0.0, 0.0

    def __call__(self, output: StepOutput) -> None:
        self._steps += 1
        if self._steps == 6:
            self._at = time.perf_counter()
            self._mailbox.put(Add(self._asked))
        if any(end.request_id == self._asked.request_id for end in output.ended):
            self.took_ms = 1000 * (time.perf_counter() - self._at)
            self._mailbox.close()


def kept() -> dict[str, float]:
    """Return GiB that graphs keep in pools of their own, and that this process uses beyond what torch knows."""
    segments: list[dict[str, Any]] = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    pools = [segment for segment in segments if tuple(segment["segment_pool_id"]) != (0, 0)]
    free, total = torch.cuda.mem_get_info()
    return {
        "kept_gib": sum(segment["total_size"] for segment in pools) / 2**30,
        "beyond_torch_gib": (total - free - torch.cuda.memory_reserved()) / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", default="wint4", choices=("wint4", "wint8", "none"))
    parser.add_argument(
        "--steps",
        default="0+64,0+256,0+384,0+512,0+768,0+1024,0+1152,0+1280,0+2048,32+128,32+512,32+1024,128+512,128+640,128+896,128+1024,128+1152,128+1920,256+768,256+1024",
    )
    parser.add_argument("--clients", default="32,128,256")
    parser.add_argument(
        "--attention-std",
        type=float,
        default=ATTENTION_STD,
        help=f"of what attention's results are projected by, {STD} until 2026-11-29 (%(default)s)",
    )
    parser.add_argument("--gaps", default="25,0", help="bounds on the gap in ms (%(default)s; 0: none)")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    told: dict[str, Any] = {"max_num_batched_tokens": 8192}
    sampling = Sampling(seed=0, temperature=0.0, ignore_eos=True)
    bench = Bench(args.quantization, 131_072, sampling, attention_std=args.attention_std, **told)
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "quantization": args.quantization, **told}
    result["attention_std"] = args.attention_std
    result |= {"memory": bench.memory | kept(), "startup_s": bench.startup_s}
    print(json.dumps(result), flush=True)
    times = bench.runner.step_times
    print("measured at the start", times, flush=True)
    uses: list[str] = []
    report_first_uses(uses.append)
    for length in LENGTHS:
        first, tenth = first_and_tenth(bench, length)
        result.setdefault("first_ms", {})[length], result.setdefault("tenth_ms", {})[length] = first, tenth
        print(f"prompt {length}: first {first:.1f} ms, tenth {tenth:.1f} ms, first uses {len(uses)}", flush=True)
    for gap, clients in product(args.gaps.split(","), (int(number) for number in args.clients.split(",") if number)):
        bench.settings = msgspec.structs.replace(bench.settings, max_token_gap_ms=float(gap))
        result.setdefault("serving", {}).setdefault(gap, {})[clients] = found = serving(bench, clients, 3)
        print(f"{clients} clients, gap {gap}: {found}, first uses {len(uses)}", flush=True)
    result["first_uses"] = list(uses)
    print("first uses:", uses, flush=True)
    steps = Steps(bench)
    for tokens in (512, 1024):
        result.setdefault("routing", {})[tokens] = found = steps.routing(tokens)
        print(f"routing of {tokens} tokens: {found}", flush=True)
    for decodes, tokens in (map(int, pair.split("+")) for pair in args.steps.split(",") if pair):
        result.setdefault("step_ms", {})[f"{decodes}+{tokens}"] = found = steps.compare(decodes, tokens)
        print(f"{decodes}+{tokens}: {found}", flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
