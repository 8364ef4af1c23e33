"""The span of a request for an answer: what other stages get of it, and how it ends."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from collector import Collector, Received, traced
from gateway_stages import Stages, running
from machine import PATIENCE_S

from shared.errors import Failure
from shared.messages import Delta

CALLER_TRACE, CALLER_SPAN = f"{7:032x}", f"{8:016x}"
CALLER = {"traceparent": f"00-{CALLER_TRACE}-{CALLER_SPAN}-01"}
HELLO = {"model": "demo-model", "messages": [{"role": "user", "content": "Hello"}]}
PATH = "/v1/chat/completions"


def the_one(got: Collector) -> Received:
    [span] = got.spans()
    assert (span.name, span.trace, span.parent) == (f"POST {PATH}", CALLER_TRACE, CALLER_SPAN)
    return span


async def test_other_stages_are_told_of_the_span_and_the_log_of_its_trace(
    checkpoint: Path, redis_url: str, stages: Stages, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with traced("gateway") as (tracing, got):
        async with (
            running(checkpoint, redis_url, tracing) as gateway,
            httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as http,
            http.stream("POST", PATH, json={**HELLO, "stream": True}, headers=CALLER) as reply,
        ):
            request = await stages.request()
            await stages.answer(request, "a", "b")
            await reply.aread()
    span = the_one(got)
    assert request.trace == f"00-{CALLER_TRACE}-{span.id}-01"
    assert [event.name for event in span.events] == ["first_token"]
    assert not span.failed
    assert [record.__dict__["trace_id"] for record in caplog.records if record.msg == "answered"] == [CALLER_TRACE]


@pytest.mark.parametrize(
    ("path", "body", "operation"),
    [
        ("/v1/completions", {"prompt": "Once"}, "text_completion"),
        ("/v1/messages", {"model": "m", "max_tokens": 9, "messages": HELLO["messages"]}, "chat"),
        ("/v1/responses", {"input": "Hello"}, "chat"),
    ],
)
async def test_every_api_has_its_span(
    checkpoint: Path, redis_url: str, stages: Stages, path: str, body: dict[str, Any], operation: str
) -> None:
    with traced("gateway") as (tracing, got):
        async with (
            running(checkpoint, redis_url, tracing) as gateway,
            httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as http,
        ):
            asked = asyncio.create_task(http.post(path, json=body, headers=CALLER))
            request = await stages.request()
            await stages.answer(request, "a")
            reply = await asked
    [span] = got.spans()
    assert (span.name, span.trace) == (f"POST {path}", CALLER_TRACE)
    assert request.trace == f"00-{CALLER_TRACE}-{span.id}-01"
    assert span.attributes["http.route"] == path
    assert span.attributes["gen_ai.operation.name"] == operation
    assert span.attributes["gen_ai.response.id"] == reply.json()["id"]


async def test_without_traces_the_callers_own_is_handed_on(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    async with (
        running(checkpoint, redis_url) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as http,
        http.stream("POST", PATH, json={**HELLO, "stream": True}, headers=CALLER) as reply,
    ):
        request = await stages.request()
        await stages.answer(request, "a")
        await reply.aread()
    assert request.trace == CALLER["traceparent"]


async def test_a_failure_within_a_stream_is_the_spans_although_the_status_is_200(
    checkpoint: Path, redis_url: str, stages: Stages
) -> None:
    with traced("gateway") as (tracing, got):
        async with (
            running(checkpoint, redis_url, tracing) as gateway,
            httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as http,
            http.stream("POST", PATH, json={**HELLO, "stream": True}, headers=CALLER) as reply,
        ):
            request = await stages.request()
            broken = Failure(500, "It broke.", type="server_error", code="broken")
            await stages.say(request, Delta(request.id, 1, content="a"), Delta(request.id, 2, failure=broken))
            await reply.aread()
    span = the_one(got)
    assert span.failed
    assert (span.attributes["http.response.status_code"], span.attributes["error.type"]) == (200, "broken")


async def test_a_failure_before_anything_was_written(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    with traced("gateway") as (tracing, got):
        async with (
            running(checkpoint, redis_url, tracing, request_timeout_s=50) as gateway,
            httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as http,
        ):
            asked = asyncio.create_task(http.post(PATH, json=HELLO, headers=CALLER))
            await stages.request()
            gateway.ahead_s = 51
            reply = await asked
    span = the_one(got)
    assert span.failed
    assert span.attributes["http.response.status_code"] == reply.status_code == 504
    assert span.attributes["error.type"] == reply.json()["error"]["code"]


async def test_a_client_that_leaves_is_no_error(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    with traced("gateway") as (tracing, got):
        async with (
            running(checkpoint, redis_url, tracing) as gateway,
            httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as http,
        ):
            async with http.stream("POST", PATH, json={**HELLO, "stream": True}, headers=CALLER):
                request = await stages.request()
            await stages.cancelled()
    span = the_one(got)
    assert not span.failed
    assert [event.name for event in span.events] == ["client_left"]
    assert span.attributes["millrace.request_id"] == request.id


async def test_who_has_no_key_and_who_asks_for_something_else(checkpoint: Path, redis_url: str) -> None:
    with traced("gateway") as (tracing, got):
        async with (
            running(checkpoint, redis_url, tracing, api_keys=("key-1",)) as gateway,
            httpx.AsyncClient(base_url=gateway.url, headers=CALLER, timeout=PATIENCE_S) as http,
        ):
            assert (await http.post(PATH, json=HELLO)).status_code == 401
            assert (await http.get("/health/live")).status_code == 200
            assert (await http.get(PATH)).status_code == 401
    span = the_one(got)
    assert (span.failed, span.attributes["http.response.status_code"]) == (False, 401)
