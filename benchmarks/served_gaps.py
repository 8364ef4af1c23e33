"""Gaps between the tokens of a client, from place to place on their way, with a device that ends its steps by a clock.

    python -m benchmarks.served_gaps [--clients 256] [--each 4] [--output 256] [--host 1.0] [--device 1.0] [--json FILE]

Redis (on disk), gateway, postproc and the client processes of `millrace bench serve` are as they ship, and so is the
engine but for its GPU (benchmarks.simulated_device). Clients ask four times each, all at once at first, 1,024 tokens in
and 256 out. Processes that are short of cores wait for each other, too; with --device 3 they need a third. Prints

  tok_s           tokens of the answers, a second
  gap.<place>     ms from a token of a sequence to its next, p50, p90, p99, p99.9: as the device ends steps, as the
                  model's thread has read them, as it sends them, and as the client reads them
  ttft            ms to the first token, p50 and p99
  launch.<kind>   ms of the host for a step with prefill, and for one without, p50 and p99; the thread's own, p50
  read_to_sent    ms from a step's read to its tokens' way out, p50 and p99
  lock            ms a step with prefill that its launches waited for the interpreter's lock, p50 and p99
  idle            share of the time in which the device had nothing to compute between two steps
  steps           their number with and without prefill, and of those that waited for the read of the one before
  cpu             cores busy in each process, and in the engine's model thread alone

Asserts nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.pipeline import System, cpu_seconds, free_port
from benchmarks.simulated_device import Step
from cli.bench.command import run
from cli.bench.figures import quantile
from cli.bench.load import Load, Part
from cli.redis_server import RedisServer

MODEL = Path("cli/demo_checkpoint").resolve()
IDS = (100, 1999)  # of words
PROMPT = 1024
STOP_S = 30.0
TOLD = {"LOG_LEVEL": "warning", "DEVICE": "cpu", "MAX_NUM_SEQS": "256", "MAX_NUM_BATCHED_TOKENS": "8192"}


def measure(clients: int, each: int, output: int, engine: Sequence[str], root: Path) -> dict[str, Any]:
    """Run the services and their clients; return the figures."""
    trace = root / "trace"
    with RedisServer(root / "redis", persistence=True) as server:
        system = System(server, MODEL, free_port(), 1)
        words = [sys.executable, "-m", "benchmarks.simulated_device", "--trace", str(trace), *engine]
        process = subprocess.Popen(words, env=environ(server.url))
        load = Load(
            url=f"http://127.0.0.1:{system.port}/v1/completions",
            model="default",
            key="",
            prompt=(PROMPT, PROMPT),
            output=output,
            ids=IDS,
        )
        try:
            run([msgspec.structs.replace(load, clients=1, requests=2)])
            before, own = {**system.cpu(), "engine": cpu_seconds(process.pid)}, os.times()
            parts, begin = run([msgspec.structs.replace(load, clients=clients, requests=each * clients)])
            after, since = {**system.cpu(), "engine": cpu_seconds(process.pid)}, os.times()
        finally:
            process.terminate()
            process.wait(STOP_S)
            system.stop()
    steps = [step for step in msgspec.json.decode(trace.read_bytes(), type=list[Step]) if step.planned > begin]
    seconds = steps[-1].read - begin
    busy = {name: after[name] - before[name] for name in before}
    busy["model thread"] = steps[-1].thread - steps[0].thread
    busy["clients"] = since.children_user + since.children_system - own.children_user - own.children_system
    return figures(steps, parts, seconds) | {"cpu": {name: round(cpu / seconds, 3) for name, cpu in busy.items()}}


def figures(steps: list[Step], parts: list[Part], seconds: float) -> dict[str, Any]:
    answers = [answer for part in parts for answer in part.answers]
    errors = [answer.error for answer in answers if answer.error is not None]
    if errors:
        raise SystemExit(f"{len(errors)} requests failed: {errors[0]}")
    sampled = [step for step in steps if step.tokens]
    sent = sent_at(steps, sampled)
    gaps = {
        "device": weighted([step.ended for step in sampled], sampled),
        "read": weighted([step.read for step in sampled], sampled),
        "sent": weighted(sent, sampled),
        "client": [1000 * (after - before) for each in answers for before, after in pairwise(each.events)],
    }
    kinds = {"prefill": [s for s in steps if s.prefill], "decode": [s for s in steps if not s.prefill]}
    return {
        "tok_s": round(sum(len(answer.events) for answer in answers) / seconds),
        "gap": {place: shown(found, 0.5, 0.9, 0.99, 0.999) for place, found in gaps.items()},
        "ttft": shown([1000 * (each.events[0] - each.sent) for each in answers], 0.5, 0.99),
        "launch": {
            kind: shown([1000 * (s.launched - s.planned) for s in some], 0.5, 0.99)
            + shown([1000 * s.cpu for s in some], 0.5)
            for kind, some in kinds.items()
        },
        "read_to_sent": shown([1000 * (at - step.read) for at, step in zip(sent, sampled, strict=True)], 0.5, 0.99),
        "lock": shown([1000 * step.waited for step in kinds["prefill"]], 0.5, 0.99),
        "idle": round(sum(max(0.0, after.began - before.ended) for before, after in pairwise(steps)) / seconds, 4),
        "steps": [*map(len, kinds.values()), sum(not step.ahead for step in steps)],
    }


def sent_at(steps: list[Step], sampled: list[Step]) -> list[float]:
    """Return when the tokens of each step were on their way: in the first launch after its read that sent something."""
    sends, found = iter([step.sent for step in steps]), list[float]()
    at = next(sends)
    for step in sampled:
        while at < step.read:
            at = next(sends, float("inf"))
        found.append(at if at < float("inf") else step.read)
    return found


def weighted(times: list[float], steps: list[Step]) -> list[float]:
    """Return milliseconds from one step to the next, once for each token of it."""
    gaps = [1000 * (after - before) for before, after in pairwise(times)]
    return [gap for gap, step in zip(gaps, steps[1:], strict=True) for _ in range(step.tokens)]


def shown(values: list[float], *shares: float) -> list[float]:
    ordered = sorted(values)
    return [round(float(quantile(ordered, share)), 2) for share in shares] if ordered else []


def environ(redis_url: str) -> dict[str, str]:
    """Return the environment of the engine."""
    told = {**TOLD, "REDIS_URL": redis_url, "MODEL": str(MODEL), "NAMESPACE": "bench"}
    others = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
    return others | {f"MILLRACE_{name}": value for name, value in told.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--host", default="1.0", help="how slow the host launches (%(default)s)")
    parser.add_argument("--device", default="1.0", help="how slow the device computes (%(default)s)")
    parser.add_argument("--each", type=int, default=4, help="requests of a client (%(default)s)")
    parser.add_argument("--output", type=int, default=256, help="tokens of an answer (%(default)s)")
    parser.add_argument("--json", type=Path, help="the JSON file")
    args = parser.parse_args()
    engine = ["--host", args.host, "--device", args.device]
    with tempfile.TemporaryDirectory(prefix="millrace-") as scratch:
        found = measure(args.clients, args.each, args.output, engine, Path(scratch))
    for name, value in found.items():
        print(name, json.dumps(value))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
