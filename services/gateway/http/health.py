"""Readiness of the pipeline: every stage has a replica that is ready."""

from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.gateway.http.admission import Admission
from shared.bus.keys import Keys
from shared.bus.leases import live

STAGES = ("mm_encoder", "engine", "postproc")


async def readiness(redis: Redis, keys: Keys, admission: Admission) -> dict[str, Any]:
    """Report `status` ("ready" or "unavailable"), `missing` parts, and `stages` with the number of ready replicas."""
    missing = ["gateway"] if admission.draining else []
    stages: dict[str, int] = {}
    try:
        for stage in STAGES:
            stages[stage] = await _count_ready(redis, keys, stage)
            if not stages[stage]:
                missing.append(stage)
    except RedisError:
        missing.append("redis")
    return {"status": "unavailable" if missing else "ready", "missing": missing, "stages": stages}


async def _count_ready(redis: Redis, keys: Keys, stage: str) -> int:
    return sum(replica.state == "ready" for replica in await live(redis, keys, stage))
