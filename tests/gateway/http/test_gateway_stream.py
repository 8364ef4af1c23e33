"""Deltas on their way to a client: written at once from the inbox's turn, or by the client's task; the same bytes."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway_stages import USAGE, Stages, running, until
from machine import PATIENCE_S

from services.gateway.dialects.chat import ChatDialect
from services.gateway.http.protocol import ChunkedBody
from services.gateway.http.stream import StreamWriter
from services.gateway.inflight.request import OpenRequest
from services.gateway.request.answer_format import AnswerFormat
from shared.errors import Failure
from shared.messages import Delta, PromptLogprobs, ToolDelta

DELTAS = [
    Delta("r", 1, reasoning="hm", start=0),
    Delta("r", 2, content="a", start=1),
    Delta("r", 3, content='b\n"\u2028', start=2),
    Delta("r", 4, tool_calls=(ToolDelta(0, "c", "f", '{"x":'),), start=3),
    Delta("r", 5, tool_calls=(ToolDelta(0, None, None, "1}"),), start=4),
    Delta("r", 6, content="c", start=5),
    Delta("r", 7, finish_reason="tool_calls", usage=USAGE, start=6),
]


class Client:
    """A connection: what it was sent at once, what by the task, and both in order. It lags while it does not read."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.reads.set()
        self.at_once: list[bytes] = []
        self.all: list[bytes] = []

    @property
    def is_ready(self) -> bool:
        return self.reads.is_set()

    @property
    def is_chunked(self) -> bool:
        return True

    def write(self, data: bytes) -> None:
        self.at_once.append(data)
        self.all.append(data)

    def abort(self) -> None:
        raise AssertionError

    async def send(self, message: Any) -> None:
        await self.reads.wait()
        self.all.append(message["body"])


@asynccontextmanager
async def stream(
    client: Client, direct: bool = True, max_pending: int = 1 << 20, event_ids: bool = False, **form: Any
) -> AsyncIterator[tuple[OpenRequest, "asyncio.Task[None]"]]:
    """An open request whose client's task waits for deltas."""
    request = OpenRequest("r", AnswerFormat(**form), True, 0.0, 60.0, max_pending, 0.0)
    writer = StreamWriter(
        request, ChatDialect().events(request, "fp", event_ids), client.send, client if direct else None
    )
    task = asyncio.create_task(writer.run())
    await turn()
    try:
        yield request, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def turn() -> None:
    """Let the client's task do what it can."""
    for _ in range(5):
        await asyncio.sleep(0)


async def written(deltas: Sequence[Delta], size: int, direct: bool, event_ids: bool) -> list[bytes]:
    """The parts of a body, if deltas come in messages of `size`."""
    client = Client()
    async with stream(client, direct, event_ids=event_ids) as (request, task):
        for start in range(0, len(deltas), size):
            request.choices[0].add(deltas[start : start + size], 1.0)
            await turn()
        await asyncio.wait_for(task, PATIENCE_S)
    assert bool(client.at_once) == (direct and size < len(deltas))
    return client.all


@pytest.mark.parametrize("event_ids", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
async def test_both_ways_write_the_same_bytes(size: int, event_ids: bool) -> None:
    at_once = await written(DELTAS, size, True, event_ids)
    assert at_once == await written(DELTAS, size, False, event_ids)
    assert len(at_once) == -(-len(DELTAS) // size)


async def test_a_delta_is_written_before_anything_else_runs() -> None:
    client = Client()
    async with stream(client) as (request, _):
        request.choices[0].add(DELTAS[:1], 1.0)
        assert b"hm" in client.all[0]
        assert request.client_has_id


async def test_the_end_follows_what_was_written_at_once() -> None:
    client = Client()
    async with stream(client) as (request, task):
        request.choices[0].add(DELTAS[:6], 1.0)
        request.choices[0].add(DELTAS[6:], 1.0)
        await asyncio.wait_for(task, PATIENCE_S)
    assert client.at_once == client.all[:-1]
    assert b"tool_calls" in client.all[-1]


async def test_an_end_of_one_choice_does_not_end_the_others() -> None:
    client = Client()
    async with stream(client, n=2) as (request, task):
        first, second = request.choices
        first.add([Delta("r", 1, finish_reason="stop", usage=USAGE)], 1.0)
        await turn()
        second.add([Delta("r-1", 1, content="b")], 1.0)
        assert b'"index":1' in client.at_once[-1]
        second.add([Delta("r-1", 2, finish_reason="stop", usage=USAGE, start=1)], 1.0)
        await asyncio.wait_for(task, PATIENCE_S)


async def test_a_client_that_lags_gets_all_in_order() -> None:
    client = Client()
    async with stream(client) as (request, task):
        request.choices[0].add(DELTAS[:1], 1.0)
        client.reads.clear()
        request.choices[0].add(DELTAS[1:2], 1.0)  # which the task takes, and waits with
        await turn()
        request.choices[0].add(DELTAS[2:4], 1.0)
        await turn()
        assert len(client.all) == 1
        client.reads.set()
        request.choices[0].add(DELTAS[4:5], 1.0)  # the task has not written the others yet
        assert len(client.all) == 1
        await turn()
        request.choices[0].add(DELTAS[5:6], 1.0)
        request.choices[0].add(DELTAS[6:], 1.0)
        await asyncio.wait_for(task, PATIENCE_S)
    assert len(client.at_once) == 2, "at once before it lagged, and again when it has all"
    body = b"".join(client.all)
    places = [
        body.index(part)
        for part in (b"hm", b'"a"', b"b\\n", b'"name":"f"', b'"1}"', b'"content":"c"', b'"tool_calls"}')
    ]
    assert places == sorted(places)


async def test_a_client_that_lags_too_far_is_cut_off_and_one_that_reads_is_not() -> None:
    for reads in (True, False):
        client = Client()
        async with stream(client, max_pending=10_000) as (request, _):
            if not reads:
                client.reads.clear()
            for seq in range(100):
                request.choices[0].add([Delta("r", seq + 1, content="x" * 1000, start=seq)], 1.0)
            assert request.queue.overflowed.is_set() is not reads


async def test_one_message_may_be_larger_than_what_may_wait() -> None:
    client = Client()
    async with stream(client, max_pending=10) as (request, _):
        many = [Delta("r", seq + 1, content="x" * 1000, start=seq) for seq in range(100)]
        request.choices[0].add(many, 1.0)
        assert not request.queue.overflowed.is_set()
        assert len(client.at_once) == 1


async def test_what_takes_long_is_left_to_the_task() -> None:
    client = Client()
    async with stream(client, prompt_logprobs=True) as (request, _):
        scores = PromptLogprobs(0, b"", b"", b"")
        request.choices[0].add([Delta("r", 1, content="a", prompt_logprobs=scores)], 1.0)
        assert not client.all
        await until(lambda: bool(client.all))
        assert not client.at_once


async def test_a_failure_is_behind_what_came_before_it() -> None:
    client = Client()
    async with stream(client) as (request, task):
        failure = Failure(500, "It broke.")
        request.choices[0].add([*DELTAS[:2], Delta("r", 3, failure=failure, start=2)], 1.0)
        await asyncio.wait_for(task, PATIENCE_S)
    assert not client.at_once
    assert b'"a"' in client.all[0]


async def test_an_error_is_that_of_the_clients_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the inbox, which all other clients need."""
    client = Client()

    def broken(_self: StreamWriter, _deltas: object) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr(StreamWriter, "_format", broken)
    async with stream(client) as (request, task):
        request.choices[0].add(DELTAS[:1], 1.0)
        request.choices[0].add(DELTAS[1:2], 1.0)
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(task, PATIENCE_S)


async def test_so_is_one_in_text_behind_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()

    def broken(_data: bytes) -> None:
        raise ZeroDivisionError

    async with stream(client) as (request, task):
        choice = request.choices[0]
        choice.add(DELTAS[:1], 1.0)
        monkeypatch.setattr(client, "write", broken)
        assert choice.add(DELTAS[2:3], 1.0), "it is not the next one"
        assert choice.writer is not None
        choice.add(DELTAS[1:2], 1.0)
        assert choice.writer is None
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(task, PATIENCE_S)


async def test_text_does_not_pass_a_sign_of_life_nor_the_end() -> None:
    client = Client()
    async with stream(client) as (request, task):
        choice = request.choices[0]
        choice.add(DELTAS[:1], 1.0)
        assert choice.writer is not None
        request.keep_alive(1.0)
        choice.add(DELTAS[1:2], 1.0)
        assert len(client.all) == 1
        await turn()
        assert b'"a"' in client.all[1]
        choice.add(DELTAS[2:3], 1.0)
        assert choice.writer is not None
        request.fail(None, Failure(500, "It broke."))
        assert choice.writer is None
        await asyncio.wait_for(task, PATIENCE_S)
    assert len(client.at_once) == 2


async def test_a_stream_over_http_is_written_at_once(
    checkpoint: Path, redis_url: str, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once: list[bytes] = []
    write = ChunkedBody.write

    def noted(body: ChunkedBody, data: bytes) -> None:
        at_once.append(data)
        write(body, data)

    monkeypatch.setattr(ChunkedBody, "write", noted)
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    async with (
        running(checkpoint, redis_url) as server,
        httpx.AsyncClient(timeout=PATIENCE_S) as client,
        client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as reply,
    ):
        parts = reply.aiter_text()
        text = await anext(parts)  # the gateway has been told that it is sent, and waits for what is said
        await stages.answer(await stages.request(), *"abc")
        text += "".join([part async for part in parts])
    assert 1 <= len(at_once) <= 3
    assert [part for part in text.split("\n\n") if '"content":"' in part and '"role"' not in part] == [
        part for data in at_once for part in data.decode().strip().split("\n\n")
    ]
    assert text.endswith("data: [DONE]\n\n")
