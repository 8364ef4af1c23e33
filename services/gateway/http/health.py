"""Whether the pipeline can take work: every stage has a replica that says it is ready."""

from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.gateway.http.admission import Admission
from shared.bus.keys import Keys
from shared.bus.leases import live
from shared.errors import ProtocolError

STAGES = ("mm_encoder", "engine", "postproc")


async def readiness(redis: Redis, keys: Keys, admission: Admission) -> dict[str, Any]:
    """`status` is "ready" or "unavailable"; `missing` says what is not there, `stages` how many replicas are ready."""
    missing = ["gateway"] if admission.draining else []
    stages: dict[str, int] = {}
    try:
        for stage in STAGES:
            stages[stage] = await _ready(redis, keys, stage)
            if not stages[stage]:
                missing.append(stage)
    except RedisError:
        missing.append("redis")
    return {"status": "unavailable" if missing else "ready", "missing": missing, "stages": stages}


async def _ready(redis: Redis, keys: Keys, stage: str) -> int:
    """Replicas that say they are ready; ones that speak another version's language do not work for us."""
    try:
        return sum(replica.state == "ready" for replica in await live(redis, keys, stage))
    except ProtocolError:
        return 0
