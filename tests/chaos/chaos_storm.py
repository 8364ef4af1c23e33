"""One seed of chaos: clients of all kinds at work while faults are injected, and what may not follow from it.

    python -m chaos_storm --seeds 10 --seconds 60 [--first-seed 1] [--clients 64] [--ranks 2]

`make chaos SEEDS=n SECONDS=s` runs this; the last line is the totals. With RANKS=2 engines are two processes each.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from chaos_client import Broken, Client, Manner
from chaos_faults import Faults
from chaos_leftovers import wait_until_clean
from chaos_model import write_model
from chaos_quiet import ONE_OF_EACH, Answered, quiet_answers
from chaos_requests import Ask, files_to_serve, pool
from chaos_system import REQUEST_TIMEOUT_S, SEGMENTS, System, running
from chaos_tenants import write_key_file
from machine import PATIENCE_S
from redis.exceptions import RedisError
from system import file_server

from shared.errors import MillraceError

TWO_OF_EACH = dict.fromkeys(ONE_OF_EACH, 2)
POOL = 44  # requests
FAULTS_EVERY_S = (0.5, 3.0)
HTTP = httpx.Timeout(30.0, connect=2.0)


@dataclass
class Totals:
    """Outcome of a run."""

    seeds: int = 0
    requests: int = 0
    connections: int = 0
    resumed: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    story: list[str] = field(default_factory=list)  # of the last seed: what was done when
    longest_silence_s: float = 0.0

    def line(self) -> str:
        """The closing line."""
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.faults.items())) or "none"
        return (
            f"chaos: {self.seeds} seeds, {self.faults.total()} faults ({kinds}), {self.requests} requests checked over "
            f"{self.connections} connections ({self.resumed} resumed), longest silence {self.longest_silence_s:.1f} s, "
            f"{len(self.failures)} failures"
        )


class World:
    """The pool of requests, with the answers of a system in which nothing goes wrong."""

    def __init__(self, model: Path, answered: Answered) -> None:
        self.model = model
        self.answered = answered
        self.asks = [ask for ask, _ in answered]
        self.expected = {ask.number: answer for ask, answer in answered}


async def quiet_world(directory: Path, files: str, size: int = POOL) -> World:
    """Write the checkpoint, and ask for everything once."""
    model = directory / "model"
    return World(model, await quiet_answers(directory / "quiet", model, pool(size, write_model(model), files)))


class Storm:
    """One seed."""

    def __init__(self, world: World, seed: int, system: System, clients: int) -> None:
        self._world = world
        self._seed = seed
        self._system = system
        self._clients = clients
        self._rng = random.Random(f"faults {seed}")
        self.totals = Totals(seeds=1)

    async def blow(self, seconds: float, every_s: tuple[float, float] = FAULTS_EVERY_S) -> Totals:
        """Clients for `seconds`, then all is mended, and what is left is looked for."""
        faults = Faults(self._system, self._rng, every_s)
        injecting = asyncio.create_task(faults.run())
        async with httpx.AsyncClient(
            timeout=HTTP, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)
        ) as http:
            until = time.monotonic() + seconds
            workers = [asyncio.create_task(self._work(http, number, until)) for number in range(self._clients)]
            await asyncio.wait([injecting, *workers], timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
            injecting.cancel()
            await asyncio.wait([injecting])
            try:
                if not injecting.cancelled():
                    injecting.result()
                await faults.mend()
            except (AssertionError, OSError, RedisError, MillraceError) as error:
                self._fail(f"mending: {error}")
            await asyncio.gather(*workers)
        left = await wait_until_clean(self._system, PATIENCE_S, uploads=not faults.gateways_killed)
        if left:
            self._fail(f"left behind: {'; '.join(left[:20])}")
        self.totals.faults += faults.injected
        self.totals.story = faults.story
        return self.totals

    async def _work(self, http: httpx.AsyncClient, number: int, until: float) -> None:
        rng = random.Random(f"client {self._seed} {number}")
        turn = 0
        while time.monotonic() < until:
            ask = rng.choice(self._world.asks)
            await self._one(http, ask, rng, f"{self._seed}-{number}-{turn}")
            turn += 1

    async def _one(self, http: httpx.AsyncClient, ask: Ask, rng: random.Random, key: str) -> None:
        told = await asyncio.gather(*(self._check(http, ask, manner, rng) for manner in _manners(rng, key)))
        for wrong in filter(None, told):
            self._fail(wrong)

    async def _check(self, http: httpx.AsyncClient, ask: Ask, manner: Manner, rng: random.Random) -> str:
        """Return what was wrong, "" if nothing was."""
        client = Client(http, self._gateways, rng)
        expected = self._world.expected[ask.number]
        try:
            got = await client.ask(ask, manner, REQUEST_TIMEOUT_S)
        except Broken as broken:
            wrong = str(broken)
        else:
            # Who goes on with a stream gets its usage if the first request asked for it, which may not have been ours.
            whole = manner.leaves_after is None
            wrong = got.differs(expected, usage_asked=not manner.shared) if whole else got.begins(expected)
        self.totals.requests += 1
        self.totals.connections += client.connections
        self.totals.resumed += client.resumed
        self.totals.longest_silence_s = max(self.totals.longest_silence_s, client.longest_silence_s)
        return f"request {ask.number} ({ask.kind}, {manner}): {wrong}" if wrong else ""

    def _gateways(self) -> list[str]:
        return [gateway.url for gateway in self._system.of("gateway")]

    def _fail(self, what: str) -> None:
        self.totals.failures.append(f"seed {self._seed}: {what}")


def _manners(rng: random.Random, key: str) -> list[Manner]:
    """Choose how a request is made: by one client, or by two with one key."""
    match rng.choices(["plain", "keyed", "leaves", "breaks", "twice"], weights=[4, 3, 1, 2, 1])[0]:
        case "plain":
            return [Manner(stream=rng.random() < 0.7)]
        case "keyed":
            return [Manner(stream=rng.random() < 0.7, key=key)]
        case "leaves":
            return [Manner(leaves_after=rng.randint(1, 30))]
        case "breaks":
            return [Manner(key=key, breaks_after=rng.randint(1, 30))]
        case _:
            return [Manner(stream=rng.random() < 0.7, key=key, shared=True) for _ in range(2)]


async def storm(
    directory: Path,
    world: World,
    seed: int,
    seconds: float,
    clients: int,
    replicas: Mapping[str, int] = TWO_OF_EACH,
    ranks: int = 1,
) -> Totals:
    """A system of its own for one seed; its logs stay in `directory`.

    Clients of two replicas are tenants. Embeddings of even seeds are handed over in segments.
    """
    gateway = {"api_keys_file": write_key_file(directory)} if replicas["gateway"] > 1 else {}
    segments = {"segments_dir": str(directory / SEGMENTS)} if seed % 2 == 0 else {}
    engine = {"tensor_parallel_size": ranks, **segments}
    async with running(directory, world.model, replicas, gateway=gateway, engine=engine, mm_encoder=segments) as system:
        return await Storm(world, seed, system, clients).blow(seconds)


async def storms(first_seed: int, seeds: int, seconds: float, clients: int, keep: Path, ranks: int) -> Totals:
    """Seeds one after another, each reported as it ends."""
    total = Totals()
    with file_server(files_to_serve()) as files:
        world = await quiet_world(keep, files)
        for seed in range(first_seed, first_seed + seeds):
            # Odd seeds have one replica of each service, which must be enough.
            replicas = TWO_OF_EACH if seed % 2 == 0 else ONE_OF_EACH
            one = await storm(keep / f"seed-{seed}", world, seed, seconds, clients, replicas, ranks)
            total = _sum(total, one)
            print(f"seed {seed}: {one.line()}", flush=True)
            if one.failures:
                print("\n".join(["  faults:", *one.story, *one.failures]), flush=True)
                print(f"  again: {replay(seed, seconds, clients, ranks)}; logs in {keep / f'seed-{seed}'}", flush=True)
    return total


def replay(seed: int, seconds: float, clients: int, ranks: int = 1) -> str:
    """Return the command that runs one seed again."""
    command = f"make chaos POINTS=none SEEDS=1 FIRST_SEED={seed} SECONDS={seconds:g} CLIENTS={clients}"
    return command if ranks == 1 else f"{command} RANKS={ranks}"


def _sum(a: Totals, b: Totals) -> Totals:
    return Totals(
        a.seeds + b.seeds,
        a.requests + b.requests,
        a.connections + b.connections,
        a.resumed + b.resumed,
        a.faults + b.faults,
        a.failures + b.failures,
        b.story,
        max(a.longest_silence_s, b.longest_silence_s),
    )


def main() -> int:
    """Returns the exit status: 0 if nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="of load, a seed")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=1, help="processes of an engine")
    args = parser.parse_args()
    keep = Path(tempfile.mkdtemp(prefix="millrace-chaos-"))
    total = asyncio.run(storms(args.first_seed, args.seeds, args.seconds, args.clients, keep, args.ranks))
    print(total.line())
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
