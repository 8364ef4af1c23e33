"""Readers of streams that know less than server-sent events: the rules by which benchmark clients read, restated.

Each takes the bytes of a stream and returns the JSON of its events, or raises where the client would fail a request.
`make test-clients` runs the clients themselves.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway_stages import USAGE, Running, Stages, running, until
from machine import PATIENCE_S

from shared.messages import Delta, Request, ToolDelta, Usage

DONE = "[DONE]"
# A line end in Unicode, quotes, and what else a careless reader may trip over.
TEXT = 'a\u2028b "c"\n\ndata: d\r\n: e é'
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
WITH_USAGE = {**BODY, "stream_options": {"include_usage": True}}
CONTINUOUS = {**BODY, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


def line_by_line(stream: bytes) -> list[Any]:
    """SGLang's and FastDeploy's: every line that is not blank is an event, with or without `data: ` before it."""
    lines = [line.strip().decode().removeprefix("data: ") for line in stream.split(b"\n") if line.strip()]
    return [json.loads(line) for line in lines if line != DONE]


def block_by_block(stream: bytes) -> list[Any]:
    """vLLM's: what stands between blank lines is an event or, if it begins with a colon, nothing."""
    blocks = [block.strip().removeprefix("data: ") for block in stream.decode().split("\n\n") if block.strip()]
    return [json.loads(block) for block in blocks if block != DONE and not block.startswith(":")]


def data_lines(stream: bytes) -> list[Any]:
    """GuideLLM's: lines that begin with `data:`, cut where Python and httpx cut lines; after [DONE] nothing counts."""
    lines = [line.strip()[5:].strip() for line in stream.decode().splitlines() if line.startswith("data:")]
    return [json.loads(line) for line in lines[: lines.index(DONE)]]


READERS: list[Callable[[bytes], list[Any]]] = [line_by_line, block_by_block, data_lines]
KNOW_COMMENTS = READERS[1:]


@pytest.fixture
async def server(checkpoint: Path, redis_url: str) -> AsyncIterator[Running]:
    async with running(checkpoint, redis_url) as started:
        yield started


async def read(server: Running, body: dict[str, Any], heard: bytearray, **headers: str) -> bytes:
    """The bytes of a stream, which `heard` has as they arrive."""
    url = f"{server.url}/v1/chat/completions"
    async with (
        httpx.AsyncClient(timeout=PATIENCE_S) as client,
        client.stream("POST", url, json=body, headers=headers) as reply,
    ):
        assert reply.status_code == 200
        async for part in reply.aiter_bytes():
            heard += part
    return bytes(heard)


async def an_answer(server: Running, stages: Stages, body: dict[str, Any], **headers: str) -> bytes:
    """The bytes of an answer with reasoning, content and a tool call."""
    asked = asyncio.create_task(read(server, body, bytearray(), **headers))
    request = await stages.request()
    await stages.say(request, *answer_of(request))
    return await asked


def answer_of(request: Request) -> list[Delta]:
    continuous = request.output.continuous_usage
    so_far = [Usage(10, count, min(count, 2), 3, 0, 0) if continuous else None for count in range(6)]
    call = ToolDelta(0, "c", "f", "{}")
    return [
        Delta(request.id, 2, reasoning="hm", usage=so_far[2]),
        Delta(request.id, 3, content=TEXT, usage=so_far[3]),
        Delta(request.id, 5, tool_calls=(call,), usage=so_far[5]),
        Delta(request.id, 6, finish_reason="tool_calls", usage=Usage(10, 6, 2, 3, 0, 0)),
    ]


def deltas(events: list[Any]) -> list[dict[str, Any]]:
    return [choice["delta"] for event in events for choice in event["choices"]]


@pytest.mark.parametrize("reader", READERS)
async def test_every_reader_reads_an_answer(
    server: Running, stages: Stages, reader: Callable[[bytes], list[Any]]
) -> None:
    events = reader(await an_answer(server, stages, WITH_USAGE))
    *_, last = events
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 6)
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert "".join(delta.get("reasoning_content", "") for delta in deltas(events)) == "hm"
    assert "".join(delta.get("content", "") for delta in deltas(events)) == TEXT
    assert [delta["tool_calls"][0]["function"] for delta in deltas(events) if "tool_calls" in delta] == [
        {"name": "f", "arguments": ""},
        {"arguments": "{}"},
    ]


async def test_a_plain_stream_is_data_alone(server: Running, stages: Stages) -> None:
    stream = await an_answer(server, stages, BODY)
    assert stream.endswith(b"data: [DONE]\n\n")
    assert all(event.startswith(b"data: ") for event in stream.removesuffix(b"\n\n").split(b"\n\n"))
    assert stream.count(b"\n") == 2 * stream.count(b"data: {") + 2


@pytest.mark.parametrize("headers", [{"X-Event-IDs": "true"}, {"Idempotency-Key": "k"}])
async def test_who_asks_gets_ids(server: Running, stages: Stages, headers: dict[str, str]) -> None:
    stream = await an_answer(server, stages, BODY, **headers)
    assert [line for line in stream.split(b"\n") if line.startswith(b"id: ")][-1] == b"id: 6"
    assert stream.count(b"id: ") == stream.count(b"data: {")


async def test_a_client_with_a_key_may_decline_ids(server: Running, stages: Stages) -> None:
    stream = await an_answer(server, stages, BODY, **{"Idempotency-Key": "k", "X-Event-IDs": "false"})
    assert b"id: " not in stream


async def test_what_the_header_may_say(server: Running) -> None:
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        url = f"{server.url}/v1/chat/completions"
        reply = await client.post(url, json=BODY, headers={"X-Event-IDs": "yes"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "X-Event-IDs")
    assert "must be true or false, not 'yes'" in reply.json()["error"]["message"]


@pytest.mark.parametrize("reader", READERS)
async def test_usage_in_every_chunk(server: Running, stages: Stages, reader: Callable[[bytes], list[Any]]) -> None:
    events = reader(await an_answer(server, stages, CONTINUOUS))
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == [0, 2, 3, 5, 5, 6, 6]
    assert [event["usage"]["completion_tokens_details"]["reasoning_tokens"] for event in events[:3]] == [0, 2, 2]
    for event in events:
        assert event["usage"]["prompt_tokens"] == 10
        assert event["usage"]["total_tokens"] == 10 + event["usage"]["completion_tokens"]
        assert event["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
    assert (deltas(events)[0], events[-1]["choices"]) == ({"role": "assistant", "content": ""}, [])


async def test_usage_in_every_chunk_alone_adds_none_at_the_end(server: Running, stages: Stages) -> None:
    body = {**BODY, "stream_options": {"continuous_usage_stats": True, "include_usage": None}}
    events = line_by_line(await an_answer(server, stages, body))
    assert [event["usage"]["completion_tokens"] for event in events] == [0, 2, 3, 5, 5, 6]
    assert all(event["choices"] for event in events)


@pytest.mark.parametrize("options", [None, {}, {"include_usage": None}, {"continuous_usage_stats": None}])
async def test_options_of_nothing_ask_for_nothing(
    server: Running, stages: Stages, options: dict[str, None] | None
) -> None:
    events = line_by_line(await an_answer(server, stages, {**BODY, "stream_options": options}))
    assert not [event for event in events if "usage" in event or not event["choices"]]


@pytest.mark.parametrize("reader", KNOW_COMMENTS)
async def test_a_sign_of_life_hides_no_event(
    checkpoint: Path, redis_url: str, stages: Stages, reader: Callable[[bytes], list[Any]]
) -> None:
    async with running(checkpoint, redis_url, keep_alive_s=0.001) as server:
        heard = bytearray()
        asked = asyncio.create_task(read(server, BODY, heard))
        request = await stages.request()
        for seq in (1, 2, 3):
            silent = bytes(heard).count(b": keep-alive\n\n")
            await until(lambda silent=silent: bytes(heard).count(b": keep-alive\n\n") > silent)  # type: ignore[misc]
            await stages.say(request, Delta(request.id, seq, content=str(seq)))
        await stages.say(request, Delta(request.id, 4, finish_reason="stop", usage=USAGE))
        events = reader(await asked)
    assert "".join(delta.get("content", "") for delta in deltas(events)) == "123"
