"""What holds for every request: errors, ids, names of the model, keys, limits of bodies and connections, draining."""

import asyncio
import gzip
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest
from asking import HI, ask, contents, said
from gateway_stages import USAGE, Running, Stages, running
from machine import PATIENCE_S
from redis.asyncio import Redis

from services.gateway.errors import SHUTTING_DOWN
from shared.bus.keys import Keys
from shared.bus.leases import Lease
from shared.messages import (
    Delta,
)


async def test_errors_are_openais_everywhere(server: Running) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        replies = [
            (await client.get("/nowhere"), 404, "not_found"),
            (await client.get("/v1/chat/completions"), 405, "method_not_allowed"),
            (await client.post("/v1/chat/completions", content=b"{"), 400, "invalid_json"),
            (await client.post("/v1/chat/completions", json={}), 400, "missing_required_parameter"),
        ]
    for reply, status, code in replies:
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (status, code)
        assert set(error) == {"message", "type", "param", "code"}
        assert reply.headers["x-request-id"]


async def test_a_route_that_is_not_there_is_named(server: Running) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        missing = await client.post("/v1/embeddings", json={})
        wrong = await client.delete("/v1/models")
        listed = (await client.get("/openapi.json")).json()["paths"]
    assert missing.json()["error"]["message"].startswith("There is no POST /v1/embeddings; GET /openapi.json ")
    assert wrong.json()["error"]["message"].startswith("There is no DELETE /v1/models; GET /openapi.json ")
    assert "/v1/embeddings" not in listed
    assert "delete" not in listed["/v1/models"]


async def test_the_request_id_is_the_clients_if_it_may_be(server: Running) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        assert (await client.get("/ping", headers={"x-request-id": "mine-1"})).headers["x-request-id"] == "mine-1"
        assert (await client.get("/ping", headers={"x-request-id": "a b"})).headers["x-request-id"] != "a b"
        assert (await client.get("/ping")).headers["x-request-id"] != (await client.get("/ping")).headers[
            "x-request-id"
        ]


async def test_models(server: Running) -> None:
    (card,) = (await server.client.models.list()).data
    assert (card.id, card.to_dict()["max_model_len"]) == ("demo-model", 2048)
    for name in ("demo-model", "null"):
        assert (await server.client.models.retrieve(name)).id == name


async def test_served_names(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    async with running(checkpoint, redis_url, served_model_names=("a", "org/b")) as server:
        assert [card.id for card in (await server.client.models.list()).data] == ["a", "org/b"]
        assert (await server.client.models.retrieve("org/b")).id == "org/b"
        with pytest.raises(openai.NotFoundError, match="'demo-model' does not exist"):
            await server.client.models.retrieve("demo-model")
        with pytest.raises(openai.NotFoundError, match="'demo-model' does not exist"):
            await ask(server)
        asked = ask(server, model="org/b")
        await stages.answer(await stages.request(), "x")
        assert (await asked).model == "org/b"


@pytest.mark.parametrize("model", ["null", 'a "name"\u2028'])
async def test_an_answer_repeats_the_models_name_wherever_it_is_written(
    server: Running, other: Running, stages: Stages, model: str
) -> None:
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        body = {"model": model, "messages": HI, "stream": True}
        async with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as reply:
            request = await stages.request()
            await stages.answer(request, "x")
            await stages.keep(request)
            told = [said(event) for event in (await reply.aread()).decode().split("\n\n") if "data: {" in event]
        again = asyncio.create_task(client.get(f"{other.url}/v1/chat/completions/chatcmpl-{request.id}"))
        gateway = (await stages.attached()).gateway
        await stages.send(gateway, Delta(request.id, 2, content="x", finish_reason="stop", usage=USAGE))
        whole = (await again).json()
    assert {chunk["model"] for chunk in told} == {model}
    assert (len(told), whole["model"]) == (3, model)


async def test_where_no_answer_is_yet_its_model_is_repeated_too(server: Running, stages: Stages) -> None:
    asked = ask(server, model="null", extra_headers={"Idempotency-Key": "k"})
    request = await stages.request()
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        status = (await client.get(f"{server.url}/v1/chat/completions/chatcmpl-{request.id}")).json()
    assert (status["status"], status["model"]) == ("in_progress", "null")
    await stages.answer(request, "x")
    assert (await asked).model == "null"


async def test_every_path_but_health_needs_a_key(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    async with (
        running(checkpoint, redis_url, api_keys=("key-1", "key-2")) as server,
        httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client,
    ):
        for path in (
            "/v1/models",
            "/v1/chat/completions",
            "/openapi.json",
            "/nowhere",
            "/health/../v1/models",
            "//v1/models",
        ):
            for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "Basic key-1"}):
                reply = await client.get(path, headers=headers)
                assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
                assert reply.headers["x-request-id"]
        assert (await client.get("/health/live")).status_code == 200
        for key in ("key-1", "key-2"):
            assert (await client.get("/v1/models", headers={"authorization": f"Bearer {key}"})).status_code == 200
        asked = ask(server)
        await stages.answer(await stages.request(), "in")
        assert (await asked).choices[0].message.content == "in"


async def test_a_body_too_large(checkpoint: Path, redis_url: str) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 100

    async with (
        running(checkpoint, redis_url, max_body_bytes=1000) as server,
        httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client,
    ):
        announced = await client.post("/v1/chat/completions", content=b"x" * 1001)
        chunked = await client.post("/v1/chat/completions", content=pieces())
    for reply in (announced, chunked):
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
        assert "1000" in reply.json()["error"]["message"]


async def test_a_compressed_body_is_refused(server: Running, stages: Stages) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        body = gzip.compress(b'{"messages": [{"role": "user", "content": "Hi"}]}')
        reply = await client.post("/v1/chat/completions", content=body, headers={"content-encoding": "gzip"})
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["param"]) == (415, "unsupported_encoding", "Content-Encoding")
        plain = {"content-encoding": "identity", "content-type": "application/json"}
        body = b'{"messages": [{"role": "user", "content": "Hi"}]}'
        asked = asyncio.create_task(client.post("/v1/chat/completions", content=body, headers=plain))
        await stages.answer(await stages.request(), "in")
        assert (await asked).status_code == 200


async def test_what_the_body_says_of_itself_is_in_the_headers(server: Running, stages: Stages) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "request_id": "mine-2", "max_token": 5, "cache_salt": "s"}
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=body, headers={"x-request-id": "other"}))
        request = await stages.request()
        assert request.cache_salt == "s"
        await stages.answer(request, "in")
        reply = await asked
    assert reply.headers["x-request-id"] == "mine-2"
    assert reply.headers["x-millrace-warning"] == "`max_token` is no field that this server knows; it is ignored"


async def test_a_body_that_does_not_come(checkpoint: Path, redis_url: str) -> None:
    async with running(checkpoint, redis_url, body_timeout_s=0.05) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{")
        assert (await reader.readline()).startswith(b"HTTP/1.1 408")
        writer.close()


async def test_headers_without_end_are_refused(server: Running) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    writer.write(b"GET /ping HTTP/1.1\r\nx: " + b"a" * (2 << 20))
    assert (await reader.readline()).startswith(b"HTTP/1.1 431")
    writer.close()


async def test_no_more_than_so_many_at_once(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    async with running(checkpoint, redis_url, max_concurrency=1) as server:
        asked = ask(server)
        request = await stages.request()
        with pytest.raises(openai.RateLimitError, match="max concurrency is 1") as refused:
            await ask(server)
        assert refused.value.response.headers["retry-after"] == "1"
        assert server.metric('millrace_admission_rejections_total{reason="max_concurrency"}') == 1
        await stages.answer(request, "x")
        await asked
        again = ask(server)
        await stages.answer(await stages.request(), "y")
        await again


async def test_ready_when_every_stage_is(server: Running, redis: Redis, keys: Keys) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        reply = await client.get("/health/ready")
        assert (reply.status_code, reply.json()["missing"]) == (503, ["mm_encoder", "engine", "postproc"])
        for stage in ("mm_encoder", "engine", "postproc"):
            await Lease(redis, keys, stage, "r1", 60_000).renew("ready")
        for path in ("/health", "/health/ready", "/health/live", "/ping"):
            assert (await client.get(path)).status_code == 200
        await Lease(redis, keys, "engine", "r1", 60_000).renew("draining")
        assert (await client.get("/health/ready")).json()["missing"] == ["engine"]


async def test_draining_finishes_what_runs_and_takes_nothing_new(server: Running, stages: Stages) -> None:
    stream = await ask(server, stream=True)
    request = await stages.request()
    drained = asyncio.create_task(server.gateway.drain())
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        assert "gateway" in (await client.get(f"{server.url}/health/ready")).json()["missing"]
    with pytest.raises(openai.APIStatusError) as refused:
        await ask(server)
    assert (refused.value.status_code, refused.value.response.headers["retry-after"]) == (503, "1")
    assert not drained.done()
    await stages.answer(request, "the end")
    assert "the end" in [chunk.choices[0].delta.content for chunk in await contents(stream)]
    await drained


async def test_closing_ends_streams_with_an_error_and_leaves_no_stream(
    checkpoint: Path, redis_url: str, stages: Stages, redis: Redis, keys: Keys
) -> None:
    async with running(checkpoint, redis_url) as server:
        stream = await ask(server, stream=True)
        request = await stages.request()
        await stages.say(request, Delta(request.id, 1, content="a"))
        await anext(chunk async for chunk in stream if chunk.choices[0].delta.content)
        closed = asyncio.create_task(server.gateway.close())
        with pytest.raises(openai.APIError, match=SHUTTING_DOWN.message):
            await contents(stream)
        await closed
        assert await redis.xlen(keys.control()) == 0, "its client may go on elsewhere"
        assert not await redis.exists(keys.deltas(request.gateway))


async def test_openapi_describes_the_request(server: Running) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        described = (await client.get("/openapi.json")).json()
    body = described["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatRequest"}
    assert "temperature" in described["components"]["schemas"]["ChatRequest"]["properties"]
