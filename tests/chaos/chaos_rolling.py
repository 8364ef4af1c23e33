"""Clients that never come back, and replicas that are replaced one by one, as a Deployment does it."""

import asyncio
import random
from pathlib import Path

import httpx
from chaos_client import Broken, Client, Manner
from chaos_storm import World
from chaos_system import REQUEST_TIMEOUT_S, ROOT, Replica, System
from machine import PATIENCE_S

CLIENTS = 6


class Load:
    """Clients that ask one thing after another, and take the first connection's word for it unless it `may_break`."""

    may_break = False

    def __init__(self, world: World, http: httpx.AsyncClient, gateways: list[str]) -> None:
        self._world = world
        self._http = http
        self._gateways = gateways
        self.answered = 0
        self.failures: list[str] = []
        self.over = False

    async def ask(self, number: int) -> None:
        rng = random.Random(number)
        while not self.over:
            ask = rng.choice(self._world.asks)
            client = Client(self._http, lambda: self._gateways, rng)
            try:
                got = await client.ask(ask, Manner(stream=rng.random() < 0.7), REQUEST_TIMEOUT_S)
            except Broken as broken:
                self.failures.append(f"{ask.kind}: {broken}")
                continue
            if wrong := got.differs(self._world.expected[ask.number]):
                self.failures.append(f"{ask.kind}: {wrong}")
            if client.connections != 1 and not self.may_break:
                self.failures.append(f"{ask.kind}: took {client.connections} connections")
            self.answered += 1

    async def some_more(self) -> None:
        """Return when all clients may have had an answer since."""
        enough = self.answered + CLIENTS
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            while self.answered < enough and not self.failures:  # noqa: ASYNC110  # nobody tells of it
                await asyncio.sleep(0.05)


async def begin_beside(system: System, replica: Replica, gateways: list[str], root: Path = ROOT) -> None:
    """Start a new pod, of the sources in `root`, beside one that will go, and have clients ask there."""
    extra = system.add(replica.service)
    extra.root = root
    extra.start()
    await system.ready([extra])
    if replica.service == "gateway":
        gateways.append(extra.url)
        gateways.remove(replica.url)


async def replace(system: System, replica: Replica, gateways: list[str], root: Path = ROOT) -> None:
    """A new pod, of the sources in `root`, is ready before the old one goes."""
    await begin_beside(system, replica, gateways, root)
    replica.terminate()
    assert await replica.ended(PATIENCE_S) == 0, replica.tail()
    system.replicas.remove(replica)
