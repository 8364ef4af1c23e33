"""A rolling restart of every service under load fails no request, whatever the client: nobody comes back here.

A gateway is taken off the list before it is told to end, as Kubernetes takes a pod out of its Service.
"""

import asyncio
from pathlib import Path

import httpx
from chaos_leftovers import wait_until_clean
from chaos_rolling import CLIENTS, Load, replace
from chaos_storm import TWO_OF_EACH, World
from chaos_system import SERVICES, running
from machine import PATIENCE_S


async def test_a_rolling_restart_of_every_service_fails_no_request(world: World, tmp_path: Path) -> None:
    drains = {"drain_s": 200}  # longer than any answer takes on a busy machine: who is not answered goes elsewhere
    async with (
        running(tmp_path / "system", world.model, TWO_OF_EACH, all=drains) as system,
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
        left = await wait_until_clean(system, PATIENCE_S)
        assert not left, "\n".join(left)
