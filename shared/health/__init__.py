"""Health of one replica, judged from outside its process by its lease in Redis.

The service's event loop renews the lease, so an expired lease means a loop that has been blocked for `lease_ms`; the
state in the lease is the service's own.
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
    """Kind of probe. `live`: would a restart help? `ready`: does the replica accept work?"""

    LIVE = "live"
    READY = "ready"


def probe_settings(environ: Mapping[str, str]) -> CommonSettings:
    """Load the common settings from the environment of one service.

    Raises:
        ConfigError: a setting is missing or malformed, or the replica's name, which defaults to its process id, is not
            set.
    """
    known = {config.variable(field) for field in CommonSettings.__struct_fields__}
    name = config.variable("name")
    if not environ.get(name):
        raise ConfigError(f"{name} must be set, to the name of the replica to probe")
    return config.load(CommonSettings, {key: value for key, value in environ.items() if key in known})


async def look(settings: CommonSettings, service: str, probe: Probe, answer_s: float = ANSWER_S) -> str | None:
    """Return what is wrong with the replica, or None.

    Raises:
        ConfigError: the URL of Redis is malformed.
    """
    redis = connect(settings.redis_url)
    try:
        async with asyncio.timeout(answer_s):
            return judge(await _lease(redis, settings, service), probe)
    except (RedisError, OSError, TimeoutError) as error:
        # The state of the replica is unknown, and restarting it would not help Redis, for which it waits already.
        return None if probe is Probe.LIVE else f"Redis does not answer ({type(error).__name__})"
    except ProtocolError as error:
        return str(error)
    finally:
        await redis.aclose()


def judge(lease: Replica | None, probe: Probe) -> str | None:
    """Return what is wrong with a replica that has this lease, or None."""
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
