"""The `openai` client's `files` and `batches`, with a stand-in for the other stages."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from batch_files import CHAT, answering, chat_line, create, ended, jsonl, lines_of, upload
from gateway_stages import Running, Stages, running, until
from machine import PATIENCE_S
from redis.asyncio import Redis

from services.gateway.batches.runner import MOST_AT_A_TIME
from shared.bus.keys import GENERATE, Keys
from shared.messages import BATCH_PRIORITY, Request


@pytest.fixture
async def server(checkpoint: Path, redis_url: str) -> AsyncIterator[Running]:
    async with running(checkpoint, redis_url, api_keys=("key-1", "key-2"), lease_ms=1500) as started:
        yield started


async def lives_of_keys(redis: Redis, keys: Keys) -> list[int]:
    """Return for how many seconds each idempotency key is kept."""
    return [await redis.ttl(key) async for key in redis.scan_iter(match=keys.idempotency("*"))]


async def test_a_batch_from_file_to_output(server: Running, stages: Stages) -> None:
    requests: list[Request] = []
    content = jsonl(*(chat_line(f"{n}", f"{n}?") for n in range(5)))
    async with answering(stages, requests.append):
        batch = await create(server, content, metadata={"for": "tests"})
        assert (batch.status, batch.metadata) == ("validating", {"for": "tests"})
        assert batch.expires_at == batch.created_at + 86400
        batch = await ended(server, batch.id)
    assert batch.status == "completed", batch
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 5, "completed": 5, "failed": 0}
    assert None not in (batch.in_progress_at, batch.finalizing_at, batch.completed_at)
    assert batch.error_file_id is None
    found = await lines_of(server, batch.output_file_id)
    assert sorted(found) == ["0", "1", "2", "3", "4"]
    for line in found.values():
        assert line["error"] is None
        assert line["response"]["status_code"] == 200
        assert line["response"]["body"]["object"] == "chat.completion"
        assert line["response"]["body"]["choices"][0]["message"]["content"] == "yes"
    assert {request.share.priority for request in requests if request.share} == {BATCH_PRIORITY}
    assert len(requests) == 5
    assert server.metric('millrace_batch_lines_total{outcome="completed"}') == 5


@pytest.mark.parametrize("cancelled", [False, True])
async def test_keys_of_lines_go_with_their_answers(
    server: Running, stages: Stages, redis: Redis, keys: Keys, cancelled: bool
) -> None:
    """And not a day after the batch's window."""
    batch = await create(server, jsonl(*map(chat_line, "abc")))
    requests = [await stages.request() for _ in range(3)]
    lives = await lives_of_keys(redis, keys)
    assert len(lives) == 3
    assert min(lives) > 86400
    if cancelled:
        await server.client.batches.cancel(batch.id)
    else:
        for request in requests:
            await stages.answer(request, "yes")
    assert (await ended(server, batch.id)).status == ("cancelled" if cancelled else "completed")
    lives = await lives_of_keys(redis, keys)
    assert len(lives) == 3
    assert max(lives) <= 60, "retain_s"


async def test_any_file_of_lines_and_a_bad_line_among_good_ones(server: Running, stages: Stages) -> None:
    """Unicode, CRLF, a byte order mark, blank lines, no last line end; and a body that its API refuses."""
    lines = [chat_line("früh ☕", "Grüße"), chat_line("hot", top_p=2), chat_line("streams", stream=True)]
    texts = [json.dumps(line, ensure_ascii=False) for line in [*lines, chat_line("last")]]
    content = b"\xef\xbb\xbf" + "\r\n\r\n".join(texts).encode() + b"\r\n   "
    async with answering(stages):
        batch = await ended(server, (await create(server, content)).id)
    assert batch.status == "completed", batch
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 4, "completed": 2, "failed": 2}
    assert set(await lines_of(server, batch.output_file_id)) == {"früh ☕", "last"}
    errors = await lines_of(server, batch.error_file_id)
    told = {name: (line["response"]["status_code"], line["response"]["body"]["error"]) for name, line in errors.items()}
    assert told["hot"][0] == told["streams"][0] == 400
    assert told["hot"][1]["param"] == "top_p"
    assert told["streams"][1]["param"] == "stream"


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b'{"custom_id": "a", "url": "/v1/chat/completions"}', "invalid_line", None),
        (jsonl({**chat_line("a"), "custom_id": ""}), "invalid_line", None),
        (jsonl({**chat_line("a"), "body": []}), "invalid_line", "body"),
        (jsonl({**chat_line("a"), "url": "/v1/completions"}), "mismatched_endpoint", "url"),
        (jsonl({**chat_line("a"), "method": "GET"}), "invalid_method", "method"),
        (jsonl(chat_line("good")), "duplicate_custom_id", "custom_id"),
        (b'{"custom_id": "\xff"}', "invalid_json_line", None),
    ],
)
async def test_a_line_that_is_no_request_fails_the_batch(
    server: Running, stages: Stages, line: bytes, code: str, param: str | None
) -> None:
    batch = await ended(server, (await create(server, jsonl(chat_line("good")) + line)).id)
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert batch.errors is not None
    assert batch.errors.data is not None
    [error] = batch.errors.data
    assert (error.line, error.code, error.param) == (2, code, param)
    assert error.message
    assert await stages.redis.xlen(stages.keys.stream(GENERATE)) == 0


@pytest.mark.parametrize(
    ("endpoint", "body", "kind"),
    [
        ("/v1/completions", {"prompt": "Once", "max_tokens": 4}, "text_completion"),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 4}, "response"),
    ],
)
async def test_the_other_endpoints(
    server: Running, stages: Stages, endpoint: str, body: dict[str, Any], kind: str
) -> None:
    line = {"custom_id": "1", "method": "POST", "url": endpoint, "body": body}
    async with answering(stages):
        batch = await ended(server, (await create(server, jsonl(line), endpoint=endpoint)).id)
    found = await lines_of(server, batch.output_file_id)
    assert found["1"]["response"]["body"]["object"] == kind
    assert "yes" in json.dumps(found["1"]["response"]["body"])


async def test_cancel(server: Running, stages: Stages) -> None:
    batch = await create(server, jsonl(*map(chat_line, "abc")))
    requests = [await stages.request() for _ in range(3)]
    await stages.answer(requests[0], "yes")
    async with asyncio.timeout(PATIENCE_S):
        while server.metric('millrace_batch_lines_total{outcome="completed"}') < 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (await server.client.batches.cancel(batch.id)).status in ("cancelling", "cancelled")
    batch = await ended(server, batch.id)
    assert (batch.status, batch.request_counts and batch.request_counts.completed) == ("cancelled", 1)
    assert batch.cancelling_at is not None
    assert batch.cancelled_at is not None
    assert await stages.cancelled() >= {request.id for request in requests[1:]}
    assert len(await lines_of(server, batch.output_file_id)) == 1
    with pytest.raises(openai.ConflictError):
        await server.client.batches.cancel(batch.id)


async def test_a_batch_expires(server: Running, stages: Stages, redis: Redis, keys: Keys) -> None:
    """Its window is moved into the past while nobody works on it."""
    batch = await create(server, jsonl(*map(chat_line, "ab")))
    first, second = await stages.take(2)
    await stages.answer(first.request, "yes")
    await until(lambda: server.metric('millrace_batch_lines_total{outcome="completed"}') == 1)
    await server.gateway._batches.drain()
    about = json.loads(await redis.hget(keys.batch(batch.id), "about") or b"")
    await redis.hset(keys.batch(batch.id), "about", json.dumps({**about, "expires_at": about["created_at"] - 1}))
    server.gateway._batches._draining = False
    batch = await ended(server, batch.id)
    assert (batch.status, batch.expired_at is None) == ("expired", False)
    assert await stages.cancelled() == {second.request.id}
    assert len(await lines_of(server, batch.output_file_id)) == 1
    [line] = (await lines_of(server, batch.error_file_id)).values()
    assert line["response"] is None
    assert line["error"]["code"] == "batch_expired"
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 2, "completed": 1, "failed": 0}


async def test_another_gateway_goes_on_and_sends_no_line_twice(
    server: Running, checkpoint: Path, redis_url: str, stages: Stages, redis: Redis, keys: Keys
) -> None:
    """The first gateway leaves in the middle, as in a rolling update; its lines that run go on."""
    settings: dict[str, Any] = {"api_keys": ("key-1", "key-2"), "lease_ms": 1500, "batch_concurrency": 2}
    async with running(checkpoint, redis_url, name="first", **settings) as first:
        await server.gateway._batches.drain()  # so that the first has it
        batch = await create(first, jsonl(*map(chat_line, "abcd")))
        begun = [await stages.request() for _ in range(2)]
    server.gateway._batches._draining = False
    for request in begun:
        attach = await stages.attached()
        assert attach.request_id in {each.id for each in begun}
        await stages.answer(msgspec.structs.replace(request, id=attach.request_id, gateway=attach.gateway), "yes")
    async with answering(stages):
        batch = await ended(server, batch.id)
    assert batch.status == "completed"
    assert len(await lines_of(server, batch.output_file_id)) == 4
    assert await redis.xlen(keys.stream(GENERATE)) == 4


async def test_a_key_that_holds_every_place_makes_room_for_another(server: Running, stages: Stages) -> None:
    for _ in range(MOST_AT_A_TIME):
        await create(server, jsonl(chat_line("a")))
    begun = [await stages.request() for _ in range(MOST_AT_A_TIME)]
    client = server.client.with_options(api_key="key-2")
    other = Running(server.gateway, server.url, server.registry, client)
    batch = await create(other, jsonl(chat_line("a")))
    await stages.answer(await stages.request(), "yes")
    assert (await ended(other, batch.id)).status == "completed"
    assert await stages.redis.xlen(stages.keys.stream(GENERATE)) == len(begun) + 1, "what was given up runs on, once"


async def test_files_and_batches_are_their_owners_alone(server: Running, stages: Stages) -> None:
    async with answering(stages):
        batch = await ended(server, (await create(server, jsonl(chat_line("a")))).id)
    stranger = server.client.with_options(api_key="key-2")
    for file_id in (batch.input_file_id, batch.output_file_id or ""):
        with pytest.raises(openai.NotFoundError):
            await stranger.files.retrieve(file_id)
        with pytest.raises(openai.NotFoundError):
            await stranger.files.content(file_id)
        with pytest.raises(openai.NotFoundError):
            await stranger.files.delete(file_id)
    with pytest.raises(openai.NotFoundError):
        await stranger.batches.retrieve(batch.id)
    with pytest.raises(openai.NotFoundError):
        await stranger.batches.cancel(batch.id)
    with pytest.raises(openai.NotFoundError):
        await stranger.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")
    assert [file async for file in stranger.files.list()] == []
    assert [each async for each in stranger.batches.list()] == []
    assert {file.purpose async for file in server.client.files.list()} == {"batch", "batch_output"}


async def test_lists_and_what_a_file_says(server: Running) -> None:
    await server.gateway._batches.drain()
    content = jsonl(chat_line("a"))
    names = [await upload(server, content) for _ in range(3)]
    assert [file.id async for file in server.client.files.list(limit=2, order="asc")] == names
    batches = [
        (await server.client.batches.create(input_file_id=name, endpoint=CHAT, completion_window="1h")).id
        for name in names
    ]
    assert {batch.id async for batch in server.client.batches.list(limit=1)} == set(batches)
    file = await server.client.files.retrieve(names[0])
    assert (file.filename, file.bytes, file.purpose, file.status) == ("in.jsonl", len(content), "batch", "processed")
    assert (await server.client.files.content(file.id)).content == content
    assert (await server.client.files.delete(file.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await server.client.files.retrieve(file.id)
    short = await server.client.files.create(
        file=("x", content), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert short.expires_at == short.created_at + 3600


async def test_a_batch_whose_input_is_deleted_fails(server: Running, stages: Stages) -> None:
    await server.gateway._batches.drain()
    batch = await create(server, jsonl(chat_line("a")))
    await server.client.files.delete(batch.input_file_id)
    server.gateway._batches._draining = False
    batch = await ended(server, batch.id)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [error.code for error in batch.errors.data] == ["input_file_not_found"]


async def form(server: Running, body: bytes, kind: str = "multipart/form-data; boundary=b", **headers: str) -> Any:
    """The status and the error of an upload as a form that no client makes."""
    told = {"content-type": kind, "authorization": "Bearer key-1", **headers}
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        reply = await client.post(f"{server.url}/v1/files", content=body, headers=told)
    return reply.status_code, reply.json().get("error", {}).get("param")


def part(name: str, content: bytes, filename: str = "") -> bytes:
    told = f'; filename="{filename}"' if filename else ""
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{told}\r\n\r\n'.encode() + content + b"\r\n"


async def test_forms_that_are_refused(server: Running, redis: Redis) -> None:
    end, file, purpose = b"--b--\r\n", part("file", jsonl(chat_line("a")), "a"), part("purpose", b"batch")
    assert await form(server, file + purpose + end) == (200, None)  # in either order
    assert await form(server, purpose + file + end, origin=server.url) == (200, None)
    assert await form(server, purpose + file + end, origin="https://elsewhere.example") == (403, "Origin")
    assert await form(server, file + end) == (400, "purpose")
    assert await form(server, purpose + end) == (400, "file")
    assert await form(server, purpose + file) == (400, "file")
    assert await form(server, purpose + purpose + file + end) == (400, "purpose")
    assert await form(server, file + file + purpose + end) == (400, "file")
    assert await form(server, part("purpose", b"vision") + file + end) == (400, "purpose")
    assert await form(server, purpose + part("file", b" \r\n\n", "a") + end) == (400, "file")
    for name in ("a\x00b", "a\x1b[31m", "a\x7f", "a\x85"):
        assert await form(server, purpose + part("file", b"x", name) + end) == (400, "file"), ascii(name)
    assert await form(server, b"{}", "application/json") == (415, "Content-Type")
    assert await form(server, b"nothing of the kind") == (400, "file")
    assert await form(server, part("x", b"y" * 5000) + end) == (400, "x")
    assert await form(server, purpose + file + end, origin="http://[") == (403, "Origin")
    for seconds in (b"1", b"0000000036009999", b"9" * 5000):
        kept = part("expires_after[seconds]", seconds)
        assert (await form(server, purpose + file + kept + end))[0] == 400, seconds[:20]
    assert len([file async for file in server.client.files.list()]) == 2
    assert int(await redis.hget("test:files:sizes", "all") or 0) == sum(
        [file.bytes + 1024 async for file in server.client.files.list()]
    )


async def test_limits_of_files(checkpoint: Path, redis_url: str, redis: Redis) -> None:
    settings: dict[str, Any] = {"max_file_bytes": 3000, "max_batch_lines": 4, "max_batch_line_bytes": 1000}
    async with running(checkpoint, redis_url, files_budget_bytes=4000, **settings) as server:
        for content, code in (
            (b"x" * 1001, "line_too_long"),
            (b"x" * 900 + b"\n" + b"y" * 900 + b"\n" + b"z" * 900 + b"\n" + b"z" * 900, "file_too_large"),
            (b"x\n" * 5, "file_too_large"),
            (b"x\n\n\n\n\nx", "file_too_large"),
        ):
            with pytest.raises(openai.APIStatusError) as refused:
                await upload(server, content)
            assert (refused.value.status_code, refused.value.code) == (413, code)
        assert await redis.hget("test:files:sizes", "all") in (None, b"0")
        name = await upload(server, (b"x" * 900 + b"\n") * 2)
        with pytest.raises(openai.APIStatusError) as refused:
            await upload(server, b"x" * 900)
        assert (refused.value.status_code, refused.value.code) == (413, "files_budget_exceeded")
        await server.client.files.delete(name)
        assert await upload(server, b"x\n" * 4)


async def test_a_key_has_so_many_files_at_most(
    server: Running, redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.batches.files.MOST_FILES", 2)
    first, _ = [await upload(server, b"x") for _ in range(2)]
    with pytest.raises(openai.APIStatusError) as refused:
        await upload(server, b"x")
    assert (refused.value.status_code, refused.value.code) == (413, "too_many_files")
    await server.client.with_options(api_key="key-2").files.create(file=("in.jsonl", b"x"), purpose="batch")
    await redis.zadd(keys.files(), {first: 1})  # it is over
    await upload(server, b"x")


async def test_a_result_waits_for_room(
    checkpoint: Path, redis_url: str, stages: Stages, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(checkpoint, redis_url, files_budget_bytes=4000, lease_ms=1500) as server, answering(stages):
        other = await upload(server, b"x" * 1200)
        batch = await create(server, jsonl(chat_line("a")))
        await until(lambda: "no room in files" in caplog.text)
        assert (await server.client.batches.retrieve(batch.id)).status == "in_progress"
        await server.client.files.delete(other)
        batch = await ended(server, batch.id)
        assert batch.status == "completed"
        assert len(await lines_of(server, batch.output_file_id)) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/messages"}, "endpoint"),
        ({"completion_window": "1 day"}, "completion_window"),
        ({"completion_window": "8d"}, "completion_window"),
        ({"completion_window": "24h\n"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after"),
    ],
)
async def test_batches_that_are_refused(server: Running, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await create(server, jsonl(chat_line("a")), **fields)
    assert refused.value.param == param
    assert [each async for each in server.client.batches.list()] == []
