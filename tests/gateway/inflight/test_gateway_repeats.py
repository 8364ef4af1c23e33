"""Requests that are sent again: Idempotency-Key, over one gateway and over two."""

import asyncio
import base64
from pathlib import Path
from typing import Any

import openai
import pytest
from gateway_stages import USAGE, Running, Stages, running, until
from redis.asyncio import Redis

from services.gateway.inflight.headers import IdempotencyKey, read_idempotency_key, read_timeout
from shared.bus.keys import ENCODE, GENERATE, Keys
from shared.bus.records import Records
from shared.errors import Failure, RequestError
from shared.messages import Delta, Encode, Failed

HI: list[Any] = [{"role": "user", "content": "Hi"}]
PNG = "data:image/png;base64," + base64.b64encode(b"pixels").decode()
LOOK: list[Any] = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PNG}}]}]


def ask(server: Running, key: str = "k", messages: list[Any] = HI, **fields: Any) -> "asyncio.Task[Any]":
    """A request under way."""
    create = server.client.chat.completions.create
    headers = {"Idempotency-Key": key}
    return asyncio.create_task(create(model="demo-model", messages=messages, extra_headers=headers, **fields))


async def text(stream: Any) -> str:
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


async def test_a_repetition_gets_the_answer_that_is_being_written(
    server: Running, other: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    stream = await ask(server, stream=True)
    request = await stages.request()
    await stages.say(request, Delta(request.id, 2, content="He"))
    await anext(chunk async for chunk in stream if chunk.choices[0].delta.content)
    again = ask(other)
    attach = await stages.attached()
    assert (attach.request_id, attach.after) == (request.id, 0)
    end = {"finish_reason": "stop", "usage": USAGE}
    await stages.send(attach.gateway, Delta(request.id, 3, "", "Hello", start=0, **end))  # type: ignore[arg-type]
    reply = await again
    assert (reply.id, reply.choices[0].message.content) == (f"chatcmpl-{request.id}", "Hello")
    await stages.say(request, Delta(request.id, 3, "", "llo", **end))  # type: ignore[arg-type]
    assert await text(stream) == "llo"
    assert await redis.xlen(keys.stream(GENERATE)) == 1


async def test_a_repetition_gets_the_answer_that_is_kept(server: Running, other: Running, stages: Stages) -> None:
    asked = ask(server, n=2)
    works = [work.request for work in await stages.take(2)]
    for request in works:
        await stages.answer(request, request.id)
    await stages.keep(*works)
    first = await asked
    again = ask(other, n=2, stream=True, stream_options={"include_usage": True})
    for _ in works:
        attach = await stages.attached()
        delta = Delta(attach.request_id, 2, content=attach.request_id, finish_reason="stop", usage=USAGE)
        await stages.send(attach.gateway, delta)
    chunks = [chunk async for chunk in await again]
    told = {c.index: c.delta.content for chunk in chunks for c in chunk.choices if c.delta.content}
    assert told == {choice.index: choice.message.content for choice in first.choices}
    assert {chunk.id for chunk in chunks} == {first.id}
    assert chunks[-1].usage == first.usage


async def test_of_many_at_once_one_is_sent_and_all_are_answered(
    server: Running, other: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    asked = [ask(gateway, n=2) for gateway in (server, other) for _ in range(6)]
    first, second = [work.request for work in await stages.take(2)]
    attached: dict[str, set[str]] = {first.id: set(), second.id: set()}
    for _ in range(2 * 11):
        attach = await stages.attached()
        attached[attach.request_id].add(attach.gateway)
    for request in (first, second):
        for gateway in attached[request.id] | {first.gateway}:
            end = Delta(request.id, 2, content=request.id, finish_reason="stop", usage=USAGE)
            await stages.send(gateway, end)
    for reply in await asyncio.gather(*asked):
        assert [choice.message.content for choice in reply.choices] == [first.id, second.id]
    assert await redis.xlen(keys.stream(GENERATE)) == 2
    assert len(await redis.keys(keys.request("*"))) == 2
    for each in (server, other):
        await until(each.idle)


async def test_another_request_under_the_same_key(server: Running, stages: Stages) -> None:
    asked = ask(server)
    request = await stages.request()
    for fields in ({"seed": 1}, {"messages": [{"role": "user", "content": "Ho"}]}):
        with pytest.raises(openai.ConflictError) as refused:
            await ask(server, **fields)  # type: ignore[arg-type]
        assert refused.value.code == "idempotency_key_reused"
        assert refused.value.response.headers["x-should-retry"] == "false"
    await stages.answer(request, "x")
    await asked


async def test_usage_in_every_chunk_must_be_asked_for_at_first(server: Running, stages: Stages) -> None:
    asked = ask(server)
    request = await stages.request()
    with pytest.raises(openai.ConflictError) as refused:
        await ask(server, stream=True, stream_options={"continuous_usage_stats": True})
    assert refused.value.param == "stream_options.continuous_usage_stats"
    await stages.answer(request, "x")
    await asked


async def test_keys_are_each_clients_own(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    async with running(checkpoint, redis_url, api_keys=("key-1", "key-2")) as server:
        one = ask(server)
        (first,) = await stages.take()
        server.client.api_key = "key-2"
        two = ask(server, seed=2)
        (second,) = await stages.take()
        for work in (first, second):
            await stages.answer(work.request, work.request.id)
        assert [(await each).choices[0].message.content for each in (one, two)] == [first.request.id, second.request.id]


async def test_a_client_that_leaves_may_come_back(
    server: Running, other: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    asked = ask(server)
    request = await stages.request()
    asked.cancel()
    await until(server.idle)
    assert await redis.xlen(keys.control()) == 0
    again = ask(other)
    attach = await stages.attached()
    await stages.send(attach.gateway, Delta(request.id, 2, content="x", finish_reason="stop", usage=USAGE))
    assert (await again).choices[0].message.content == "x"


async def test_a_closing_gateway_leaves_it_to_others(
    checkpoint: Path, redis_url: str, stages: Stages, redis: Redis, keys: Keys
) -> None:
    async with running(checkpoint, redis_url) as server:
        asked = ask(server)
        await stages.request()
        await server.gateway.close()
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            await asked
    assert await redis.xlen(keys.control()) == 0


async def test_its_time_is_up_all_the_same(checkpoint: Path, redis_url: str, stages: Stages, keys: Keys) -> None:
    async with running(checkpoint, redis_url, request_timeout_s=50) as server:
        asked = ask(server)
        request = await stages.request()
        server.ahead_s = 51
        with pytest.raises(openai.APIStatusError) as failed:
            await asked
        assert failed.value.status_code == 504
        assert await stages.cancelled() == {request.id}


async def test_how_long_a_key_is_known(checkpoint: Path, redis_url: str, stages: Stages, redis: Redis) -> None:
    async with running(checkpoint, redis_url, retain_s=1000, request_timeout_s=500) as server:
        asked = ask(server, n=2)
        works = await stages.take(2)
        (key,) = await redis.keys("test:idempotency:*")
        assert 1501 < await redis.ttl(key) <= 2002  # a choice is kept for the others' sake
        for work in works:
            await stages.answer(work.request, "x")
        await asked


async def test_a_failure_is_not_repeated(server: Running, stages: Stages, redis: Redis, keys: Keys) -> None:
    asked = ask(server)
    request = await stages.request()
    await stages.say(request, Delta(request.id, 1, failure=Failure(500, "It broke.", type="server_error")))
    await Records(redis, keys).delete([request.id])
    with pytest.raises(openai.InternalServerError, match="It broke"):
        await asked
    again = ask(server)
    await stages.answer(await stages.request(), "mended")
    assert (await again).choices[0].message.content == "mended"


async def test_uploads_of_a_repetition_are_not_kept(server: Running, stages: Stages, redis: Redis, keys: Keys) -> None:
    asked = ask(server, messages=LOOK)
    (work,) = await stages.take()
    assert isinstance(work, Encode)
    again = ask(server, messages=LOOK)
    await stages.attached()
    blob = keys.blob("media", f"{work.request.id}-0")
    assert {name.decode() for name in await redis.keys(keys.blob("media", "*"))} == {blob, f"{blob}:0"}
    await stages.tell(work.request, Failed(work.request.id, Failure(400, "Not an image.")))
    for each in (asked, again):
        with pytest.raises(openai.BadRequestError, match="Not an image"):
            await each
    assert await redis.xlen(keys.stream(ENCODE)) == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb"])
async def test_a_key_that_is_none(server: Running, redis: Redis, keys: Keys, key: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await ask(server, key)
    assert refused.value.param == "Idempotency-Key"
    assert not await redis.exists(keys.stream(GENERATE))


# ------------------------------------------------------------------------------------------------------------ headers


def test_bodies_that_ask_for_the_same() -> None:
    def key(body: bytes, owner: str = "", name: str = "k") -> IdempotencyKey:
        made = read_idempotency_key({"idempotency-key": name}, owner, body)
        assert made is not None
        return made

    one = key(b'{"a": 1, "b": [2]}')
    assert key(b'{"b": [2],"a":1, "stream": true, "stream_options": {"include_usage": true}}') == one
    assert key(b'{"a": 1, "b": [3]}').body_digest != one.body_digest
    assert key(b'{"a": 1, "b": [2], "c": null}').body_digest != one.body_digest
    assert key(b'{"a": "1", "b": [2]}').body_digest != one.body_digest
    assert key(b'{"a": 1, "b": [2]}', owner="o").digest != one.digest
    assert key(b'{"a": 1, "b": [2]}', name="l").digest != one.digest
    assert read_idempotency_key({}, "", b"{}") is None


@pytest.mark.parametrize(("given", "seconds"), [("2.5", 2.5), ("600", 60.0), ("1e-3", 0.001), (None, 60.0)])
def test_how_long_it_may_take(given: str | None, seconds: float) -> None:
    assert read_timeout({} if given is None else {"x-request-timeout": given}, 60.0) == seconds


@pytest.mark.parametrize("given", ["", "0", "-1", "nan", "inf", "soon", "1s"])
def test_what_is_no_time(given: str) -> None:
    with pytest.raises(RequestError) as refused:
        read_timeout({"x-request-timeout": given}, 60.0)
    assert (refused.value.failure.status, refused.value.failure.param) == (400, "X-Request-Timeout")
