"""An upgrade to a build with another version of the messages, and back, under load: nobody loses anything.

On the way back all newer replicas are killed at once, as soon as older ones are ready; with CHAOS_ALL=1 (as in
`make chaos`) also replaced one by one.
"""

import asyncio
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest
from chaos_leftovers import wait_until_clean
from chaos_next_build import write_next_build
from chaos_quiet import ONE_OF_EACH
from chaos_rolling import CLIENTS, Load, begin_beside, replace
from chaos_storm import World
from chaos_system import LOOK_S, ROOT, SERVICES, System, running
from machine import PATIENCE_S

pytestmark = pytest.mark.slow
ALL = bool(os.environ.get("CHAOS_ALL"))


async def written(system: System, version: int) -> None:
    """Return when engines write tokens in this version."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            for shard in range(2):
                newest: Any = await system.redis.xrevrange(system.keys.tokens(shard), count=1)
                if newest and newest[0][1][b"v"] == b"%d" % version:
                    return
            await asyncio.sleep(LOOK_S)


async def roll(system: System, load: Load, gateways: list[str], root: Path, order: Iterable[str]) -> None:
    """Replace all replicas, one after the other, by ones of the sources in `root`."""
    for service in order:
        for replica in system.of(service):
            await replace(system, replica, gateways, root)
            await load.some_more()


async def kill_all(system: System, load: Load, gateways: list[str]) -> None:
    """Kill all replicas at once, when others of these sources are ready."""
    load.may_break = True
    killed = list(system.replicas)
    await asyncio.gather(*(begin_beside(system, replica, gateways) for replica in killed))
    for replica in killed:
        replica.kill()
        system.replicas.remove(replica)
    await load.some_more()


LEASE_MS = 1500  # where one lapses although its replica lives, others believe that nobody writes the newer version


@pytest.mark.parametrize("killed", [True, pytest.param(False, marks=pytest.mark.skipif(not ALL, reason="CHAOS_ALL"))])
async def test_an_upgrade_by_one_version_and_back_loses_nothing(world: World, tmp_path: Path, killed: bool) -> None:
    newer = write_next_build(tmp_path / "next")
    async with (
        running(tmp_path / "system", world.model, ONE_OF_EACH, all={"lease_ms": LEASE_MS, "drain_s": 200}) as system,
        httpx.AsyncClient(timeout=PATIENCE_S, limits=httpx.Limits(max_keepalive_connections=0)) as http,
    ):
        gateways = [gateway.url for gateway in system.of("gateway")]
        load = Load(world, http, gateways)
        clients = [asyncio.create_task(load.ask(number)) for number in range(CLIENTS)]
        await roll(system, load, gateways, newer, SERVICES)
        await written(system, 2)
        await load.some_more()
        if killed:
            await kill_all(system, load, gateways)
        else:
            await roll(system, load, gateways, ROOT, SERVICES[::-1])
        await written(system, 1)
        await load.some_more()
        load.over = True
        await asyncio.gather(*clients)
        assert not load.failures, "\n".join([*load.failures, system.tails()])
        assert await wait_until_clean(system, PATIENCE_S, uploads=not killed) == []
