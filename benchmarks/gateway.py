"""Tenants at the gateway: what a flood of one does to another, and what limits and turns cost a request.

    python -m benchmarks.gateway [--flood 1000] [--samples 8] [--json out.json]

Gateway, postproc and Redis are as they ship; the engine has no model, `--slots` requests at a time, and gives each a
token every `--step-ms`. Two tables:
  fairness  time to the first token of a light tenant that sends one request at a time: alone, and while `--flood`
            requests of a heavy one wait; by arrival (no key file), and with turns at weights of 1:1 and 1:10
  cost      of the scripts: microseconds a request, as their caller waits and as Redis counts them, and Redis's commands
"Service" is the time that one request occupies the engine. Nothing is asserted.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from benchmarks.pipeline import NAMESPACE, System, free_port
from cli.demo import write_demo
from cli.redis_server import RedisServer
from services.gateway.tenants.key_file import Limits, Tenant, written_digest
from services.gateway.tenants.limiter import Ceilings, Limiter, Quota
from services.gateway.tenants.metrics import TenantMetrics
from shared.bus.client import connect
from shared.bus.keys import GENERATE, Keys
from shared.bus.ownership import Ended
from shared.bus.records import Records
from shared.bus.streams import send
from shared.bus.work_stream import Delivery, WorkStream
from shared.messages import Begin, Finish, Generate, Output, Request, Sampling, Share, TokenRun, Tokens
from shared.model.tokenizer import Tokenizer

TOKENS = 20  # of an answer
COST_ROUNDS = 2000


class Engine:
    """Stand-in for an engine: the work stream as it is, and a token a step for each request that runs."""

    def __init__(self, redis: Redis, keys: Keys, token: int, slots: int, step_s: float) -> None:
        self._redis = redis
        self._keys = keys
        self._token = token
        self._slots = slots
        self._step_s = step_s
        self._running: dict[str, tuple[Delivery, int, int]] = {}  # request id -> delivery, epoch, tokens
        self._stream = WorkStream(redis, keys, GENERATE, "engine", "bench", 3)

    async def run(self) -> None:
        """Serve until cancelled."""
        await self._redis.set(self._keys.replica("engine", "bench"), "{}")
        await self._stream.join()
        while True:
            started = time.monotonic()
            if free := self._slots - len(self._running):
                await self._begin(await self._stream.read_new(free, 0))
            await self._step()
            await asyncio.sleep(max(0.0, started + self._step_s - time.monotonic()))

    async def _begin(self, deliveries: list[Delivery]) -> None:
        epochs = await self._stream.ownership.raise_epochs([(d.entry_id, d.message.request.id) for d in deliveries])
        for delivery in deliveries:
            request = delivery.message.request
            if epoch := epochs.get(request.id):
                self._running[request.id] = delivery, epoch, 0
                await send(self._redis, self._keys.tokens(0), Tokens((Begin(request.id, epoch, 0, 9, 0, 0, 0),), ()))
            else:
                await self._stream.ownership.drop(delivery.entry_id, request.id)

    async def _step(self) -> None:
        runs, ended = [], []
        for request_id, (delivery, epoch, count) in self._running.items():
            finish = Finish("length") if count + 1 == TOKENS else None
            runs.append(TokenRun(request_id, epoch, count, (self._token,), None, finish))
            self._running[request_id] = delivery, epoch, count + 1
            if finish is not None:
                ended.append(Ended(delivery.entry_id, request_id, TOKENS))
        if runs:
            await send(self._redis, self._keys.tokens(0), Tokens((), tuple(runs)))
        for one in ended:
            del self._running[one.request_id]
        await self._stream.finish(ended)


async def ask(port: int, key: str) -> float:
    """Send a request, read its answer, and return the seconds until its first token."""
    payload = {"model": "m", "stream": True, "max_tokens": TOKENS, "messages": [{"role": "user", "content": "Hello"}]}
    body = json.dumps({**payload, "chat_template_kwargs": {"enable_thinking": False}})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nx-api-key: {key}\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    started = time.monotonic()
    first = 0.0
    try:
        writer.write((head + body).encode())
        async for line in reader:
            if not first and b'"content":"' in line and b'"content":""' not in line:
                first = time.monotonic() - started
            if line.startswith(b"data: [DONE]"):
                break
    finally:
        writer.close()
    if not first:
        raise SystemExit(f"a request of {key} had no answer")
    return first


@contextlib.asynccontextmanager
async def system(root: Path, model: Path, weights: tuple[float, float] | None, args: argparse.Namespace) -> Any:
    """Run gateway, postproc and engine on an empty Redis; without `weights` there is no key file."""
    settings = {"MILLRACE_MAX_QUEUE": "100000", "MILLRACE_TENANT_SHARE": "0.9"}
    if weights is not None:
        names = zip(("light", "heavy"), weights, strict=True)
        keys = [{"name": name, "weight": weight, "hashes": [written_digest(name)]} for name, weight in names]
        (root / "keys.json").write_text(json.dumps({"keys": keys}))
        settings["MILLRACE_API_KEYS_FILE"] = str(root / "keys.json")
    with RedisServer(root / "redis", port=free_port()) as server:
        made = await asyncio.to_thread(System, server, model, free_port(), 1, gateway=settings)
        redis = connect(server.url)
        token = Tokenizer.load(model).encode_text("a")[-1]
        engine = Engine(redis, Keys(NAMESPACE), token, args.slots, args.step_ms / 1000)
        running = asyncio.create_task(engine.run())
        try:
            await ask(made.port, "light")
            yield made
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await redis.aclose()
            await asyncio.to_thread(made.stop)


async def row(root: Path, model: Path, weights: tuple[float, float] | None, flood: int, args: Any) -> dict[str, float]:
    """Measure one row of the table of fairness."""
    root.mkdir()  # noqa: ASYNC240
    async with system(root, model, weights, args) as made:
        heavy = [asyncio.create_task(ask(made.port, "heavy")) for _ in range(flood)]
        async with flooded(made, flood):
            # By arrival, one request waits for the whole flood: there is no second sample of that.
            samples = 1 if weights is None else args.samples
            firsts = [await ask(made.port, "light") for _ in range(samples)]
        waiting = sum(not task.done() for task in heavy)
        for task in heavy:
            task.cancel()
        await asyncio.gather(*heavy, return_exceptions=True)
    milliseconds = sorted(1000 * first for first in firsts)
    return {"median_ms": statistics.median(milliseconds), "longest_ms": milliseconds[-1], "still_waiting": waiting}


@contextlib.asynccontextmanager
async def flooded(made: System, flood: int) -> AsyncIterator[None]:
    """Wait until half of the flood is in the queue."""
    redis = connect(made.redis_url)
    while flood and int(await redis.xlen(Keys(NAMESPACE).stream(GENERATE))) < flood / 2:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    await redis.aclose()
    yield


async def fairness(root: Path, model: Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure the table of fairness."""
    rows: dict[str, tuple[tuple[float, float] | None, int]] = {
        "alone": ((1, 1), 0),
        "beside a flood, weights 1:1": ((1, 1), args.flood),
        "beside a flood, light 1, heavy 10": ((1, 10), args.flood),
        "beside a flood, no key file": (None, args.flood),
    }
    found = {}
    for number, (name, (weights, flood)) in enumerate(rows.items()):
        found[name] = await row(root / str(number), model, weights, flood, args)
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    return found


async def cost(root: Path) -> dict[str, dict[str, float]]:
    """Measure the scripts, each by itself."""
    with RedisServer(root / "cost", port=free_port()) as server:
        redis, keys = connect(server.url), Keys(NAMESPACE)
        tenant = Tenant(
            name="t", hashes=(written_digest("t"),), limits=Limits(requests_per_min=10**9, tokens_per_min=10**12)
        )
        ceilings, metrics = Ceilings(10**9, 0, 0.5, 10**12), TenantMetrics(CollectorRegistry())
        limiter = Limiter(redis, keys, "g", ceilings, metrics, has_tenants=True)
        admitted: list[Any] = []

        async def admit(n: int) -> None:
            admitted.append(await limiter.admit(Quota(tenant), "m", (f"r{n}",), 100, 0))

        async def settle(n: int) -> None:
            limiter.end(admitted[n], 100, 100)
            await limiter.flush()

        found = {"limits: admit": await timed(redis, admit), "limits: settle": await timed(redis, settle)}
        for name, share in (("without turns", None), ("with turns", Share("t"))):
            found |= {f"{name}: {step}": value for step, value in (await work(redis, keys, share)).items()}
        await redis.aclose()
        return found


async def work(redis: Redis, keys: Keys, share: Share | None) -> dict[str, dict[str, float]]:
    """Measure submitting, reading and ending of requests, each read alone while others wait."""
    await redis.flushall()
    stream, records = WorkStream(redis, keys, GENERATE, "engine", "e", 3), Records(redis, keys)
    await stream.join()
    sampling, output = Sampling(seed=1), Output(thinking=False)
    taken: list[Delivery] = []

    async def submit(n: int) -> None:
        request = Request(f"r{n}", "g", 0, 0.0, sampling, output, share=share)
        await records.submit(GENERATE, Generate(request, bytes(400), 100))

    async def read(_n: int) -> None:
        taken.extend(await stream.read_new(1, 0))

    async def end(n: int) -> None:
        tokens = None if share is None else 100
        await stream.finish([Ended(taken[n].entry_id, taken[n].message.request.id, tokens)])

    return {"submit": await timed(redis, submit), "read": await timed(redis, read), "end": await timed(redis, end)}


async def timed(redis: Redis, call: Callable[[int], Any]) -> dict[str, float]:
    """Call it often; return microseconds a call as its caller waits and as Redis counts, and commands a call."""
    await redis.config_resetstat()
    started = time.perf_counter()
    for n in range(COST_ROUNDS):
        await call(n)
    waited = time.perf_counter() - started
    stats = await redis.info("commandstats")
    own = {name: values for name, values in stats.items() if "config" not in name and "info" not in name}
    outer = sum(values["usec"] for name, values in own.items() if name in ("cmdstat_evalsha", "cmdstat_xreadgroup"))
    calls = sum(values["calls"] for values in own.values())
    return {
        "waited_us": round(1e6 * waited / COST_ROUNDS, 1),
        "redis_us": round(outer / COST_ROUNDS, 1),
        "commands": round(calls / COST_ROUNDS, 1),
    }


async def measure(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Measure both tables."""
    model = root / "model"
    write_demo(model)
    service_ms = TOKENS * args.step_ms
    setup = {"slots": args.slots, "service_ms": service_ms, "flood": args.flood, "samples": args.samples}
    return {"setup": setup, "cost": await cost(root), "fairness": await fairness(root, model, args)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--flood", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--step-ms", type=float, default=50.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="millrace-gateway-") as directory:
        found = asyncio.run(measure(args, Path(directory)))
    text = json.dumps(found, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
