"""Failures, deadlines, and clients that leave or do not read."""

import asyncio
import contextlib
import json
from pathlib import Path

import openai
import pytest
from asking import BROKEN, HI, LOOK, ask, contents, nothing_left
from gateway_stages import Running, Stages, running, until
from redis.asyncio import Redis

from shared.bus.keys import ENCODE, GENERATE, Keys
from shared.bus.records import Records
from shared.bus.streams import send
from shared.messages import (
    Accepted,
    Delta,
    Deltas,
    Failed,
)


@pytest.mark.parametrize("n", [1, 2])
async def test_a_failure_inside_a_stream(server: Running, stages: Stages, redis: Redis, keys: Keys, n: int) -> None:
    stream = await ask(server, stream=True, n=n)
    works = [work.request for work in await stages.take(n)]
    await stages.say(works[0], Delta(works[0].id, 1, content="a"))
    await stages.say(works[-1], Delta(works[-1].id, 2, failure=BROKEN))
    first = await anext(chunk async for chunk in stream if chunk.choices[0].delta.content)
    assert first.choices[0].delta.content == "a"
    with pytest.raises(openai.APIError, match="gave up"):
        await contents(stream)
    if n == 2:
        assert await stages.cancelled() == {works[0].id}
    await nothing_left(server, redis, keys)


async def test_a_failure_of_an_answer_that_is_not_streamed(server: Running, stages: Stages) -> None:
    asked = ask(server)
    request = await stages.request()
    await stages.say(request, Delta(request.id, 1, content="a"), Delta(request.id, 1, failure=BROKEN))
    with pytest.raises(openai.InternalServerError, match="gave up") as failed:
        await asked
    assert failed.value.response.headers["x-should-retry"] == "false"
    assert failed.value.request_id == failed.value.response.headers["x-request-id"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_every_choice(
    server: Running, stages: Stages, redis: Redis, keys: Keys, stream: bool
) -> None:
    asked = ask(server, stream=stream, n=2)
    works = [work.request for work in await stages.take(2)]
    if stream:
        await (await asked).close()
    else:
        asked.cancel()
    ids = {request.id for request in works}
    assert await stages.cancelled() == ids
    assert all(record.cancelled for record in (await Records(redis, keys).get(sorted(ids))).values())
    await nothing_left(server, redis, keys)
    assert server.metric("millrace_requests_cancelled_total") == 2


@pytest.mark.parametrize("hold_headers_s", [0, 15])
async def test_clients_that_leave_before_their_stream_begins_are_all_cancelled(
    checkpoint: Path, redis_url: str, stages: Stages, redis: Redis, keys: Keys, hold_headers_s: float
) -> None:
    body = json.dumps({"messages": HI, "stream": True, "max_tokens": 4000, "ignore_eos": True}).encode()
    data = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
    async with running(checkpoint, redis_url, max_model_len=8192, hold_headers_s=hold_headers_s) as server:
        port = int(server.url.rpartition(":")[2])

        async def ask() -> asyncio.StreamWriter:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(data)
            return writer

        async def leave(writer: asyncio.StreamWriter) -> None:
            writer.close()
            await writer.wait_closed()

        late = await asyncio.gather(*(ask() for _ in range(50)))
        await until(lambda: server.gateway.load()["choices"] == 50)
        early = await asyncio.gather(*(ask() for _ in range(50)))
        await asyncio.gather(*(leave(writer) for writer in (*early, *late)))
        labels = {"method": "POST", "path": "/v1/chat/completions"}
        handled = "millrace_http_request_duration_seconds_count"
        await until(lambda: server.registry.get_sample_value(handled, labels) == 100)
        await nothing_left(server, redis, keys)
        count = await redis.xlen(keys.stream(GENERATE))
        assert count >= 50, "of those that left early some were not submitted"
        submitted = {work.request.id for work in await stages.take(count)}
        assert all(record.cancelled for record in (await Records(redis, keys).get(sorted(submitted))).values())
        assert server.metric("millrace_requests_cancelled_total") == count


async def test_only_what_still_runs_is_cancelled(server: Running, stages: Stages) -> None:
    stream = await ask(server, stream=True, n=2)
    first, second = [work.request for work in await stages.take(2)]
    await stages.answer(first, "done")
    async for chunk in stream:
        if chunk.choices[0].finish_reason:
            break
    await stream.close()
    assert await stages.cancelled() == {second.id}


async def unread_stream(server: Running) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Ask for a stream over a connection that buffers little of it."""
    body = json.dumps({"messages": HI, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]), limit=1024)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    return reader, writer


async def test_a_client_that_does_not_read_is_cut_off(
    checkpoint: Path, redis_url: str, stages: Stages, redis: Redis, keys: Keys
) -> None:
    async with running(checkpoint, redis_url, max_pending_bytes=100_000) as server:
        _, writer = await unread_stream(server)
        request = await stages.request()
        for seq in range(1, 400):
            await stages.say(request, Delta(request.id, seq, content="x" * 50_000))
            if not server.gateway.load()["choices"]:
                break
        assert await stages.cancelled() == {request.id}
        await nothing_left(server, redis, keys)
        writer.close()


async def test_a_client_that_does_not_read_is_cut_off_at_its_deadline(
    checkpoint: Path, redis_url: str, stages: Stages, redis: Redis, keys: Keys
) -> None:
    """However little waits for it, and although its connection stays; nothing of it stays here."""
    async with running(checkpoint, redis_url) as server:
        reader, writer = await unread_stream(server)
        request = await stages.request()
        [choice] = server.gateway._open_requests._choices()
        seq = 0
        while not choice.open_request.queue:
            seq += 1
            await stages.say(request, Delta(request.id, seq, content="x" * 50_000))
            await until(lambda: choice.seq == seq)  # noqa: B023  (awaited at once)
            for _ in range(9):  # turns in which the client's task takes what it can write
                await asyncio.sleep(0)
        server.ahead_s = 3600
        assert await stages.cancelled() == {request.id}
        await nothing_left(server, redis, keys)
        await until(lambda: server.metric("millrace_connections") == 0)
        with contextlib.suppress(ConnectionResetError):
            assert b"[DONE]" not in await reader.read()
        writer.close()


async def test_a_request_past_its_deadline(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    async with running(checkpoint, redis_url, request_timeout_s=50) as server:
        asked = ask(server)
        request = await stages.request()
        server.ahead_s = 51
        with pytest.raises(openai.APIStatusError) as failed:
            await asked
        assert failed.value.status_code == 504
        assert failed.value.body["type"] == "timeout_error"  # type: ignore[index]
        assert await stages.cancelled() == {request.id}


async def test_messages_nobody_can_read_or_waits_for_harm_nobody(
    server: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    asked = ask(server)
    request = await stages.request()
    stream = keys.deltas(request.gateway)
    await redis.xadd(stream, {b"v": b"999", b"m": b"?"})
    await send(redis, stream, Deltas((Delta("nobody", 1, content="x"),)))
    await send(redis, stream, Failed("nobody", BROKEN))
    await send(redis, stream, Accepted("nobody", 1))
    await stages.answer(request, "fine")
    assert (await asked).choices[0].message.content == "fine"


async def test_a_damaged_record_is_told_and_ends_its_request(
    checkpoint: Path, redis_url: str, redis: Redis, keys: Keys, stages: Stages
) -> None:
    async with running(checkpoint, redis_url, watch_s=0.05) as server:
        asked, other = ask(server), ask(server)
        request, fine = await stages.request(), await stages.request()
        await redis.hset(keys.request(request.id), "request", b"\xc1")
        done, _ = await asyncio.wait([asked, other], return_when=asyncio.FIRST_COMPLETED)
        [failed] = done
        error = failed.exception()
        assert isinstance(error, openai.APIStatusError)
        assert (error.status_code, error.code) == (500, "unreadable_state")
        assert await stages.cancelled() == {request.id}, "for its engine's sake"
        await stages.answer(fine, "fine")
        [answer] = [task for task in (asked, other) if task is not failed]
        assert (await answer).choices[0].message.content == "fine"


@pytest.mark.parametrize("with_picture", [False, True])
async def test_whose_work_entry_was_deleted_is_told(
    checkpoint: Path, redis_url: str, redis: Redis, keys: Keys, stages: Stages, with_picture: bool
) -> None:
    """Long before its deadline, and with nothing left behind."""
    async with running(checkpoint, redis_url, watch_s=0.05, limit_mm_per_prompt={"image": 2}) as server:
        asked = ask(server, LOOK) if with_picture else ask(server)
        request = await stages.request()
        await redis.delete(keys.stream(ENCODE if with_picture else GENERATE))
        with pytest.raises(openai.APIStatusError) as failed:
            await asked
        assert (failed.value.status_code, failed.value.code) == (503, "request_lost")
        await until(lambda: not server.gateway.load()["choices"])
    assert not await redis.exists(keys.request(request.id))
    assert not [key async for key in redis.scan_iter(match=keys.blob("media", "*"))]
