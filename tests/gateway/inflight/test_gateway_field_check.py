"""Beside a replica of an older build, what it would serve as something else is refused, and nothing besides."""

import json
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from gateway_stages import Running, Stages
from machine import PATIENCE_S
from redis.asyncio import Redis

from services.gateway.inflight import field_check
from services.gateway.inflight.field_check import STAGES, FieldCheck
from shared.bus.keys import Keys
from shared.bus.leases import Lease
from shared.errors import RequestError
from shared.message_fields import GENERATION
from shared.messages import Grammar, Output, Sampling

PLAIN, GUIDED = Sampling(seed=1), Sampling(seed=1, grammar=Grammar("x", "response_format"))
OUTPUT = Output(thinking=False)
HOUR_MS = 3_600_000
QUESTION = {"model": "demo-model", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
OBJECT = {"response_format": {"type": "json_object"}}


async def write_lease(redis: Redis, keys: Keys, service: str, name: str, more: Mapping[str, Any]) -> None:
    """Write the lease of a replica of another build."""
    status = {"service": service, "name": name, "state": "ready", **more}
    await redis.sadd(keys.replicas(service), name)
    await redis.set(keys.replica(service, name), json.dumps(status))


async def refused(check: FieldCheck, sampling: Sampling) -> str:
    """Return the code of the refusal; empty if there is none."""
    try:
        await check.check(sampling, OUTPUT)
    except RequestError as error:
        return error.failure.code or ""
    return ""


@pytest.fixture
def no_caching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(field_check, "FRESH_S", 0.0)


@pytest.mark.usefixtures("no_caching")
@pytest.mark.parametrize("stage", STAGES)
async def test_one_older_replica_of_any_stage_is_enough(redis: Redis, keys: Keys, stage: str) -> None:
    check = FieldCheck(redis, keys)
    assert await refused(check, GUIDED) == "", "who sleeps wakes in the newest build"
    for service in STAGES:
        await Lease(redis, keys, service, "new", HOUR_MS).renew("ready")
    assert await refused(check, GUIDED) == ""
    await write_lease(redis, keys, stage, "old", {})
    assert await refused(check, GUIDED) == "upgrade_under_way"
    assert await refused(check, PLAIN) == ""
    await write_lease(redis, keys, stage, "old", {"fields": GENERATION + 1})
    assert await refused(check, GUIDED) == "", "one of a later build"
    await redis.set(keys.replica(stage, "old"), "damaged")
    assert await refused(check, GUIDED) == ""


async def test_leases_are_looked_at_once_for_all_who_ask_within_a_moment(redis: Redis, keys: Keys) -> None:
    now = 0.0
    check = FieldCheck(redis, keys, lambda: now)
    assert await refused(check, GUIDED) == ""
    await write_lease(redis, keys, "engine", "old", {})
    assert await refused(check, GUIDED) == ""
    now = field_check.FRESH_S
    assert await refused(check, GUIDED) == "upgrade_under_way"


@pytest.mark.usefixtures("no_caching")
async def test_a_client_is_told_to_ask_again(server: Running, stages: Stages, redis: Redis, keys: Keys) -> None:
    await write_lease(redis, keys, "engine", "old", {})
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as http:
        answer = await http.post("/v1/chat/completions", json={**QUESTION, **OBJECT})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "upgrade_under_way")
        assert "grammar" in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) > 0
        for body in (QUESTION, {**QUESTION, **OBJECT}):
            async with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
                assert answer.status_code == 200
                request = await stages.request()
                assert (request.sampling.grammar is None) == (body is QUESTION)
            await redis.delete(keys.replica("engine", "old"))
