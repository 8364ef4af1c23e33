"""Measure the longest silence of clients because of one fault: the figures of docs/guarantees.md.

    python -m chaos_pauses [--rounds 5] [--clients 8] [--only gateway]

Each round: clients stream long answers, one fault comes in the middle, and the longest gap between two events of a
client is noted. Two replicas of each service, unless the fault says "alone".
"""

import argparse
import asyncio
import os
import random
import statistics
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
from chaos_bombs import bombs, drop
from chaos_client import Broken, Client, Manner
from chaos_crash import Expected, by_kind
from chaos_garbage import strew
from chaos_model import write_model
from chaos_next_build import write_next_build
from chaos_quiet import ONE_OF_EACH, quiet_answers
from chaos_requests import pool
from chaos_rush import rush
from chaos_storm import TWO_OF_EACH
from chaos_system import REQUEST_TIMEOUT_S, ROOT, System, running
from machine import PATIENCE_S
from redis_refusals import REFUSALS

LONG = 2  # the place of "long" in the pool
ANSWER = 400  # tokens
LEASE_MS = 3000  # the default
DOWN_S = 1.0  # for which Redis is halted, or refuses


def nothing(system: System) -> None:
    """The gaps that are there anyway."""


def kill(service: str) -> Callable[[System], None]:
    def fault(system: System) -> None:
        """Of two replicas, one that has work."""
        replica = random.choice(system.of(service))
        replica.kill()
        replica.start()

    return fault


def terminate(service: str) -> Callable[[System], None]:
    return lambda system: random.choice(system.of(service)).terminate()


async def kill_redis(system: System) -> None:
    await system.restart_redis(0)


async def halt_redis(system: System) -> None:
    await system.pause_redis(DOWN_S)


async def halt_engine(system: System) -> None:
    """For longer than its lease, so that the other one takes over."""
    engine = random.choice(system.of("engine"))
    engine.pause()
    await asyncio.sleep(2 * LEASE_MS / 1000)
    engine.wake()


def refuse(code: str) -> Callable[[System], Awaitable[None]]:
    return lambda system: system.refuse(code, DOWN_S)


async def fail_over(system: System) -> None:
    await system.fail_over()


async def swallow(system: System) -> None:
    system.proxy.swallow()


async def strew_garbage(system: System) -> None:
    await strew(system, random.Random(0))


async def rush_in(system: System) -> None:
    await rush(random.choice(system.of("gateway")).url, random.Random(0))


async def drop_bombs(system: System) -> None:
    await asyncio.gather(*(drop(random.choice(system.of("gateway")).url, part) for part in bombs()))


async def next_build_of_engine(system: System) -> None:
    """In place of one of two; and back."""
    [engine, _] = system.of("engine")
    for root in (write_next_build(system.directory / f"next-{engine.started}"), ROOT):
        engine.terminate()
        await engine.ended(PATIENCE_S)
        engine.root = root
        engine.start()
        await system.ready([engine])


Fault = Callable[[System], Awaitable[None] | None]
FAULTS: dict[str, tuple[dict[str, int], Fault]] = {
    "nothing": (TWO_OF_EACH, nothing),
    **{f"kill -9 of 1 of 2 {name}": (TWO_OF_EACH, kill(name)) for name in ("gateway", "engine", "postproc")},
    **{f"kill -9 of the only {name}": (ONE_OF_EACH, kill(name)) for name in ("gateway", "engine", "postproc")},
    **{f"SIGTERM of 1 of 2 {name}": (TWO_OF_EACH, terminate(name)) for name in ("engine", "postproc")},
    "kill -9 of Redis": (TWO_OF_EACH, kill_redis),
    "SIGSTOP of 1 of 2 engines": (TWO_OF_EACH, halt_engine),
    "SIGSTOP of Redis for 1 s": (TWO_OF_EACH, halt_redis),
    **{f"Redis refuses for 1 s: {code}": (TWO_OF_EACH, refuse(code)) for code in sorted(REFUSALS)},
    "failover of Redis": (TWO_OF_EACH, fail_over),
    "half-open links to Redis": (TWO_OF_EACH, swallow),
    "garbage in every stream": (TWO_OF_EACH, strew_garbage),
    "60 that ask and are gone": (TWO_OF_EACH, rush_in),
    "4 media bombs": (TWO_OF_EACH, drop_bombs),
    "1 of 2 engines of the next build": (TWO_OF_EACH, next_build_of_engine),
}


async def one_round(system: System, expected: Expected, fault: Fault, clients: int) -> list[float]:
    """The longest silence of each client."""
    ask, answer = expected["long"]
    async with httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_keepalive_connections=0)) as http:
        each = [Client(http, lambda: [g.url for g in system.of("gateway")], random.Random(n)) for n in range(clients)]
        asking = [asyncio.create_task(client.ask(ask, Manner(), REQUEST_TIMEOUT_S)) for client in each]
        await asyncio.sleep(1.5)
        if (injected := fault(system)) is not None:
            await injected
        for got in await asyncio.gather(*asking):
            if wrong := got.differs(answer):
                raise Broken(wrong)
    for replica in system.replicas:
        await replica.ended(0.5)
        if not replica.running:
            replica.start()
    await system.ready(system.replicas)
    return [client.longest_silence_s for client in each]


async def measure(rounds: int, clients: int, only: str, directory: Path) -> None:
    asks = pool(LONG + 1, write_model(directory / "model"), "")[LONG:]
    asks[0].body["max_tokens"] = ANSWER
    expected = by_kind(await quiet_answers(directory / "quiet", directory / "model", asks))
    settings: dict[str, Any] = {"all": {"lease_ms": LEASE_MS}, "engine": {"num_gpu_blocks_override": 512}}
    for number, replicas in enumerate((TWO_OF_EACH, ONE_OF_EACH)):
        faults = {name: fault for name, (needed, fault) in FAULTS.items() if needed == replicas and only in name}
        if not faults:
            continue
        async with running(directory / str(number), directory / "model", replicas, **settings) as system:
            for name, fault in faults.items():
                gaps = [gap for _ in range(rounds) for gap in await one_round(system, expected, fault, clients)]
                median, longest, load = statistics.median(gaps), max(gaps), os.getloadavg()[0]
                print(f"{name:36} median {median:5.2f} s, longest {longest:5.2f} s, load {load:4.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--only", default="", help="faults with this in their names")
    args = parser.parse_args()
    asyncio.run(measure(args.rounds, args.clients, args.only, Path(tempfile.mkdtemp(prefix="millrace-pauses-"))))


if __name__ == "__main__":
    main()
