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
from services.gateway.inflight.field_check import FieldCheck
from services.gateway.tenants.key_file import Tenant
from shared.bus.keys import GENERATE, Keys
from shared.bus.leases import Lease
from shared.bus.records import Records
from shared.errors import RequestError
from shared.message_fields import GENERATION, generation_of
from shared.messages import Generate, Grammar, Output, Request, Sampling

PLAIN, GUIDED = Sampling(seed=1), Sampling(seed=1, grammar=Grammar("x", "response_format"))
STAGES = ("mm_encoder", "engine", "postproc")
HOUR_MS = 3_600_000
QUESTION = {"model": "demo-model", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
OBJECT = {"response_format": {"type": "json_object"}}


def asking(sampling: Sampling, cache_salt: str = "") -> Generate:
    """Return a request without a prompt."""
    return Generate(Request("r", "gw", 0, 0.0, sampling, Output(thinking=False), cache_salt=cache_salt), b"", 1)


async def write_lease(redis: Redis, keys: Keys, service: str, name: str, more: Mapping[str, Any]) -> None:
    """Write the lease of a replica of another build."""
    status = {"service": service, "name": name, "state": "ready", **more}
    await redis.sadd(keys.replicas(service), name)
    await redis.set(keys.replica(service, name), json.dumps(status))


async def refused(check: FieldCheck, sampling: Sampling) -> str:
    """Return the code of the refusal; empty if there is none."""
    try:
        await check.check(asking(sampling))
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
    assert await refused(check, GUIDED) == "", "nobody knows in which build who sleeps will wake"
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


@pytest.mark.usefixtures("no_caching")
@pytest.mark.parametrize(("stage", "code"), [(STAGES[0], ""), (STAGES[1], ""), (STAGES[2], "upgrade_under_way")])
async def test_an_older_replica_that_drains_counts_where_it_may_meet_a_new_request(
    redis: Redis, keys: Keys, stage: str, code: str
) -> None:
    check = FieldCheck(redis, keys)
    await write_lease(redis, keys, stage, "old", {"state": "draining"})
    assert await refused(check, GUIDED) == code
    await write_lease(redis, keys, stage, "old", {"state": "starting"})
    assert await refused(check, GUIDED) == "upgrade_under_way"


@pytest.mark.parametrize("given", ["", "mine", "mine="])
@pytest.mark.parametrize("tenant", [None, Tenant(name="a.b", hashes=())])
def test_a_salt_that_the_client_stated_is_no_tenant_s(tenant: Tenant | None, given: str) -> None:
    salt = given if tenant is None else tenant.salt(given)
    assert generation_of(asking(PLAIN, salt)) == ((1, ["cache_salt"]) if given else (0, []))


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


async def status_of(http: httpx.AsyncClient, key: str, **body: Any) -> tuple[int, str | None]:
    """Return the status of a streamed request with an Idempotency-Key, and its code. Its answer is not read."""
    asked = {**QUESTION, **OBJECT, "stream": True, **body}
    async with http.stream("POST", "/v1/chat/completions", json=asked, headers={"Idempotency-Key": key}) as answer:
        code = None if answer.status_code == 200 else json.loads(await answer.aread())["error"]["code"]
        return answer.status_code, code


@pytest.mark.usefixtures("no_caching")
async def test_what_was_accepted_before_is_repeated_beside_an_older_replica(
    server: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as http:
        assert await status_of(http, "a") == (200, None)
        request = await stages.request()
        await write_lease(redis, keys, "engine", "old", {})
        assert await status_of(http, "a") == (200, None), "it runs"
        assert await status_of(http, "a", max_tokens=4) == (409, "idempotency_key_reused")
        assert await status_of(http, "b") == (503, "upgrade_under_way")
        await stages.keep(request)
        assert await status_of(http, "a") == (200, None), "its answer is kept"
        await Records(redis, keys).delete([request.id])
        assert await status_of(http, "a") == (503, "upgrade_under_way"), "it would run again"
        assert await redis.xlen(keys.stream(GENERATE)) == 1
        await redis.delete(keys.replica("engine", "old"))
        assert await status_of(http, "a") == (200, None)
        assert (await stages.request()).id != request.id


@pytest.mark.parametrize(
    "damaged", [b"{", b"\xff", b'{"body_hash":"\xff","request_ids":["r"]}', b'{"body_hash":"b","request_ids":[]}']
)
async def test_a_key_that_is_damaged_names_nothing(redis: Redis, keys: Keys, damaged: bytes) -> None:
    records = Records(redis, keys)
    await redis.set(keys.idempotency("d"), damaged)
    assert await records.earlier("d") is None
    await redis.delete(keys.idempotency("d"))
    await redis.rpush(keys.idempotency("d"), damaged)
    assert await records.earlier("d") is None
