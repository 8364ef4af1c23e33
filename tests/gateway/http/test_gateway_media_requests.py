"""Requests with pictures: uploads, and headers that wait until the media are accepted."""

import asyncio
import base64
import hashlib
from pathlib import Path

import httpx
import openai
import pytest
from asking import BAD_IMAGE, BROKEN, LOOK, ask, contents, overheard, said
from gateway_stages import USAGE, Running, Stages, running, until
from machine import PATIENCE_S
from redis.asyncio import Redis

from shared.bus.keys import Keys
from shared.messages import (
    Accepted,
    Content,
    Delta,
    Encode,
    Failed,
)


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
