"""Whether one replica is well, judged from outside its process by its lease in Redis.

A lease is renewed by the service's event loop, so one that has expired tells of a loop that has not turned for
`lease_ms`, and the state in it is the service's own word.
"""

import asyncio
from collections.abc import Mapping
from enum import StrEnum

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from shared import config
from shared.bus.client import command, connect
from shared.bus.keys import Keys
from shared.bus.leases import Replica
from shared.config import CommonSettings
from shared.errors import ConfigError, ProtocolError

ANSWER_S = 3.0  # for Redis to answer; a probe's own timeout must be longer


class Probe(StrEnum):
    """What can be asked. `live`: would a restart help? `ready`: does it take work?"""

    LIVE = "live"
    READY = "ready"


def probe_settings(environ: Mapping[str, str]) -> CommonSettings:
    """What all services share, out of the environment of one.

    Raises:
        ConfigError: a setting is missing or malformed, or the replica's name is left to the process, which we are not.
    """
    known = {config.variable(field) for field in CommonSettings.__struct_fields__}
    name = config.variable("name")
    if not environ.get(name):
        raise ConfigError(f"{name} must be set, to the name of the replica to look at")
    return config.load(CommonSettings, {key: value for key, value in environ.items() if key in known})


async def look(settings: CommonSettings, service: str, probe: Probe, answer_s: float = ANSWER_S) -> str | None:
    """What is wrong with the replica, or None.

    Raises:
        ConfigError: the URL of Redis is malformed.
    """
    redis = connect(settings.redis_url)
    try:
        async with asyncio.timeout(answer_s):
            return judge(await _lease(redis, settings, service), probe)
    except (RedisError, OSError, TimeoutError) as error:
        # Nothing can be said of the replica, and restarting it would not mend Redis: it waits for Redis as it is.
        return None if probe is Probe.LIVE else f"Redis does not answer ({type(error).__name__})"
    except ProtocolError as error:
        return str(error)
    finally:
        await redis.aclose()


def judge(lease: Replica | None, probe: Probe) -> str | None:
    """What is wrong with a replica that has this lease, or None."""
    if lease is None:
        return "there is no lease: the event loop has stopped, or has not begun"
    if probe is Probe.READY and lease.state != "ready":
        return f"the replica is {lease.state}"
    return None


async def _lease(redis: Redis, settings: CommonSettings, service: str) -> Replica | None:
    status = await command(redis, "GET", Keys(settings.namespace).replica(service, settings.name))
    try:
        return None if status is None else msgspec.json.decode(status, type=Replica)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"unreadable lease: {error}") from error
