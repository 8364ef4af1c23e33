"""The Messages API at a running gateway: the anthropic package, a real Redis; the test plays every other stage."""

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway_stages import USAGE, Running, Stages, running, until
from machine import PATIENCE_S
from redis.asyncio import Redis

from services.gateway.errors import SHUTTING_DOWN
from shared.bus.keys import Keys
from shared.errors import Failure
from shared.messages import Accepted, Delta, Encode, Failed, Generate, ToolDelta, unpack_ids

anthropic = pytest.importorskip("anthropic", reason="needs the extra test")

HI: list[Any] = [{"role": "user", "content": "Hi"}]
PIXELS = base64.b64encode(b"pixels").decode()
LOOK: list[Any] = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Look."},
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXELS}},
        ],
    }
]
BODY = {"model": "demo-model", "max_tokens": 50, "messages": HI}


@pytest.fixture
async def client(server: Running) -> AsyncIterator[Any]:
    async with client_of(server) as made:
        yield made


def client_of(server: Running, key: str = "key-1") -> Any:
    return anthropic.AsyncAnthropic(base_url=server.url, api_key=key, max_retries=0, timeout=PATIENCE_S)


def ask(client: Any, messages: list[Any] = HI, **fields: Any) -> "asyncio.Task[Any]":
    """A request under way."""
    return asyncio.create_task(client.messages.create(**{**BODY, "messages": messages, **fields}))


async def post(server: Running, path: str = "/v1/messages", body: Any = BODY, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(timeout=PATIENCE_S) as raw:
        return await raw.post(f"{server.url}{path}", json=body, headers=headers)


def error_of(reply: httpx.Response) -> Any:
    """The error of a body that is in this API's form."""
    body = anthropic.types.ErrorResponse.model_validate_json(reply.content)
    assert body.type == "error"
    assert reply.headers["request-id"] == reply.headers["x-request-id"]
    return body.error


async def finish(stages: Stages, request: Any, **fields: Any) -> None:
    """Deltas of an answer with reasoning, text and a call."""
    call = (ToolDelta(0, "call_1", "f", ""), ToolDelta(0, None, None, '{"a": 1}'))
    await stages.say(request, Delta(request.id, 1, reasoning="Hm.", usage=USAGE))
    await stages.say(request, Delta(request.id, 2, content="Hel"))
    await stages.say(request, Delta(request.id, 3, content="lo.", tool_calls=call))
    last = {"finish_reason": "tool_calls", "usage": USAGE, **fields}
    await stages.say(request, Delta(request.id, 4, **last))


@pytest.mark.parametrize("form", ["whole", "streamed", "stream helper"])
async def test_an_answer(client: Any, stages: Stages, form: str) -> None:
    async def read() -> Any:
        if form == "whole":
            return await client.messages.create(**BODY)
        async with client.messages.stream(**BODY) as stream:
            if form == "stream helper":
                kinds = {event.type async for event in stream}
                assert {"thinking", "signature", "text", "input_json", "content_block_stop"} < kinds
            return await stream.get_final_message()

    asked = asyncio.create_task(read())
    (work,) = await stages.take()
    assert isinstance(work, Generate)
    assert (work.max_tokens, work.request.output.first_usage) == (50, True)
    await finish(stages, work.request)
    message = await asked
    thinking, text, call = message.content
    assert (message.id, message.model, message.stop_reason) == (f"msg_{work.request.id}", "demo-model", "tool_use")
    assert (thinking.thinking, text.text, call.name, call.input) == ("Hm.", "Hello.", "f", {"a": 1})
    assert thinking.signature
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (7, 4)
    assert (message.usage.output_tokens, message.usage.output_tokens_details.thinking_tokens) == (3, 1)
    if form == "whole":
        assert message._request_id


async def test_the_stop_sequence_that_was_met_is_named(client: Any, stages: Stages) -> None:
    asked = ask(client, stop_sequences=["END", "STOP"])
    request = await stages.request()
    assert request.output.stop == ("END", "STOP")
    await stages.say(request, Delta(request.id, 1, content="a", finish_reason="stop", stop="STOP", usage=USAGE))
    message = await asked
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "STOP")


async def test_a_sign_of_life_is_a_ping(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    async with (
        running(checkpoint, redis_url, keep_alive_s=0.05) as server,
        httpx.AsyncClient(timeout=PATIENCE_S) as raw,
    ):
        sent = raw.stream("POST", f"{server.url}/v1/messages", json={**BODY, "stream": True})
        async with sent as reply:
            lines = reply.aiter_lines()
            request = await stages.request()
            assert [await anext(lines) for _ in range(3)] == ["event: ping", 'data: {"type":"ping"}', ""]
            await stages.answer(request, "x")
            text = [line async for line in lines]
        assert text[-3:] == ["event: message_stop", 'data: {"type":"message_stop"}', ""]


async def test_a_failure_inside_a_stream(client: Any, stages: Stages) -> None:
    stream = await client.messages.create(**BODY, stream=True)
    request = await stages.request()
    await stages.say(request, Delta(request.id, 1, content="a", usage=USAGE))
    await anext(aiter(stream))
    await stages.say(request, Delta(request.id, 2, failure=SHUTTING_DOWN))
    with pytest.raises(anthropic.APIStatusError) as raised:
        async for _ in stream:
            pass
    assert raised.value.body["error"]["type"] == "overloaded_error"


async def test_a_client_that_leaves_cancels_its_request(client: Any, stages: Stages, server: Running) -> None:
    stream = await client.messages.create(**BODY, stream=True)
    request = await stages.request()
    await stages.say(request, Delta(request.id, 1, content="a", usage=USAGE))
    await anext(aiter(stream))
    await stream.close()
    assert await stages.cancelled() == {request.id}
    await until(server.idle)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_past_its_deadline(client: Any, server: Running, stages: Stages, stream: bool) -> None:
    async def read() -> Any:
        reply = await client.messages.create(**BODY, stream=stream)
        return [event async for event in reply]

    asked = asyncio.create_task(read())
    await stages.request()
    server.ahead_s = 1000.0
    with pytest.raises(anthropic.APIStatusError) as raised:
        await asked
    assert raised.value.body["error"]["type"] == "timeout_error"


async def test_a_key_gives_the_answer_of_the_first_request(server: Running, client: Any, stages: Stages) -> None:
    fields = {"extra_headers": {"Idempotency-Key": "k"}}
    first = ask(client, **fields)
    request = await stages.request()
    second = asyncio.create_task(post(server, body={**BODY, "stream": True}, **{"idempotency-key": "k"}))
    assert (await stages.attached()).request_id == request.id
    await stages.keep(request)
    await finish(stages, request)
    events = (await second).text
    assert (await first).id in events
    assert "id: " not in [line[:4] for line in events.splitlines()]
    with pytest.raises(anthropic.ConflictError):
        await ask(client, max_tokens=3, **fields)


async def test_another_apis_route_does_not_resume_it(server: Running, client: Any, stages: Stages) -> None:
    asked = ask(client)
    request = await stages.request()
    async with httpx.AsyncClient(timeout=PATIENCE_S) as raw:
        for end in ("", "/events"):
            reply = await raw.get(f"{server.url}/v1/chat/completions/chatcmpl-{request.id}{end}")
            assert reply.status_code == 404
    await finish(stages, request)
    await asked


# --------------------------------------------------------------------------------------------------------------- media


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bad_picture_is_a_400_that_names_its_block(client: Any, stages: Stages, stream: bool) -> None:
    asked = ask(client, LOOK, stream=stream)
    (work,) = await stages.take()
    assert isinstance(work, Encode)
    (media,) = work.media
    await stages.tell(work.request, Failed(work.request.id, Failure(400, "Not an image.", param=media.param)))
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[1\].source: Not an image."):
        await asked


# --------------------------------------------------------------------------------------------------------- count_tokens


async def test_a_prompt_of_text_is_counted_as_the_engine_would_read_it(client: Any, stages: Stages) -> None:
    fields = {"messages": HI, "system": "Be brief.", "model": "demo-model"}
    counted = (await client.messages.count_tokens(**fields)).input_tokens
    asked = ask(client, **fields)
    (work,) = await stages.take()
    assert isinstance(work, Generate)
    assert counted == len(unpack_ids(work.prompt))
    await finish(stages, work.request)
    await asked


async def test_the_encoder_counts_a_picture_and_does_no_more(
    client: Any, stages: Stages, server: Running, redis: Redis, keys: Keys
) -> None:
    counting = asyncio.create_task(client.messages.count_tokens(model="demo-model", messages=LOOK))
    (work,) = await stages.take()
    assert isinstance(work, Encode)
    await stages.tell(work.request, Accepted(work.request.id, 77))
    assert (await counting).input_tokens == 77
    assert await stages.cancelled() == {work.request.id}
    await until(server.idle)


async def test_a_picture_that_cannot_be_counted_is_refused(client: Any, stages: Stages) -> None:
    counting = asyncio.create_task(client.messages.count_tokens(model="demo-model", messages=LOOK))
    (work,) = await stages.take()
    await stages.tell(work.request, Failed(work.request.id, Failure(400, "Not an image.", param=work.media[0].param)))
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[1\].source"):
        await counting


# --------------------------------------------------------------------------------------------------------------- errors


async def test_errors_have_this_apis_form_on_its_paths(server: Running) -> None:
    async with httpx.AsyncClient(timeout=PATIENCE_S) as raw:
        for method, path, status, kind in (
            ("GET", "/v1/messages", 405, "invalid_request_error"),
            ("GET", "/v1/messages/batches", 404, "not_found_error"),
            ("POST", "/v1/messages/batches", 404, "not_found_error"),
            ("PUT", "/v1/messages/count_tokens", 405, "invalid_request_error"),
        ):
            reply = await raw.request(method, f"{server.url}{path}")
            assert (reply.status_code, error_of(reply).type) == (status, kind)
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        reply = await post(server, path, {**BODY, "messages": 3})
        assert reply.status_code == 400
        assert "`messages`" in error_of(reply).message
        reply = await post(server, path, **{"content-encoding": "gzip"})
        assert (reply.status_code, error_of(reply).type) == (415, "invalid_request_error")
    reply = await post(server, "/v1/chat/completions", {"messages": 3})
    assert reply.json()["error"]["param"] == "messages"


async def test_the_edge_refuses_a_key_in_this_apis_form(checkpoint: Path, redis_url: str) -> None:
    async with running(checkpoint, redis_url, api_keys=("right",), max_body_bytes=1000) as server:
        async with client_of(server, "wrong") as client:
            with pytest.raises(anthropic.AuthenticationError) as refused:
                await client.messages.create(**BODY)
            assert refused.value.body["error"]["type"] == "authentication_error"
            assert refused.value.request_id
        async with client_of(server, "right") as client:
            with pytest.raises(anthropic.APIStatusError) as refused:
                await client.messages.create(**{**BODY, "messages": [{"role": "user", "content": "x" * 2000}]})
            assert (refused.value.status_code, refused.value.body["error"]["type"]) == (413, "invalid_request_error")


async def test_no_free_slot_is_told_in_this_apis_form(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    async with running(checkpoint, redis_url, max_concurrency=1) as server, client_of(server) as client:
        asked = ask(client)
        request = await stages.request()
        reply = await post(server)
        assert (reply.status_code, error_of(reply).type) == (429, "rate_limit_error")
        assert reply.headers["retry-after"] == "1"
        await finish(stages, request)
        await asked


async def test_no_free_connection_is_told_in_this_apis_form(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    async with running(checkpoint, redis_url, max_connections_per_address=1) as server, client_of(server) as client:
        asked = ask(client)
        request = await stages.request()
        reply = await post(server)  # the edge does not see it, so it has no id
        body = anthropic.types.ErrorResponse.model_validate_json(reply.content)
        assert (reply.status_code, body.error.type) == (429, "rate_limit_error")
        await finish(stages, request)
        await asked


async def test_a_gateway_that_drains_says_so_in_this_apis_form(server: Running) -> None:
    server.gateway._admission.draining = True
    reply = await post(server)
    assert (reply.status_code, error_of(reply).type) == (503, "overloaded_error")
    reply = await post(server, "/v1/messages/count_tokens")
    assert (reply.status_code, error_of(reply).type) == (503, "overloaded_error")


async def test_openapi_describes_both_bodies(server: Running) -> None:
    async with httpx.AsyncClient(timeout=PATIENCE_S) as raw:
        described = (await raw.get(f"{server.url}/openapi.json")).json()
    operations = [one["operationId"] for path in described["paths"].values() for one in path.values()]
    assert len(set(operations)) == len(operations)
    schemas = described["components"]["schemas"]
    assert set(schemas["MessagesRequest"]["required"]) == {"messages", "max_tokens"}
    assert set(schemas["CountRequest"]["required"]) == {"messages"}
    assert {"/v1/messages", "/v1/messages/count_tokens"} < described["paths"].keys()
