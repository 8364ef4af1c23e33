"""Tenants at a running gateway, with the real clients of both families of headers."""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import pytest
from gateway_stages import Running, Stages, running, until
from machine import PATIENCE_S
from redis.asyncio import Redis

from services.gateway.tenants import limiter
from services.gateway.tenants.key_file import written_digest
from shared.bus.keys import Keys
from shared.messages import Accepted, Delta, Encode, Generate, Usage, unpack_ids

T = TypeVar("T")

HI: list[Any] = [{"role": "user", "content": "Hi"}]
PICTURE = b"these bytes are no picture, which only an encoder would find"
DATA = base64.b64encode(PICTURE).decode()
LOOK = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{DATA}"}}]},
]
COUNTED = [
    {
        "role": "user",
        "content": [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}}],
    },
]


def write(path: Path, **tenants: dict[str, Any]) -> None:
    entries = [{"name": name, "hashes": [written_digest(f"key-of-{name}")], **rest} for name, rest in tenants.items()]
    path.write_text(json.dumps({"keys": entries}))


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    write(path, alice={"limits": {"requests_per_min": 2}}, bob={})
    return path


@pytest.fixture
async def server(
    checkpoint: Path, redis_url: str, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Running]:
    monkeypatch.setattr(limiter, "LEFT_S", 0.01)
    async with running(
        checkpoint, redis_url, api_keys=("key-1",), api_keys_file=str(key_file), max_concurrency=4
    ) as made:
        yield made


def ask(server: Running, who: str, **fields: Any) -> "asyncio.Task[Any]":
    client = server.client.with_options(api_key=f"key-of-{who}")
    return asyncio.create_task(client.chat.completions.with_raw_response.create(model="m", messages=HI, **fields))


async def test_a_limit_as_openais_client_sees_it(
    server: Running, stages: Stages, redis: Redis, keys: Keys, key_file: Path
) -> None:
    for left in ("1", "0"):
        asked = ask(server, "alice")
        await stages.answer(await stages.request(), "yes")
        reply = await asked
        assert reply.headers["x-ratelimit-remaining-requests"] == left
    with pytest.raises(openai.RateLimitError) as refused:
        await ask(server, "alice")
    assert refused.value.code == "rate_limit_exceeded"
    assert "'alice'" in refused.value.message
    headers = refused.value.response.headers
    assert headers.get_list("retry-after") == [headers["retry-after"]]
    assert 1 < int(headers["retry-after"]) <= 30
    await until(lambda: server.idle())
    await until_is(lambda: redis.hget(keys.tenant("alice"), "used:generated"), b"6")
    assert await redis.hlen(keys.tenant_open("alice")) == 0
    assert server.metric('millrace_key_tokens_total{key="alice",kind="generated"}') == 6

    write(key_file, alice={"limits": {"requests_per_min": 100}}, bob={})
    await until(lambda: server.metric('millrace_key_file_reloads_total{outcome="read"}') == 1)
    asked = ask(server, "alice")
    await stages.answer(await stages.request(), "yes")
    assert (await asked).headers["x-ratelimit-limit-requests"] == "100"


async def until_is(read: Callable[[], Awaitable[T]], value: T) -> None:
    """Ask until the answer is this value: Redis sets no event for it."""
    async with asyncio.timeout(PATIENCE_S):
        while await read() != value:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_keys_as_anthropics_clients_send_them(server: Running) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        for key, status in (("key-of-bob", 200), ("key-1", 200), ("key-of-nobody", 401), ("", 401)):
            assert (await client.get("/v1/models", headers={"x-api-key": key})).status_code == status
        both = {"x-api-key": "key-of-bob", "authorization": "Bearer no"}
        assert (await client.get("/v1/models", headers=both)).status_code == 401


async def test_every_refused_key_leaves_a_line_without_it(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
            for method in ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PATCH", "PUT"):
                reply = await client.request(method, "/v1/models", headers={"authorization": "Bearer secret-key"})
                assert reply.status_code == 401
            await client.get("/nowhere")
            assert (await client.get("/health/live")).status_code == 200
    lines = [record.__dict__ for record in caplog.records if record.msg == "API key refused"]
    assert [(line["method"], line["path"], line["reason"]) for line in lines[-2:]] == [
        ("PUT", "/v1/models", "unknown"),
        ("GET", "/nowhere", "missing"),
    ]
    assert len(lines) == 8
    assert all(line["client"] == "127.0.0.1" and line["request_id"] for line in lines)
    assert "secret" not in str(lines)
    assert server.metric('millrace_unauthorized_requests_total{reason="unknown"}') == 7


async def test_a_tenant_takes_its_share_of_a_gateway_and_others_the_rest(server: Running, stages: Stages) -> None:
    flood = [ask(server, "bob") for _ in range(2)]
    requests = [await stages.request(), await stages.request()]
    with pytest.raises(openai.RateLimitError, match="tenant_share"):
        await ask(server, "bob")
    light = ask(server, "alice")
    await stages.answer(await stages.request(), "in")
    assert (await light).parse().choices[0].message.content == "in"
    for request in requests:
        await stages.answer(request, "done")
    await asyncio.gather(*flood)


async def test_a_client_that_leaves_frees_its_place(server: Running, stages: Stages, redis: Redis, keys: Keys) -> None:
    asked = ask(server, "bob", stream=True)
    request = await stages.request()
    assert await redis.hlen(keys.tenant_open("bob")) == 1
    await (await asked).http_response.aclose()
    assert await stages.cancelled() == {request.id}
    await until_is(lambda: redis.hlen(keys.tenant_open("bob")), 0)


async def test_a_request_that_was_sent_before_costs_nothing(
    server: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    first = ask(server, "bob", extra_headers={"Idempotency-Key": "k"})
    request = await stages.request()
    second = ask(server, "bob", extra_headers={"Idempotency-Key": "k"})
    await stages.attached()
    await until_is(lambda: redis.hkeys(keys.tenant_open("bob")), [request.id.encode()])
    first.cancel()
    second.cancel()


async def test_models_are_those_that_the_key_may_use(checkpoint: Path, redis_url: str, tmp_path: Path) -> None:
    write(tmp_path / "keys.json", alice={"models": ["small"]}, bob={})
    names = ("small", "large")
    async with running(
        checkpoint, redis_url, api_keys_file=str(tmp_path / "keys.json"), served_model_names=names
    ) as server:
        alice, bob = (server.client.with_options(api_key=f"key-of-{name}") for name in ("alice", "bob"))
        assert [model.id async for model in alice.models.list()] == ["small"]
        assert [model.id async for model in bob.models.list()] == ["small", "large"]
        assert (await alice.models.retrieve("small")).id == "small"
        with pytest.raises(openai.PermissionDeniedError):
            await alice.models.retrieve("large")
        with pytest.raises(openai.NotFoundError):
            await alice.models.retrieve("huge")


async def test_every_prompt_of_a_completion_is_charged(
    server: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    client = server.client.with_options(api_key="key-of-bob")
    for leaves in (False, True):
        await redis.delete(keys.tenant("bob"))
        prompts = ["Hi", "a longer prompt " * 20]
        asked = asyncio.create_task(client.completions.create(model="m", prompt=prompts, n=2))
        works = await stages.take(4)
        lengths = [len(unpack_ids(work.prompt)) for work in works if isinstance(work, Generate)]
        assert lengths[0] == lengths[1] < lengths[2] == lengths[3]
        total = lengths[0] + lengths[2]
        assert await redis.hget(keys.tenant("bob"), "queued") == str(total).encode()
        if leaves:  # when one answer is here, and the other prompt has been computed, too
            await stages.answer(works[0].request, "yes", usage=Usage(lengths[0], 1, 0, 0, 0, 0))
            asked.cancel()
        else:
            for work, length in zip(works, lengths, strict=True):
                await stages.answer(work.request, "yes", usage=Usage(length, 1, 0, 0, 0, 0))
            await asked
        await until_is(lambda: redis.hget(keys.tenant("bob"), "used:prompt"), str(total).encode())


async def test_each_choice_is_charged_for_the_uploads_that_are_stored_for_it(
    server: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    asked = ask(server, "bob", n=3, extra_body={"messages": LOOK})
    works = await stages.take(3)
    assert len({work.media[0].blob for work in works if isinstance(work, Encode)}) == 3
    assert await redis.hget(keys.tenant("bob"), "used:media") == str(3 * len(PICTURE)).encode()
    asked.cancel()


async def test_uploads_of_a_repeat_are_given_back_since_they_are_not_stored(
    server: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    more: dict[str, Any] = {"extra_headers": {"Idempotency-Key": "k"}, "extra_body": {"messages": LOOK}}
    first = ask(server, "bob", **more)
    request = await stages.request()
    second = ask(server, "bob", **more)
    await stages.attached()
    await stages.answer(request, "yes")
    await asyncio.gather(first, second)
    await until_is(lambda: redis.hmget(keys.tenant("bob"), "used:requests", "used:media"), [b"2", b"%d" % len(PICTURE)])


async def test_media_are_charged_to_a_client_that_leaves_before_the_end(
    server: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    asked = ask(server, "bob", extra_body={"messages": LOOK}, stream=True)
    request = await stages.request()
    await stages.tell(request, Accepted(request.id, 5000))
    await stages.say(request, Delta(request.id, 1, content="y"))
    await (await asked).http_response.aclose()
    await until_is(lambda: redis.hget(keys.tenant("bob"), "used:prompt"), b"5000")


async def test_what_goes_on_without_its_client_is_charged(
    server: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    asked = ask(server, "bob", stream=True, extra_headers={"Idempotency-Key": "k"})
    request = await stages.request()
    await stages.say(request, Delta(request.id, 1, content="y"))
    await (await asked).http_response.aclose()
    await redis.setrange(keys.journal(request.id), 0, bytes(4 * 50))
    await until_is(lambda: redis.hget(keys.tenant("bob"), "used:generated"), b"50")
    await redis.setrange(keys.journal(request.id), 0, bytes(4 * 70))
    await stages.keep(request)
    await until_is(lambda: redis.hget(keys.tenant("bob"), "used:generated"), b"70")
    await until_is(lambda: redis.hlen(keys.tenant_open("bob")), 0)


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_what_a_second_connection_reads_is_charged_after_the_first_has_left(
    server: Running,
    stages: Stages,
    redis: Redis,
    keys: Keys,
    checkpoint: Path,
    redis_url: str,
    key_file: Path,
    elsewhere: bool,
) -> None:
    asked = ask(server, "bob", stream=True, extra_headers={"X-Event-IDs": "true"})
    request = await stages.request()
    await stages.say(request, Delta(request.id, 1, content="y"))
    first = (await asked).http_response
    async with AsyncExitStack() as stack:
        second = server
        if elsewhere:
            second = await stack.enter_async_context(
                running(checkpoint, redis_url, name="other", api_keys_file=str(key_file))
            )
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=second.url, timeout=PATIENCE_S))
        path = f"/v1/chat/completions/chatcmpl-{request.id}/events"
        async with client.stream("GET", path, headers={"x-api-key": "key-of-bob"}) as reading:
            assert reading.status_code == 200
            await stages.attached()
            await first.aclose()
            await until(server.idle if elsewhere else lambda: server.gateway.load()["choices"] == 1)
            await redis.setrange(keys.journal(request.id), 0, bytes(4 * 50))
            await until_is(lambda: redis.hget(keys.tenant("bob"), "used:generated"), b"50")
            assert await redis.hkeys(keys.tenant_open("bob")) == [request.id.encode()]
        assert await stages.cancelled() == {request.id}


async def test_what_was_left_before_is_charged_by_a_gateway_that_has_had_no_request(
    server: Running, redis: Redis, keys: Keys
) -> None:
    await redis.hset(keys.request("r"), "epoch", "1")
    await redis.setrange(keys.journal("r"), 0, bytes(4 * 50))
    await redis.hset(keys.tenants_left(), "bob r", "0:0:gone")
    await until_is(lambda: redis.hget(keys.tenant("bob"), "used:generated"), b"50")


async def test_an_open_request_is_charged_by_its_gateway_while_that_lives(
    server: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    asked = ask(server, "bob")
    request = await stages.request()
    await redis.setrange(keys.journal(request.id), 0, bytes(4 * 50))
    await redis.delete(keys.tenants_looked())
    await until_is(lambda: redis.exists(keys.tenants_looked()), 1)
    [gateway] = [key async for key in redis.scan_iter(keys.deltas("*"))]
    held = await redis.hget(keys.tenants_left(), f"bob {request.id}")
    assert held == b"0:0:" + gateway.removeprefix(keys.deltas("").encode())
    await stages.answer(request, "yes")
    await asked
    await until_is(lambda: redis.hlen(keys.tenant_open("bob")), 0)
    assert await redis.exists(keys.tenants_left()) == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "Hi"}),
        ("/detokenize", {"tokens": [5]}),
        ("/v1/messages/count_tokens", {"model": "m", "messages": HI}),
        ("/v1/responses/input_tokens", {"input": "Hi"}),
    ],
)
async def test_what_the_gateway_answers_itself_counts_among_requests(
    server: Running, path: str, body: dict[str, Any]
) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        for status in (200, 200, 429):
            reply = await client.post(path, json=body, headers={"x-api-key": "key-of-alice"})
            assert reply.status_code == status, reply.text
        assert "'alice' has a limit of 2 requests a minute" in reply.text
        assert (await client.post(path, json=body, headers={"x-api-key": "key-of-bob"})).status_code == 200


async def test_a_count_with_media_is_a_request_of_its_tenant(
    server: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    client = httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S, headers={"x-api-key": "key-of-alice"})
    async with client:
        for _ in range(2):
            asked = asyncio.create_task(
                client.post("/v1/messages/count_tokens", json={"model": "m", "messages": COUNTED})
            )
            request = await stages.request()
            assert request.share is not None
            assert request.share.name == "alice"
            await stages.tell(request, Accepted(request.id, 77))
            assert (await asked).json() == {"input_tokens": 77}
        refused = await client.post("/v1/messages/count_tokens", json={"model": "m", "messages": COUNTED})
        assert refused.status_code == 429
        assert "'alice'" in refused.text
    await until_is(lambda: redis.hget(keys.tenant("alice"), "used:prompt"), b"154")


async def test_the_prefixes_of_a_tenant_are_its_own(
    server: Running, stages: Stages, key_file: Path, redis: Redis, keys: Keys
) -> None:
    write(key_file, alice={}, bob={}, carol={"prefix_cache": "shared"})
    await until(lambda: server.metric('millrace_key_file_reloads_total{outcome="read"}') == 1)

    async def salt(who: str, given: str | None) -> str:
        asked = ask(server, who, extra_body={"cache_salt": given} if given else {})
        request = await stages.request()
        await stages.answer(request, "yes")
        await asked
        return request.cache_salt

    alone, salted = await salt("alice", None), await salt("alice", "x")
    assert len({alone, salted, await salt("bob", None), await salt("bob", "x"), await salt("carol", "x")}) == 5
    assert await salt("alice", "x") == salted
    assert await salt("carol", None) == ""
    # Nor can a key of the settings have a tenant's.
    own = server.client.with_options(api_key="key-1").chat.completions
    asked = asyncio.create_task(own.create(model="m", messages=HI, extra_body={"cache_salt": salted}))
    assert (await stages.request()).cache_salt != salted
    asked.cancel()


async def test_a_tenant_sees_its_own_requests_on_their_way_and_no_others(server: Running, stages: Stages) -> None:
    asked = [ask(server, "alice"), ask(server, "bob")]
    by_tenant = {
        request.share.name: request.id for request in [await stages.request(), await stages.request()] if request.share
    }
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:

        async def seen(key: str) -> set[str]:
            state = (await client.get("/console/state", headers={"x-api-key": key})).json()
            found = [
                (await client.get(f"/console/request?id={each}", headers={"x-api-key": key})).json()
                for each in by_tenant.values()
            ]
            listed = {one["id"] for one in state["requests"]}
            assert listed == {each["request"]["id"] for each in found if each["request"]}
            return listed

        assert await seen("key-of-alice") == {by_tenant["alice"]}
        assert await seen("key-of-bob") == {by_tenant["bob"]}
        assert await seen("key-1") == set(by_tenant.values())
    for each in asked:
        each.cancel()
