"""The running gateway: a real Redis, a real port, the real client; the test plays every other stage."""

import asyncio
import base64
import contextlib
import errno
import gzip
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import openai
import pytest
from fastapi import FastAPI
from gateway_stages import USAGE, Running, Stages, running, until
from machine import PATIENCE_S
from redis.asyncio import Redis
from redis.exceptions import ConnectionError

from services.gateway.errors import SHUTTING_DOWN
from services.gateway.http.app import AppParts, Models, RequestLimits, build_app
from services.gateway.request.model_names import ModelNames
from shared.bus.keys import ENCODE, GENERATE, Keys
from shared.bus.leases import Lease
from shared.bus.records import Records
from shared.bus.streams import send
from shared.errors import Failure
from shared.messages import (
    Accepted,
    Content,
    Delta,
    Deltas,
    Encode,
    Failed,
    Generate,
    ShownLogprob,
    ToolDelta,
    Usage,
    pack_ids,
    unpack_ids,
)
from shared.model.tokenizer import Tokenizer

HI: list[Any] = [{"role": "user", "content": "Hi"}]
PNG = "data:image/png;base64," + base64.b64encode(b"pixels").decode()
LOOK: list[Any] = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": PNG}},
            {"type": "image_url", "image_url": {"url": "https://example.org/b.png"}},
            {"type": "text", "text": "Compare."},
        ],
    }
]
TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BROKEN = Failure(500, "The engine gave up.", type="server_error", code="internal_error")
BAD_IMAGE = Failure(400, "Not an image.", param="messages[0].content[0].image_url", code="invalid_value")


@pytest.fixture
async def server(checkpoint: Path, redis_url: str) -> AsyncIterator[Running]:
    async with running(checkpoint, redis_url, limit_mm_per_prompt={"image": 2}) as started:
        yield started


def ask(server: Running, messages: list[Any] = HI, **fields: Any) -> "asyncio.Task[Any]":
    """A request under way."""
    fields = {"model": "demo-model", "messages": messages, **fields}
    return asyncio.create_task(server.client.chat.completions.create(**fields))


async def contents(stream: Any) -> list[Any]:
    return [chunk async for chunk in stream]


async def events(url: str, body: dict[str, Any], **headers: str) -> list[str]:
    """The events of a stream as they are on the wire."""
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        reply = await client.post(f"{url}/v1/chat/completions", json=body, headers=headers)
        assert reply.status_code == 200
        return reply.text.split("\n\n")


def said(event: str) -> Any:
    """The JSON of an event, whatever its id."""
    return json.loads(event.rpartition("data: ")[2])


def overheard(response: Any, monkeypatch: pytest.MonkeyPatch) -> bytearray:
    """The body of a response that the client library reads, as far as it has read."""
    heard, parts = bytearray(), response.aiter_bytes

    async def aiter_bytes() -> AsyncIterator[bytes]:
        async for part in parts():
            heard.extend(part)
            yield part

    monkeypatch.setattr(response, "aiter_bytes", aiter_bytes)
    return heard


async def nothing_left(server: Running, redis: Redis, keys: Keys) -> None:
    """Every open request is gone from the gateway, and what is left in Redis is for the stages behind it."""
    await until(lambda: server.gateway.load().items() >= {"requests": 0, "choices": 0}.items())
    assert not await redis.keys(keys.blob("*", "*"))


# -------------------------------------------------------------------------------------------------------- an answer


async def test_what_the_engine_is_sent(server: Running, stages: Stages, tokenizer: Tokenizer) -> None:
    asked = ask(server, temperature=0.5, seed=3, max_tokens=9, extra_headers={"X-Request-ID": "mine"})
    (work,) = await stages.take()
    assert isinstance(work, Generate)
    ids = unpack_ids(work.prompt)
    assert ids[0] == tokenizer.control["<|begin_of_sentence|>"]
    assert tokenizer.control["<think>"] in ids
    assert (work.max_tokens, work.request.sampling.seed, work.request.sampling.temperature) == (9, 3, 0.5)
    assert work.request.output.thinking
    assert work.request.log_fields == {"request_id": work.request.id, "http_request_id": "mine"}
    assert work.request.gateway.startswith("gw.")
    assert work.request.shard in range(4)
    assert work.request.deadline == pytest.approx(work.request.created + 600)
    record = (await Records(stages.redis, stages.keys).get([work.request.id]))[work.request.id]
    assert record.request == work.request
    await stages.answer(work.request, "x")
    await asked


async def test_an_answer_that_is_not_streamed(server: Running, stages: Stages, redis: Redis, keys: Keys) -> None:
    asked = ask(server)
    request = await stages.request()
    await stages.say(request, Delta(request.id, 1, reasoning="let me "))
    await stages.say(request, Delta(request.id, 2, reasoning="see", content="Hel"))
    await stages.say(request, Delta(request.id, 4, content="lo", finish_reason="stop", usage=USAGE))
    reply = await asked
    (choice,) = reply.choices
    assert reply.id == f"chatcmpl-{request.id}"
    assert (reply.model, reply.object) == ("demo-model", "chat.completion")
    assert reply.system_fingerprint.startswith("fp_")
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hello", "stop")
    assert choice.message.reasoning_content == choice.message.reasoning == "let me see"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (11, 3, 14)
    assert reply.usage.prompt_tokens_details.cached_tokens == 4
    assert reply.usage.completion_tokens_details.reasoning_tokens == 1
    await nothing_left(server, redis, keys)
    assert await redis.xlen(keys.control()) == 0, "an answer that ended is not cancelled"


async def test_a_streamed_answer(server: Running, stages: Stages, redis: Redis, keys: Keys) -> None:
    stream = await ask(server, stream=True, stream_options={"include_usage": True})
    request = await stages.request()
    await stages.say(request, Delta(request.id, 1, reasoning="hm"))
    await stages.say(request, Delta(request.id, 2, content="Hel"), Delta(request.id, 3, content="lo"))
    await stages.say(request, Delta(request.id, 4, finish_reason="length", usage=USAGE))
    chunks = await contents(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Hello"
    assert [c.choices[0].delta.reasoning_content for c in chunks[1:2]] == ["hm"]
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 14
    assert {c.id for c in chunks} == {f"chatcmpl-{request.id}"}
    await nothing_left(server, redis, keys)


async def test_the_client_libraries_own_accumulator(server: Running, stages: Stages) -> None:
    async def read() -> Any:
        async with server.client.chat.completions.stream(model="demo-model", messages=HI, tools=[TOOL]) as stream:
            async for _ in stream:
                pass
            return await stream.get_final_completion()

    asked = asyncio.create_task(read())
    request = await stages.request()
    assert request.output.tools
    calls = (ToolDelta(0, "call-0", "f", '{"a"'), ToolDelta(0, None, None, ": 1}"), ToolDelta(1, "call-1", "f", "{}"))
    await stages.say(request, Delta(request.id, 1, content="So:"), Delta(request.id, 2, tool_calls=calls))
    await stages.say(request, Delta(request.id, 3, finish_reason="tool_calls", usage=USAGE))
    (choice,) = (await asked).choices
    assert choice.message.content == "So:"
    assert [(c.id, c.function.name, c.function.arguments) for c in choice.message.tool_calls] == [
        ("call-0", "f", '{"a": 1}'),
        ("call-1", "f", "{}"),
    ]
    assert choice.finish_reason == "tool_calls"


async def test_tool_calls_that_are_not_streamed(server: Running, stages: Stages) -> None:
    asked = ask(server, tools=[TOOL], tool_choice="auto")
    request = await stages.request()
    await stages.say(request, Delta(request.id, 1, tool_calls=(ToolDelta(0, "c", "f", "{}"),)))
    await stages.say(request, Delta(request.id, 2, finish_reason="tool_calls", usage=USAGE))
    (choice,) = (await asked).choices
    assert choice.message.content is None
    assert [call.function.name for call in choice.message.tool_calls] == ["f"]


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_and_token_ids(server: Running, stages: Stages, stream: bool) -> None:
    asked = ask(server, stream=stream, logprobs=True, top_logprobs=1, extra_body={"return_token_ids": True})
    request = await stages.request()
    assert request.sampling.logprobs == 1
    assert request.output.return_token_ids
    shown = ShownLogprob("a", b"a", -0.25, (("b", b"b", -2.0),))
    prompt = pack_ids([5, 9, 9, 6])
    await stages.say(request, Delta(request.id, 1, content="a", logprobs=(shown,), token_ids=(42,), prompt=prompt))
    await stages.say(request, Delta(request.id, 2, finish_reason="stop", usage=USAGE))
    reply = await asked
    if stream:
        first, second, _ = await contents(reply)
        prompt_ids, choice, message = (
            first.choices[0].delta.prompt_token_ids,
            second.choices[0],
            second.choices[0].delta,
        )
    else:
        choice, message = reply.choices[0], reply.choices[0].message
        prompt_ids = message.prompt_token_ids
    (entry,) = choice.logprobs.content
    assert (entry.token, entry.logprob, entry.bytes) == ("a", -0.25, [97])
    assert [(top.token, top.logprob) for top in entry.top_logprobs] == [("b", -2.0)]
    assert (message.content, message.completion_token_ids) == ("a", [42])
    assert prompt_ids == [5, 9, 9, 6]


@pytest.mark.parametrize("stream", [False, True])
async def test_two_choices_are_two_requests(server: Running, stages: Stages, stream: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if stream else {}
    asked = ask(server, n=2, seed=7, stream=stream, **options)
    first, second = [work.request for work in await stages.take(2)]
    assert second.id == f"{first.id}-1"
    assert (first.sampling.seed, second.sampling.seed) == (7, 8)
    for turn in range(3):
        for request in (first, second):
            await stages.say(request, Delta(request.id, turn + 1, content=f"{request.sampling.seed}"))
    await stages.say(second, Delta(second.id, 4, finish_reason="stop", usage=Usage(11, 5, 0, 11, 0, 0)))
    await stages.say(first, Delta(first.id, 4, finish_reason="length", usage=USAGE))
    reply = await asked
    if stream:
        chunks = await contents(reply)
        texts, ends, usage = ["", ""], ["", ""], chunks[-1].usage
        for chunk in chunks[:-1]:
            (choice,) = chunk.choices
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    else:
        texts = [choice.message.content for choice in reply.choices]
        ends, usage = [choice.finish_reason for choice in reply.choices], reply.usage
    assert (texts, ends) == (["777", "888"], ["length", "stop"])
    assert (usage.prompt_tokens, usage.completion_tokens) == (11, 8)


async def test_what_was_shown_is_not_shown_again(server: Running, stages: Stages) -> None:
    stream = await ask(server, stream=True)
    request = await stages.request()
    for seq in (1, 2, 1, 2, 3, 2, 3):
        await stages.say(request, Delta(request.id, seq, content=str(seq)))
    for _ in range(2):
        await stages.say(request, Delta(request.id, 4, finish_reason="stop", usage=USAGE))
    assert "".join(c.choices[0].delta.content or "" for c in await contents(stream)) == "123"


async def test_usage_keys_only_for_who_asks(server: Running, stages: Stages) -> None:
    body = {"messages": HI, "stream": True}
    asked = asyncio.create_task(events(server.url, body))
    await stages.answer(await stages.request(), "a")
    got = await asked
    assert got[-2:] == ["data: [DONE]", ""]
    assert not any("usage" in event for event in got)
    assert all(len(said(event)["choices"]) == 1 for event in got[:-2])


async def test_many_at_once_each_with_its_own_answer(server: Running, stages: Stages, redis: Redis, keys: Keys) -> None:
    async def one(i: int) -> str:
        if i % 2:
            chunks = await contents(await ask(server, stream=True, seed=i))
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return str((await ask(server, seed=i)).choices[0].message.content)

    asked = asyncio.gather(*map(one, range(64)))
    work = [entry.request for entry in await stages.take(64)]
    assert server.gateway.load().items() >= {"requests": 64, "choices": 64}.items()
    for turn in range(5):
        for request in work:
            await stages.say(request, Delta(request.id, turn + 1, content=f"{request.sampling.seed}."))
    for request in work:
        await stages.say(request, Delta(request.id, 6, finish_reason="stop", usage=USAGE))
    assert await asked == [f"{i}." * 5 for i in range(64)]
    await nothing_left(server, redis, keys)
    assert server.metric('millrace_http_requests_total{method="POST",path="/v1/chat/completions",status="200"}') == 64
    assert server.metric("millrace_time_to_first_token_seconds_count") == 64
    assert server.metric("millrace_answered_tokens_total") == 64 * 3
    assert server.metric("millrace_answered_prompt_tokens_total") == 64 * 11
    assert server.metric('millrace_open_requests{stream="true"}') == 0


# ------------------------------------------------------------------------------------------------------------ media


async def test_media_go_to_the_encoder_with_their_bytes_as_blobs(
    server: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    asked = ask(server, LOOK)
    (work,) = await stages.take()
    assert isinstance(work, Encode)
    uploaded, linked = work.media
    assert (uploaded.kind, uploaded.url, uploaded.blob) == ("image", None, f"{work.request.id}-0")
    assert (linked.url, linked.blob) == ("https://example.org/b.png", None)
    assert uploaded.param == "messages[0].content[0].image_url"
    assert len(work.segments) == 3
    assert await redis.get(f"{keys.blob('media', uploaded.blob)}:0") == b"pixels"
    assert (uploaded.content, linked.content) == (Content(hashlib.sha256(b"pixels").digest(), 6), None)
    await stages.tell(work.request, Accepted(work.request.id, 100))
    await stages.answer(work.request, "same")
    assert (await asked).choices[0].message.content == "same"


async def test_a_large_request(server: Running, stages: Stages, redis: Redis, keys: Keys) -> None:
    pixels = bytes(range(256)) * 8192  # two chunks of a blob
    url = "data:image/png;base64," + base64.b64encode(pixels).decode()
    asked = ask(server, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
    (work,) = await stages.take()
    assert isinstance(work, Encode)
    blob = keys.blob("media", f"{work.request.id}-0")
    assert b"".join([await redis.get(f"{blob}:{n}") or b"" for n in range(3)]) == pixels
    await stages.answer(work.request, "large")
    assert (await asked).choices[0].message.content == "large"


async def test_every_choice_has_its_own_upload(server: Running, stages: Stages, redis: Redis, keys: Keys) -> None:
    asked = ask(server, LOOK, n=2)
    works = await stages.take(2)
    blobs = [work.media[0].blob for work in works if isinstance(work, Encode)]
    assert len({*blobs}) == 2
    for work, blob in zip(works, blobs, strict=True):
        assert blob is not None
        assert await redis.get(f"{keys.blob('media', blob)}:0") == b"pixels"
        await stages.answer(work.request, "x")
    await asked


@pytest.mark.parametrize("stream", [False, True])
async def test_bad_media_are_a_real_400(server: Running, stages: Stages, stream: bool) -> None:
    asked = ask(server, LOOK, stream=stream)
    request = await stages.request()
    await stages.tell(request, Failed(request.id, BAD_IMAGE))
    with pytest.raises(openai.BadRequestError, match="Not an image") as refused:
        await asked
    assert refused.value.param == "messages[0].content[0].image_url"


async def test_a_stream_starts_when_its_media_are_accepted(server: Running, stages: Stages) -> None:
    asked = ask(server, LOOK, stream=True, n=2)
    first, second = [work.request for work in await stages.take(2)]
    await stages.tell(first, Accepted(first.id, 10))
    other = ask(server)
    await stages.answer(await stages.request(), "meanwhile")
    await other
    assert not asked.done()
    await stages.tell(second, Accepted(second.id, 10))
    stream = await asked
    await stages.tell(second, Failed(second.id, BROKEN))
    with pytest.raises(openai.APIError, match="gave up"):
        await contents(stream)
    assert await stages.cancelled() == {first.id}


async def test_a_stream_does_not_wait_for_ever_to_start(
    checkpoint: Path, redis_url: str, stages: Stages, redis: Redis
) -> None:
    options = {"limit_mm_per_prompt": {"image": 2}, "hold_headers_s": 0.01, "keep_alive_s": 0.01}
    body = {"messages": LOOK, "stream": True}
    async with (
        running(checkpoint, redis_url, **options) as server,
        httpx.AsyncClient(timeout=PATIENCE_S) as client,
        client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as reply,
    ):
        assert server.metric('millrace_open_requests{stream="true"}') == 1
        lines = reply.aiter_lines()
        async for line in lines:
            if line == ": keep-alive":
                break
        request = await stages.request()
        await stages.tell(request, Failed(request.id, BAD_IMAGE))
        *_, error, done = [line async for line in lines if line.startswith("data: ")]
    assert said(error)["error"] == {
        "message": "Not an image.",
        "type": "invalid_request_error",
        "param": "messages[0].content[0].image_url",
        "code": 400,
    }
    assert done == "data: [DONE]"


@pytest.mark.parametrize(("ids", "silence"), [("true", b": keep-alive\n"), ("false", b": keep-alive\n\n")])
async def test_the_client_library_reads_over_the_silences(
    checkpoint: Path, redis_url: str, stages: Stages, monkeypatch: pytest.MonkeyPatch, ids: str, silence: bytes
) -> None:
    """It keeps the id of the last event, and takes every blank line after that for the end of another."""
    async with running(checkpoint, redis_url, keep_alive_s=0.001) as server:
        stream = await ask(server, stream=True, extra_headers={"X-Event-IDs": ids})
        heard = overheard(stream.response, monkeypatch)
        asked = asyncio.create_task(contents(stream))
        request = await stages.request()

        async def after_a_silence(after: bytes, delta: Delta) -> None:
            await until(lambda: asked.done() or silence in heard.partition(after)[2])
            await stages.say(request, delta)

        await after_a_silence(b"assistant", Delta(request.id, 1, content="Hel"))
        await after_a_silence(b"Hel", Delta(request.id, 2, content="lo"))
        await after_a_silence(b'"lo"', Delta(request.id, 3, finish_reason="stop", usage=USAGE))
        chunks = await asked
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "Hel", "lo", None]


# --------------------------------------------------------------------------------------------------- errors and ends


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


# ------------------------------------------------------------------------------------------- when Redis does not help


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


# ---------------------------------------------------------------------------------------------------------- the edge


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
    assert (card.id, card.max_model_len) == ("demo-model", 2048)
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
