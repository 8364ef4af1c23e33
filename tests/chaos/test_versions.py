"""An upgrade to a build with another version of the messages, and back, under load: nobody loses anything.

Not even where all newer replicas are killed on the way back, as soon as the older ones are ready.
"""

import asyncio
from pathlib import Path

import httpx
import pytest
from chaos_leftovers import wait_until_clean
from chaos_next_build import write_next_build
from chaos_rolling import CLIENTS, Load, begin_beside, replace
from chaos_storm import ONE_OF_EACH, World
from chaos_system import LOOK_S, ROOT, SERVICES, System, running
from machine import PATIENCE_S

pytestmark = pytest.mark.slow


async def written(system: System, version: int) -> None:
    """Return when engines write tokens in this version."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            for shard in range(2):
                newest = await system.redis.xrevrange(system.keys.tokens(shard), count=1)
                if newest and newest[0][1][b"v"] == b"%d" % version:
                    return
            await asyncio.sleep(LOOK_S)


async def test_an_upgrade_by_one_version_and_back_loses_nothing(world: World, tmp_path: Path) -> None:
    newer = write_next_build(tmp_path / "next")
    async with (
        running(tmp_path / "system", world.model, ONE_OF_EACH, all={"lease_ms": 800, "drain_s": 200}) as system,
        httpx.AsyncClient(timeout=PATIENCE_S, limits=httpx.Limits(max_keepalive_connections=0)) as http,
    ):
        gateways = [gateway.url for gateway in system.of("gateway")]
        load = Load(world, http, gateways)
        clients = [asyncio.create_task(load.ask(number)) for number in range(CLIENTS)]
        for version, root, order in ((2, newer, SERVICES), (1, ROOT, SERVICES[::-1])):
            for service in order:
                for replica in system.of(service):
                    await replace(system, replica, gateways, root)
                    await load.some_more()
            await written(system, version)
            await load.some_more()
        load.over = True
        await asyncio.gather(*clients)
        assert not load.failures, "\n".join([*load.failures, system.tails()])
        assert await wait_until_clean(system, PATIENCE_S) == []


async def test_a_rollback_in_which_every_newer_replica_is_killed_loses_nothing(world: World, tmp_path: Path) -> None:
    newer = write_next_build(tmp_path / "next")
    async with (
        running(tmp_path / "system", world.model, ONE_OF_EACH, root=newer, all={"lease_ms": 800}) as system,
        httpx.AsyncClient(timeout=PATIENCE_S, limits=httpx.Limits(max_keepalive_connections=0)) as http,
    ):
        gateways = [gateway.url for gateway in system.of("gateway")]
        load = Load(world, http, gateways, may_break=True)
        clients = [asyncio.create_task(load.ask(number)) for number in range(CLIENTS)]
        await written(system, 2)
        await load.some_more()
        killed = list(system.replicas)
        await asyncio.gather(*(begin_beside(system, replica, gateways) for replica in killed))
        for replica in killed:
            replica.kill()
            system.replicas.remove(replica)
        await load.some_more()
        await written(system, 1)
        load.over = True
        await asyncio.gather(*clients)
        assert not load.failures, "\n".join([*load.failures, system.tails()])
        assert await wait_until_clean(system, PATIENCE_S, uploads=False) == []
