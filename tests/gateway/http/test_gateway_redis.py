"""What the gateway does when Redis refuses, forgets, or is away."""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import openai
import pytest
from asking import LOOK, ask, nothing_left
from fastapi import FastAPI
from gateway_stages import Running, Stages, running, until
from machine import PATIENCE_S
from redis.asyncio import Redis
from redis.exceptions import ConnectionError

from services.gateway.http.app import AppParts, Models, RequestLimits, build_app
from services.gateway.request.model_names import ModelNames
from shared.bus.keys import ENCODE, Keys
from shared.bus.records import Records


async def test_a_request_that_cannot_be_sent_leaves_nothing(
    server: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    await redis.set(keys.stream(ENCODE), b"not a stream")
    with pytest.raises(openai.APIStatusError) as failed:
        await ask(server, LOOK)
    assert (failed.value.status_code, failed.value.response.headers["retry-after"]) == (503, "1")
    await nothing_left(server, redis, keys)
    assert not await redis.keys(keys.request("*"))


async def test_a_failure_to_clean_up_is_not_another_answer(server: Running, redis: Redis, keys: Keys) -> None:
    await redis.set(keys.stream(ENCODE), b"not a stream")
    await redis.set(keys.blobs(), b"not an index")
    with pytest.raises(openai.APIStatusError) as failed:
        await ask(server, LOOK)
    assert failed.value.status_code == 503
    await until(lambda: server.gateway.load().items() >= {"requests": 0, "choices": 0}.items())


async def test_what_could_not_be_removed_while_redis_was_away_is_removed_later(
    checkpoint: Path, redis_url: str, redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else knows of an upload whose request was not submitted."""
    away, submitting = True, Records.submit

    async def submit(self: Records, stream: str, message: Any) -> None:
        await submitting(self, stream, message)
        raise ConnectionError("its reply was lost")

    async def delete(*_: Any) -> None:
        if away:
            raise ConnectionError("away")
        await deleting(*_)

    deleting = Records.delete
    monkeypatch.setattr(Records, "submit", submit)
    monkeypatch.setattr(Records, "delete", delete)
    async with running(checkpoint, redis_url, limit_mm_per_prompt={"image": 2}) as server:
        for _ in range(2):
            with pytest.raises(openai.APIStatusError):
                await ask(server, LOOK)
        assert len(await redis.keys(keys.request("*"))) == 2
        away = False
        await server.gateway._open_requests.check_records()
        assert not server.gateway._open_requests._pipeline._leftovers
        assert not await redis.keys(keys.request("*"))
        assert not await redis.keys(keys.blob("media", "*"))


async def test_answers_go_on_when_the_stream_was_overwritten(
    server: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    asked = ask(server)
    request = await stages.request()
    await redis.set(keys.deltas(request.gateway), b"not a stream")
    while await redis.type(keys.deltas(request.gateway)) != b"stream":  # noqa: ASYNC110 - Redis has no event for it
        await asyncio.sleep(0.01)
    await stages.answer(request, "back")
    assert (await asked).choices[0].message.content == "back"


async def test_a_cancel_that_cannot_be_sent(
    server: Running, stages: Stages, redis: Redis, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    await redis.set(keys.control(), b"not a stream")
    stream = await ask(server, stream=True)
    await stages.request()
    await stream.close()
    await until(lambda: any(text.startswith("could not cancel") for text in caplog.messages))
    await until(lambda: server.gateway.load().items() >= {"requests": 0, "choices": 0}.items())


async def test_not_ready_without_redis_or_with_leases_nobody_can_read(
    server: Running, redis: Redis, keys: Keys
) -> None:
    await redis.sadd(keys.replicas("engine"), "r1")
    await redis.set(keys.replica("engine", "r1"), b"{")
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        assert "engine" in (await client.get("/health/ready")).json()["missing"]
        await redis.set(keys.replicas("mm_encoder"), b"not a set")
        reply = await client.get("/health/ready")
    assert (reply.status_code, reply.json()["missing"]) == (503, ["redis"])


def app_that_reports(ready: Callable[[], Awaitable[dict[str, Any]]]) -> FastAPI:
    served = Models(ModelNames("m"), 0, 1, RequestLimits(*range(7)))
    parts = AppParts(
        handler=Mock(),
        dialects=(),
        resumption=Mock(),
        responses=Mock(),
        files=Mock(),
        batches=Mock(),
        served=served,
        tokens=Mock(),
        ready=ready,
        count_refusal=Mock(),
    )
    return build_app(parts)


async def test_what_nobody_foresaw_is_a_500_that_tells_nothing() -> None:
    async def broken() -> dict[str, Any]:
        raise ZeroDivisionError("secret")

    transport = httpx.ASGITransport(app_that_reports(broken), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=PATIENCE_S) as client:
        reply = await client.get("/health")
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in reply.text


@pytest.mark.parametrize(("number", "status"), [(errno.EMFILE, 503), (errno.ENFILE, 503), (errno.EIO, 500)])
async def test_the_end_of_file_descriptors_passes(number: int, status: int) -> None:
    async def broken() -> dict[str, Any]:
        raise OSError(number, "secret")

    transport = httpx.ASGITransport(app_that_reports(broken), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=PATIENCE_S) as client:
        reply = await client.get("/health")
    assert (reply.status_code, reply.headers.get("retry-after")) == (status, "1" if status == 503 else None)
