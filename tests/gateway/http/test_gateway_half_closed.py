"""Clients that have said all and wait for their answer, and clients that have left: both close their side first."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from gateway_stages import Running, Stages, until
from machine import PATIENCE_S


def request(stream: bool, version: bytes = b"1.1") -> bytes:
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "stream": stream}).encode()
    return b"POST /v1/chat/completions HTTP/%b\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (version, len(body), body)


@asynccontextmanager
async def sent(server: Running, data: bytes) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    try:
        writer.write(data)
        yield reader, writer
    finally:
        writer.close()


async def rest(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(PATIENCE_S):
        return await reader.read()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_shuts_its_side_is_answered_and_then_closed(
    server: Running, stages: Stages, stream: bool
) -> None:
    async with sent(server, request(stream)) as (reader, writer):
        asked = await stages.request()
        writer.write_eof()
        if not stream:  # it is told that it is heard, which tells us whether it listens
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await stages.answer(asked, "all", " of it")
        reply = await rest(reader)
    assert reply.startswith(b"HTTP/1.1 200 ")
    assert b"of it" in reply
    await until(server.idle)


async def test_pipelined_requests_of_such_a_client_are_all_answered(server: Running, stages: Stages) -> None:
    async with sent(server, request(False) + request(False)) as (reader, writer):
        writer.write_eof()
        for _ in range(2):
            await stages.answer(await stages.request(), "x")
        assert (await rest(reader)).count(b"HTTP/1.1 200 ") == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_has_left_is_cancelled(server: Running, stages: Stages, stream: bool) -> None:
    async with sent(server, request(stream)) as (reader, _):
        asked = await stages.request()
        if stream:
            await reader.readuntil(b"assistant")  # nothing more is written until the engine's first token
    assert await stages.cancelled() == {asked.id}
    await until(server.idle)


async def test_a_client_of_http_1_0_cannot_be_asked_and_counts_as_left(server: Running, stages: Stages) -> None:
    async with sent(server, request(False, b"1.0")) as (_, writer):
        asked = await stages.request()
        writer.write_eof()
        assert await stages.cancelled() == {asked.id}


async def test_a_request_that_was_cut_off_is_none(server: Running) -> None:
    async with sent(server, request(False)[:-5]) as (reader, writer):
        writer.write_eof()
        assert b" 200 " not in await rest(reader)
    await until(server.idle)
