"""Uploads: what they hold while they arrive is what was sent and not stored, and the memory for bodies counts it."""

import asyncio
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from batch_files import chat_line, jsonl
from gateway_stages import Running, Stages, running, until
from machine import PATIENCE_S
from redis.asyncio import Redis

from services.gateway.batches.files import CHUNK, FileLimits, FileStore
from services.gateway.batches.upload import FileWriter
from shared.bus.keys import Keys

HEAD = b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=b\r\n"
FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
PURPOSE = b'\r\n--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'
HI: list[Any] = [{"role": "user", "content": "Hi"}]


async def begin(server: Running, content: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The beginning of an upload whose rest does not come yet."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    writer.write(HEAD + b"content-length: 3000000\r\n\r\n" + FILE + content)
    return reader, writer


def held(server: Running) -> int:
    return round(server.metric("millrace_request_body_bytes"))


@pytest.fixture
async def server(checkpoint: Path, redis_url: str) -> AsyncIterator[Running]:
    small = {"max_body_bytes": 700_000, "max_text_bytes": 700_000, "max_bodies_bytes": 1_000_000}
    async with running(checkpoint, redis_url, body_stall_s=PATIENCE_S, body_timeout_s=PATIENCE_S, **small) as started:
        yield started


async def test_silent_uploads_hold_nothing(server: Running, stages: Stages) -> None:
    """A hundred of them: as many as would once have held all memory for bodies, and more."""
    silent = [await begin(server, b"") for _ in range(100)]
    await until(lambda: server.gateway.load()["requests"] == 100)
    assert held(server) == 0
    content = jsonl(chat_line("a"))
    assert (await server.client.files.create(file=("in.jsonl", content), purpose="batch")).bytes == len(content)
    asked = asyncio.create_task(server.client.chat.completions.create(model="demo-model", messages=HI))
    await stages.answer(await stages.request(), "x")
    await asked
    for _, writer in silent:
        writer.close()
    await until(server.idle)


async def test_a_silent_upload_ends(checkpoint: Path, redis_url: str, redis: Redis, keys: Keys) -> None:
    async with running(checkpoint, redis_url, body_stall_s=0.05) as server:
        for content in (b"", b"{"):
            reader, writer = await begin(server, content)
            assert (await reader.readline()).startswith(b"HTTP/1.1 408")
            writer.close()
            await until(server.idle)
            assert held(server) == 0
        assert await redis.hget(keys.file_sizes(), "all") in (None, b"0")


async def test_what_uploads_have_sent_is_counted_until_it_is_stored(server: Running) -> None:
    """Of the memory for bodies they may take the part of large ones, so that small requests pass."""
    begun = [await begin(server, b"x" * 300_000) for _ in range(2)]
    await until(lambda: held(server) == 600_000)
    reader, writer = await begin(server, b"x" * 300_000)
    assert (await reader.readline()).startswith(b"HTTP/1.1 429")
    writer.close()
    await until(lambda: held(server) == 600_000)
    with pytest.raises(openai.BadRequestError):  # read, and refused for another reason
        await server.client.chat.completions.create(model="demo-model", messages=HI, top_p=2)
    reader, writer = begun.pop()
    writer.close()
    await until(lambda: held(server) == 300_000)
    reader, writer = begun.pop()
    rest = b"x" * (3_000_000 - 300_000 - len(FILE) - len(PURPOSE))
    writer.write(rest + PURPOSE)
    assert (await reader.readline()).startswith(b"HTTP/1.1 429"), "a chunk and its copy are more than there is"
    writer.close()
    await until(server.idle)
    assert held(server) == 0


async def test_an_upload_that_has_stored_a_chunk_is_not_refused_any_more(checkpoint: Path, redis_url: str) -> None:
    """Whatever others take meanwhile: what its first chunk took stays its own until its end."""
    small = {"max_body_bytes": 3_000_000, "max_text_bytes": 3_000_000, "max_bodies_bytes": 4_000_000}
    patient = {"body_stall_s": PATIENCE_S, "body_timeout_s": PATIENCE_S}
    async with running(checkpoint, redis_url, **patient, **small) as server:
        filler = b"x" * (CHUNK + 1000)
        reader, writer = await begin(server, filler)
        await until(lambda: 2 * CHUNK < held(server) < 2 * CHUNK + 300_000)
        first = held(server)
        _, other = await begin(server, b"x" * 600_000)
        await until(lambda: held(server) == first + 600_000)
        third_reader, third = await begin(server, b"x" * 600_000)
        assert (await third_reader.readline()).startswith(b"HTTP/1.1 429"), "there is room for another"
        third.close()
        rest = 3_000_000 - len(FILE) - len(PURPOSE) - len(filler)
        writer.write(b"x" * rest + PURPOSE)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        for each in (writer, other):
            each.close()
        await until(server.idle)
        assert held(server) == 0


async def test_a_long_line_takes_no_memory(redis: Redis, keys: Keys) -> None:
    """16 MiB of one line go by while no more than a chunk, its copies, and a piece are here."""
    limits = FileLimits(3600, 1 << 26, 1 << 26, 1 << 26, 50_000, 16 << 20)
    writer = FileWriter(FileStore(redis, keys, limits), "file-up", "o")
    piece = b"x" * (64 << 10)
    await writer.write(piece)
    tracemalloc.start()
    try:
        most = 0
        for _ in range(16 * 16 - 1):
            most = max(most, writer.needs(piece))
            await writer.write(piece)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most == 2 * CHUNK
    assert peak < 6 * CHUNK
    assert (await writer.close("a", 3600)).bytes == 16 << 20


@pytest.mark.parametrize("chunks", ["x", str(1 << 62)])
async def test_a_file_whose_number_of_chunks_is_damaged_is_deleted(redis: Redis, keys: Keys, chunks: str) -> None:
    files = FileStore(redis, keys, FileLimits(3600, 1 << 26, 1 << 26, 1 << 26, 50_000, 16 << 20))
    await files.write("file-up", "o", 0, b"piece")
    await redis.hset(keys.file("file-up"), "chunks", chunks)
    await files.delete("file-up")
    assert await files.size("file-up") is None
    assert await redis.zcard(keys.files()) == 0


@pytest.mark.parametrize("size", ["x", "-1", "1.5", "nan", "1e300", str(1 << 62)])
async def test_a_file_whose_size_is_damaged_is_deleted_and_leaves_the_budget(
    redis: Redis, keys: Keys, size: str
) -> None:
    files = FileStore(redis, keys, FileLimits(3600, 1 << 26, 1 << 26, 1 << 26, 50_000, 16 << 20))
    await files.write("file-up", "o", 0, b"piece")
    before = int(await redis.hget(keys.file_sizes(), "all") or b"")
    await redis.hset(keys.file_sizes(), "file-up", size)
    await files.delete("file-up")
    assert await redis.zcard(keys.files()) == 0
    assert 0 <= int(await redis.hget(keys.file_sizes(), "all") or b"") <= before
    await files.write("file-up", "o", 0, b"piece")
    assert await files.size("file-up") == 5
