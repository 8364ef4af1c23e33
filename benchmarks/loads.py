"""Requests over time: synthetic ones by a seed, and recorded ones from a file.

    python -m benchmarks.loads --redis-url URL [--namespace NAME] [--seconds 600] FILE.csv

records those of a running deployment, as it reads its own streams: one line a request that ended, with the columns
TIMESTAMP (ISO, of its entry in `generate`), ContextTokens and GeneratedTokens. That is the form in which Azure
publishes its traces of LLM inference (AzureLLMInferenceTrace_conv.csv and others), so those can be replayed too.
"""

import argparse
import asyncio
import csv
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from shared.bus.client import command, connect
from shared.bus.keys import GENERATE, Keys
from shared.bus.leases import COUNT
from shared.bus.streams import LogReader
from shared.messages import Generate, Tokens

ISO = "%Y-%m-%d %H:%M:%S.%f"
BLOCK_MS = 500


class Arrival(NamedTuple):
    at: float  # seconds from the start
    prompt: int  # tokens
    output: int  # tokens


def poisson(rate: Callable[[float], float], most: float, seconds: float, rng: random.Random) -> Iterator[float]:
    """Yield times of a Poisson process whose rate a second is `rate(t)`, never above `most`."""
    now = 0.0
    while (now := now + rng.expovariate(most)) < seconds:
        if rng.random() * most < rate(now):
            yield now


def _requests(times: Iterator[float], rng: random.Random) -> list[Arrival]:
    """Draw prompts of some hundred tokens with a long tail (pictures, documents), and answers of a model that thinks
    first."""
    return [
        Arrival(at, min(16_384, int(rng.lognormvariate(6.4, 1.1))), min(8192, int(rng.lognormvariate(6.5, 0.9)) + 1))
        for at in sorted(times)
    ]


def day(rng: random.Random) -> list[Arrival]:
    """Return a working day squeezed into three hours: from next to nothing to 8 requests a second and back."""
    seconds = 10_800.0
    return _requests(poisson(lambda t: 8 * math.sin(math.pi * t / seconds) ** 2 + 0.02, 8.02, seconds, rng), rng)


def bursts(rng: random.Random) -> list[Arrival]:
    """Return two hours of 0.3 requests a second, with a burst of 10 a second for a minute or two every quarter of an
    hour."""
    seconds = 7200.0
    begins = [900 * i + rng.uniform(0, 600) for i in range(8)]
    spans = [(begin, begin + rng.uniform(45, 120)) for begin in begins]
    return _requests(poisson(lambda t: 10.3 if any(a <= t < b for a, b in spans) else 0.3, 10.3, seconds, rng), rng)


def sparse(rng: random.Random) -> list[Arrival]:
    """Return four hours in which a user asks three questions in a row, about every half hour."""
    times = (begin + gap for begin in poisson(lambda _: 1 / 1800, 1 / 1800, 14_400, rng) for gap in (0, 40, 95))
    return _requests(times, rng)


def short(rng: random.Random) -> list[Arrival]:
    """Return an hour of small requests, one every two seconds, each done long before the next."""
    return [Arrival(2.0 * number + rng.uniform(0, 1), 200, 8) for number in range(1800)]


def read(path: Path) -> list[Arrival]:
    """Read a recorded load."""
    with path.open(newline="") as file:
        rows = sorted(
            (
                datetime.fromisoformat(row["TIMESTAMP"]).timestamp(),
                int(row["ContextTokens"]),
                int(row["GeneratedTokens"]),
            )
            for row in csv.DictReader(file)
        )
    return [Arrival(at - rows[0][0], prompt, output) for at, prompt, output in rows]


SYNTHETIC: dict[str, Callable[[random.Random], list[Arrival]]] = {
    "day": day,
    "bursts": bursts,
    "sparse": sparse,
    "short": short,
}


# -------------------------------------------------------------------------------------------------------- recording


async def record(redis_url: str, namespace: str, seconds: float) -> list[tuple[str, int, int]]:
    """Follow a deployment for a while, as one more reader of its streams; return the rows of requests that ended in
    it."""
    redis, keys = connect(redis_url), Keys(namespace)
    shards = int(await command(redis, "HGET", keys.shards(), COUNT) or 0)
    reader = LogReader(redis, {name: "$" for name in (keys.stream(GENERATE), *map(keys.tokens, range(shards)))})
    begun: dict[str, tuple[str, int]] = {}
    rows: list[tuple[str, int, int]] = []
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            for _, entry_id, message in await reader.read(1000, BLOCK_MS):
                if isinstance(message, Generate):
                    at = datetime.fromtimestamp(int(entry_id.partition("-")[0]) / 1000, UTC)
                    begun[message.request.id] = (at.strftime(ISO), len(message.prompt) // 4)
                ended = [run for run in message.runs if run.finish] if isinstance(message, Tokens) else []
                rows += [
                    (*begun.pop(run.request_id), run.index + len(run.tokens))
                    for run in ended
                    if run.request_id in begun
                ]
    finally:
        await redis.aclose()
    return sorted(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--namespace", default="millrace")
    parser.add_argument("--seconds", type=float, default=600.0)
    given = parser.parse_args()
    rows = asyncio.run(record(given.redis_url, given.namespace, given.seconds))
    with given.file.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("TIMESTAMP", "ContextTokens", "GeneratedTokens"))
        writer.writerows(rows)
    print(f"{len(rows)} requests in {given.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
