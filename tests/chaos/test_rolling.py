"""A rolling restart of every service under load fails no request, whatever the client: nobody comes back here.

A gateway is taken off the list before it is told to end, as Kubernetes takes a pod out of its Service.
"""

import asyncio
import random
from pathlib import Path

import httpx
from chaos_client import Broken, Client, Manner
from chaos_leftovers import wait_until_clean
from chaos_storm import TWO_OF_EACH, World
from chaos_system import REQUEST_TIMEOUT_S, SERVICES, Replica, System, running
from machine import PATIENCE_S

CLIENTS = 6


class Load:
    """Clients that ask one thing after another, and take the first connection's word for it."""

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
            if client.connections != 1:
                self.failures.append(f"{ask.kind}: took {client.connections} connections")
            self.answered += 1

    async def some_more(self) -> None:
        """Return when all clients may have had an answer since."""
        enough = self.answered + CLIENTS
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            while self.answered < enough and not self.failures:  # noqa: ASYNC110  # nobody tells of it
                await asyncio.sleep(0.05)


async def replace(system: System, replica: Replica, gateways: list[str]) -> None:
    """A new pod is ready before the old one goes."""
    extra = system.add(replica.service)
    extra.start()
    await system.ready([extra])
    if replica.service == "gateway":
        gateways.append(extra.url)
        gateways.remove(replica.url)
    replica.terminate()
    assert await replica.ended(PATIENCE_S) == 0, replica.tail()
    system.replicas.remove(replica)


async def test_a_rolling_restart_of_every_service_fails_no_request(world: World, tmp_path: Path) -> None:
    async with (
        running(tmp_path / "system", world.model, TWO_OF_EACH) as system,
        httpx.AsyncClient(timeout=PATIENCE_S, limits=httpx.Limits(max_keepalive_connections=0)) as http,
    ):
        gateways = [gateway.url for gateway in system.of("gateway")]
        load = Load(world, http, gateways)
        clients = [asyncio.create_task(load.ask(number)) for number in range(CLIENTS)]
        for service in SERVICES:
            for replica in system.of(service):
                await load.some_more()
                await replace(system, replica, gateways)
        await load.some_more()
        load.over = True
        await asyncio.gather(*clients)
        assert not load.failures, "\n".join([*load.failures, system.tails()])
        assert await wait_until_clean(system, PATIENCE_S) == []
