"""Stands for the gateway while an engine is measured: submits requests, reads the deltas of its own stream.

    python -m benchmarks.engine_client '{"redis_url": ..., "requests": 32, ...}'

A process of its own, so that reading costs the engine nothing. It reads the tokens stream beside the deltas, and stamps
what it reads with one clock: a step is the time between two messages of the tokens stream, and a token's way to the
gateway that from its message there to its delta. Prints a `Passage` as JSON; asserts nothing.
"""

import asyncio
import sys
import time
import uuid

import msgspec
import numpy as np

from benchmarks.steps import GENERATED, PROMPT, step_ms
from shared.bus.client import connect
from shared.bus.keys import GENERATE, Keys
from shared.bus.records import Records
from shared.bus.streams import LogReader, send
from shared.messages import Delta, Deltas, Generate, Message, Output, Request, Sampling, Tokens, pack_ids

BLOCK_MS = 1000
PAGE = 100
KEPT_S = 60  # of the idempotency key of the submission


class Load(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Requests to submit, all at once."""

    redis_url: str
    namespace: str
    requests: int
    sampling: Sampling
    prompt: int = PROMPT  # tokens
    generated: int = GENERATED  # tokens
    ids: tuple[int, int] = (1000, 100_000)  # prompts are drawn from these


class Passage(msgspec.Struct, frozen=True):
    """Times of the requests' tokens through the pipeline."""

    step_ms: float
    delta_ms: dict[str, float]  # p50 and p99, from a token's message in the tokens stream to its delta


class Watch:
    """Times at which tokens and deltas were read."""

    def __init__(self, load: Load) -> None:
        self._left = load.requests
        self._read: dict[str, list[float]] = {}  # by request: when the message with token i was read
        self.stamps: list[tuple[float, int]] = []
        self.delays: list[float] = []  # seconds

    @property
    def over(self) -> bool:
        return self._left == 0

    def record(self, message: Message, now: float) -> None:
        if isinstance(message, Tokens):
            for run in message.runs:
                self._read.setdefault(run.request_id, []).extend([now] * len(run.tokens))
            self.stamps.append((now, sum(len(run.tokens) for run in message.runs)))
        elif isinstance(message, Deltas):
            for delta in message.items:
                self._delta(delta, now)

    def _delta(self, delta: Delta, now: float) -> None:
        if delta.failure is not None:
            raise SystemExit(f"a request failed: {delta.failure.message}")
        read = self._read[delta.request_id]
        if delta.finish_reason is not None:
            self._left -= 1
        else:
            self.delays.append(now - read[delta.seq - 1])


async def run(load: Load) -> Passage:
    """Submit everything, and read until the last finish."""
    redis, keys = connect(load.redis_url), Keys(load.namespace)
    records, watch = Records(redis, keys), Watch(load)
    gateway = uuid.uuid4().hex
    await send(redis, keys.deltas(gateway), Deltas(()))  # postproc writes only to gateways whose stream exists
    reader = LogReader(redis, {keys.tokens(0): "$", keys.deltas(gateway): "0"})
    await reader.read(1, 0)  # resolves `$`: later tokens are read from here
    # In one command, as the gateway does it for choices of one request: so all begin at once, as in the bare engine.
    asked = [ask(load, gateway, i) for i in range(load.requests)]
    await records.submit_once(GENERATE, asked, gateway, gateway, KEPT_S)
    while not watch.over:
        messages = await reader.read(PAGE, BLOCK_MS)
        now = time.perf_counter()
        for _, _, message in messages:
            watch.record(message, now)
    await redis.delete(keys.deltas(gateway))
    await redis.aclose()
    delays = {f"p{q}": round(1000 * float(np.percentile(watch.delays, q)), 3) for q in (50, 99)}
    return Passage(round(step_ms(watch.stamps, load.requests), 3), delays)


def ask(load: Load, gateway: str, index: int) -> Generate:
    prompt = np.random.default_rng(index).integers(*load.ids, load.prompt).tolist()
    output = Output(thinking=False)
    request = Request(f"{gateway[:16]}{index:016x}", gateway, 0, time.time(), load.sampling, output)
    return Generate(request, pack_ids(prompt), load.generated, ())


def main() -> int:
    passage = asyncio.run(run(msgspec.json.decode(sys.argv[1], type=Load)))
    print(msgspec.json.encode(passage).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
