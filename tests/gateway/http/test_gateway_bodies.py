"""Bodies: what they may become once decoded, the memory that all of them share, and clients that send them slowly."""

import asyncio
import gc
import json
import random
import re
import string
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gateway_stages import Running, Stages, running, until
from machine import PATIENCE_S
from prometheus_client import Counter, Gauge

from services.gateway.http.memory import SMALL_BYTES, BodyMemory
from services.gateway.http.structure import MAX_CONTAINERS, MAX_DEPTH, MAX_DIGITS, MAX_VALUES, check_structure
from services.gateway.request.parsed import ParsedRequest
from services.gateway.settings import GatewaySettings
from shared.errors import ConfigError, RequestError
from shared.metrics import value

MIB = 1 << 20
HI: list[Any] = [{"role": "user", "content": "Hi"}]
URL = b'"data:image/png;base64,'


def metadata(json_value: bytes) -> bytes:
    return b'{"messages": [{"role": "user", "content": "Hi"}], "metadata": {"a": ' + json_value + b"}}"


def refusal(body: bytes, max_text: int = MIB) -> str | None:
    try:
        check_structure(body, max_text)
    except RequestError as error:
        return f"{error.failure.status}: {error.failure.message}"
    return None


# -------------------------------------------------------------------------------------------------------- structure


@pytest.mark.parametrize(
    ("body", "limit"),
    [
        (b"[" + b"[]," * MAX_CONTAINERS + b"0]", f"{MAX_CONTAINERS} lists and objects"),
        (b"{" + b'"":{},' * MAX_CONTAINERS + b'"":0}', f"{MAX_CONTAINERS} lists and objects"),
        (b"[" + b"0," * MAX_VALUES + b"0]", f"{MAX_VALUES} keys and values"),
        (b"{" + b'"":0,' * (MAX_VALUES // 2) + b'"":0}', f"{MAX_VALUES} keys and values"),
        (b'"' * (2 * MAX_VALUES + 1), f"{MAX_VALUES} keys and values"),
        (b"9" * (MAX_DIGITS + 1), f"{MAX_DIGITS} digits"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), f"{MAX_DEPTH} levels"),
        (b'{"a":' * (MAX_DEPTH + 1) + b"0" + b"}" * (MAX_DEPTH + 1), f"{MAX_DEPTH} levels"),
        (b'"' + b"x" * MIB + b'"', f"{MIB} bytes of text"),
        (b'"' + b'\\"data:' * (MIB // 7 + 1) + b'"', f"{MIB} bytes of text"),
        (b" " * (MIB + 1), f"{MIB} bytes of text"),
        (URL + "é".encode() * MIB + b'"', f"{MIB} bytes of text"),
        (URL + b"A" * MIB + b'\\ud83d\\ude00"', f"{MIB} bytes of text"),
    ],
)
def test_a_body_that_would_become_too_large(body: bytes, limit: str) -> None:
    status = 400 if "levels" in limit else 413
    assert re.fullmatch(f"{status}: The request body .* {limit}.*", refusal(metadata(body)) or "")


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"[]," * (MAX_CONTAINERS // 2) + b"0]",
        b"[" + b"0," * (MAX_VALUES // 2) + b"0]",
        b"[" * (MAX_DEPTH - 3) + b"]" * (MAX_DEPTH - 3),
        b'"' + b"[{,:9" * 150_000 + b'"',
        b'"' + b'\\"[{,:9' * 140_000 + b'"',
        b'"' + b'\\\\",{"a' * 2 + b'":"' + b'[{,:9\\\\\\"' * 100_000 + b'"}',
        URL + b"A" * 5 * MIB + b'"',
        URL + b"A/" * MIB + b'\\u003d\\u003d"',
        URL.upper() + b"A\\/" * MIB + b'"',
        b"[" + (URL + b"A" * MIB + b'",') * 4 + b"0]",
    ],
)
def test_a_body_that_is_large_by_its_strings_alone(body: bytes) -> None:
    assert refusal(metadata(body)) is None


def test_what_is_cut_into_slices_counts_as_it_would_uncut() -> None:
    """Strings, escapes and uploads that lie across the borders of slices, at every offset."""
    rng = random.Random(5)
    odd = ["\\", '"', "\\\\", '\\"', "[", "é", "data:", "\u2028"]
    for _ in range(10):
        texts = ["".join(rng.choices([*odd, *string.ascii_letters], k=rng.randrange(30_000))) for _ in range(8)]
        depth = rng.choice([MAX_DEPTH - 2, MAX_DEPTH + 1])
        nested: Any = texts
        for _ in range(depth - 1):
            nested = [nested]
        body = json.dumps(nested, ensure_ascii=rng.random() < 0.5).encode()
        assert (refusal(body, 1 << 30) is None) == (depth <= MAX_DEPTH)
        padding = rng.randrange(8)
        upload = b'{"' + b"p" * (65536 - padding) + b'":"data:' + b"A" * 300_000 + b'", "t":"' + b"t" * 1000 + b'"}'
        assert refusal(upload, len(upload) - 300_000) is None
        assert refusal(upload, len(upload) - 300_006) is not None


# ----------------------------------------------------------------------------------------------------------- memory


def test_the_memory_that_bodies_share() -> None:
    rejections = Counter("rejections", "Of this test", ("reason",), registry=None)
    held = Gauge("held", "Of this test", registry=None)
    memory = BodyMemory(8 * MIB, rejections, held)
    with memory.reservation() as first:
        first.grow(5 * MIB)
        with memory.reservation() as second:
            second.check(SMALL_BYTES)
            with pytest.raises(RequestError, match="no room") as full:
                second.check(2 * MIB)
            second.grow(SMALL_BYTES)
            assert value(held) == 6 * MIB
        assert value(held) == 5 * MIB
        first.release()
        assert value(held) == 0
        first.grow(6 * MIB)
        with pytest.raises(RequestError, match="no room"):
            first.grow(1)
    assert (full.value.failure.status, value(held), value(rejections)) == (429, 0, 2)


def test_one_body_must_fit() -> None:
    with pytest.raises(ConfigError, match="MILLRACE_MAX_BODIES_BYTES is 1000, of which large bodies may take 75%"):
        GatewaySettings(redis_url="", model="", max_body_bytes=751, max_bodies_bytes=1000)


def held(server: Running) -> int:
    """The bytes of bodies that a gateway holds."""
    return round(server.metric("millrace_request_body_bytes"))


async def test_memory_is_given_back_whatever_happens(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    small = {"max_body_bytes": 60_000, "max_bodies_bytes": 80_000, "body_timeout_s": PATIENCE_S}
    async with (
        running(checkpoint, redis_url, **small) as server,
        httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client,
    ):
        chat = "/v1/chat/completions"
        _, writer = await connect(server)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50000\r\n\r\n" + b" " * 40_000)
        await until(lambda: held(server) == 40_000)
        full = await client.post(chat, content=b" " * 50_000)
        assert (full.status_code, full.headers["retry-after"], full.json()["error"]["code"]) == (
            (429, "1", "rate_limit_exceeded")
        )
        assert server.metric('millrace_admission_rejections_total{reason="max_bodies_bytes"}') == 1
        writer.close()
        await until(lambda: held(server) == 0)
        for content, status in ((b"{", 400), (b"[" * 50_000, 400), (b" " * 60_001, 413)):
            assert (await client.post(chat, content=content)).status_code == status
            assert held(server) == 0

        def ask() -> asyncio.Task[Any]:
            key = {"Idempotency-Key": "one"}
            create = server.client.chat.completions.create
            return asyncio.create_task(create(model="demo-model", messages=HI, extra_headers=key))

        asked = ask()
        request = await stages.request()
        again = ask()
        await stages.attached()
        await until(lambda: held(server) == 0)  # while the answer is being written
        gc.collect()
        assert not [each for each in gc.get_objects() if type(each) is ParsedRequest]
        await stages.answer(request, "x")
        await asyncio.gather(asked, again)


# ------------------------------------------------------------------------------------------------------ slow clients


async def connect(server: Running) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))


async def test_slow_bodies_turn_nobody_away(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    slow = {"max_concurrency": 2, "body_timeout_s": PATIENCE_S, "body_stall_s": PATIENCE_S}
    async with running(checkpoint, redis_url, **slow) as server:
        writers = [(await connect(server))[1] for _ in range(20)]
        for writer in writers:
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n{")
        await until(lambda: server.gateway.load()["requests"] == 20)
        asked = asyncio.create_task(server.client.chat.completions.create(model="demo-model", messages=HI))
        await stages.answer(await stages.request(), "meanwhile")
        assert (await asked).choices[0].message.content == "meanwhile"
        for writer in writers:
            writer.close()
        await until(server.idle)


async def test_slots_are_counted_when_bodies_are_here(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    async with running(checkpoint, redis_url, max_concurrency=1) as server:
        reader, writer = await connect(server)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{")
        await until(lambda: server.gateway.load()["requests"] == 1)
        asked = asyncio.create_task(server.client.chat.completions.create(model="demo-model", messages=HI))
        request = await stages.request()
        writer.write(b"}")
        assert (await reader.readline()).startswith(b"HTTP/1.1 429")
        writer.close()
        await stages.answer(request, "x")
        await asked
        await until(server.idle)


async def test_a_body_that_stalls(checkpoint: Path, redis_url: str) -> None:
    """Most of it has come, fast; the rest drips."""
    async with running(checkpoint, redis_url, body_stall_s=0.2, body_timeout_s=PATIENCE_S) as server:
        reader, writer = await connect(server)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 900000\r\n\r\n" + b" " * 800_000
        )
        answered = asyncio.create_task(reader.read(4096))
        while not answered.done():
            writer.write(b" ")
            await asyncio.wait([answered], timeout=0.01)
        assert (await answered).startswith(b"HTTP/1.1 408")
        writer.close()


async def test_draining_waits_for_a_body_that_is_being_sent(server: Running, stages: Stages) -> None:
    reader, writer = await connect(server)
    body = json.dumps({"messages": HI}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    writer.write(head + body[:5])
    await until(lambda: server.gateway.load()["requests"] == 1)
    drained = asyncio.create_task(server.gateway.drain())
    with pytest.raises(openai.APIStatusError, match="shutting down"):
        await server.client.chat.completions.create(model="demo-model", messages=HI)
    writer.write(body[5:])
    await stages.answer(await stages.request(), "whole")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    await drained
    writer.close()
