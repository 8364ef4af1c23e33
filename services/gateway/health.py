"""Whether the pipeline can take work: every stage has a replica that says it is ready."""

from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from shared.keys import Keys
from shared.leases import live

STAGES = ("mm_encoder", "engine", "postproc")


async def readiness(redis: Redis, keys: Keys, draining: bool) -> dict[str, Any]:
    """`status` is "ready" or "unavailable"; `missing` says what is not there, `stages` how many replicas are ready."""
    missing = ["gateway"] if draining else []
    stages: dict[str, int] = {}
    try:
        for stage in STAGES:
            replicas = await live(redis, keys, stage)
            stages[stage] = sum(replica.state == "ready" for replica in replicas)
            if not stages[stage]:
                missing.append(stage)
    except RedisError:
        missing.append("redis")
    return {"status": "unavailable" if missing else "ready", "missing": missing, "stages": stages}
