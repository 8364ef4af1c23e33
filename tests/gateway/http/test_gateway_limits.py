"""Limits of requests: their time, the length of the queue, and a Redis that does not answer."""

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gateway_stages import Stages, running, until
from machine import PATIENCE_S
from prometheus_client import Counter
from redis.asyncio import Redis

from cli.redis_server import RedisServer
from services.gateway.inflight.backlog import FRESH_S, Backlog
from shared.bus.client import connect
from shared.bus.keys import ENCODE, GENERATE, Keys
from shared.errors import RequestError
from shared.metrics import value

HI: list[Any] = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A server to be stopped."""
    directory = Path(tempfile.mkdtemp(prefix="millrace-"))
    with RedisServer(directory, namespace="test") as server:
        yield server
    shutil.rmtree(directory)


async def test_the_clients_own_deadline(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    async with running(checkpoint, redis_url, request_timeout_s=300) as server:

        def ask(seconds: str, **fields: Any) -> "asyncio.Task[Any]":
            create = server.client.chat.completions.create
            headers = {"X-Request-Timeout": seconds}
            return asyncio.create_task(create(model="demo-model", messages=HI, extra_headers=headers, **fields))

        asked = ask("9000")
        request = await stages.request()
        assert request.deadline == pytest.approx(request.created + 300)
        await stages.answer(request, "x")
        await asked
        asked = ask("50.5")
        request = await stages.request()
        assert request.deadline == pytest.approx(request.created + 50.5)
        server.ahead_s = 51
        with pytest.raises(openai.APIStatusError) as late:
            await asked
        assert (late.value.status_code, late.value.code) == (504, "timeout")
        assert await stages.cancelled() == {request.id}
        server.ahead_s = 0
        stream = await ask("50.5", stream=True)
        server.ahead_s = 51
        with pytest.raises(openai.APIError, match="took too long") as told:
            async for _ in stream:
                pass
        assert told.value.code == "504"
        assert await stages.cancelled() == {(await stages.request()).id}
        with pytest.raises(openai.BadRequestError, match="X-Request-Timeout"):
            await ask("soon")


async def test_a_full_queue(checkpoint: Path, redis_url: str, stages: Stages, redis: Redis, keys: Keys) -> None:
    async with running(checkpoint, redis_url, max_queue=3) as server:
        create = server.client.chat.completions.create
        asked = asyncio.create_task(create(model="demo-model", messages=HI))
        request = await stages.request()
        await redis.xadd(keys.stream(ENCODE), {"x": "y"})
        await asyncio.sleep(FRESH_S)  # how long the gateway relies on what it counted
        with pytest.raises(openai.RateLimitError, match="queue is full") as refused:
            await create(model="demo-model", messages=HI, n=2)
        assert refused.value.response.headers["retry-after"] == "1"
        await stages.answer(request, "x")
        await asked
        await until(server.idle)


async def test_the_queue_is_counted_now_and_then(redis: Redis, keys: Keys) -> None:
    now = 100.0
    rejections = Counter("rejections", "Of this test", ("reason",), registry=None)
    backlog = Backlog(redis, keys, 4, rejections, lambda: now)
    await backlog.admit(3)
    with pytest.raises(RequestError) as refused:
        await backlog.admit(2)
    assert refused.value.failure.status == 429
    await redis.xadd(keys.stream(GENERATE), {"x": "y"})
    await backlog.admit(1)
    now += FRESH_S
    await backlog.admit(3)
    with pytest.raises(RequestError):
        await backlog.admit(1)
    assert value(rejections) == 2


@pytest.mark.system
@pytest.mark.parametrize("how", ["silent", "gone"])
async def test_a_redis_that_does_not_answer(checkpoint: Path, own_redis: RedisServer, how: str) -> None:
    async with running(checkpoint, own_redis.url, submit_timeout_s=0.3) as server:
        assert own_redis.pid is not None
        if how == "silent":
            os.kill(own_redis.pid, signal.SIGSTOP)
        else:
            own_redis.kill()
        try:
            async with asyncio.timeout(PATIENCE_S):
                with pytest.raises(openai.APIStatusError) as refused:
                    await server.client.chat.completions.create(model="demo-model", messages=HI)
                with pytest.raises(openai.InternalServerError, match="cannot be reached"):
                    await server.client.chat.completions.retrieve("chatcmpl-0000000000000000")
        finally:
            if how == "silent":
                os.kill(own_redis.pid, signal.SIGCONT)
            else:
                own_redis.start()
        assert (refused.value.status_code, refused.value.code) == (503, "connection_error")
        assert refused.value.response.headers["retry-after"] == "1"
        await until(server.idle)


@pytest.mark.system
async def test_a_redis_that_comes_back_empty(checkpoint: Path, own_redis: RedisServer, keys: Keys) -> None:
    client = connect(own_redis.url)
    stages = Stages(client, keys)
    async with running(checkpoint, own_redis.url) as server:
        create = server.client.chat.completions.create
        stream = await create(model="demo-model", messages=HI, stream=True)
        await stages.request()
        own_redis.kill()
        own_redis.start()
        with pytest.raises(openai.APIError, match="lost this request"):
            async for _ in stream:
                pass
        asked = asyncio.create_task(create(model="demo-model", messages=HI))
        await Stages(client, keys).answer(await Stages(client, keys).request(), "back")
        assert (await asked).choices[0].message.content == "back"
    await client.aclose()


@pytest.mark.system
async def test_a_gateway_waits_for_redis_to_start(checkpoint: Path, own_redis: RedisServer) -> None:
    own_redis.kill()

    async def start() -> None:
        async with running(checkpoint, own_redis.url) as server, httpx.AsyncClient(timeout=PATIENCE_S) as client:
            assert (await client.get(f"{server.url}/health/live")).status_code == 200

    starting = asyncio.create_task(start())
    await asyncio.sleep(0.2)
    assert not starting.done()
    own_redis.start()
    await starting
