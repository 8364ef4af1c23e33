"""Each request is counted once by how it ended, be it inside a stream whose status was 200."""

import asyncio
import contextlib
from typing import Any

import httpx
import openai
from gateway_stages import USAGE, Running, Stages, until
from machine import PATIENCE_S

from services.gateway.inflight.ended import OUTCOMES
from shared.errors import Failure
from shared.messages import Delta, Failed

HI: dict[str, Any] = {"model": "demo-model", "messages": [{"role": "user", "content": "Hi"}]}
BROKEN = Failure(500, "The engine gave up.", type="server_error", code="internal_error")
PICTURE = {
    "model": "demo-model",
    "messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]}
    ],
}
BAD_IMAGE = Failure(400, "Not an image.", param="messages[0].content[0].image_url", code="invalid_value")
UNKNOWN = Failure(404, "No such request.", code="request_not_found")


def counts(server: Running) -> dict[str, int]:
    """Return the outcomes that were counted."""
    labels = 'endpoint="/v1/chat/completions",model="demo-model"'
    found = {name: server.metric(f'millrace_requests_ended_total{{{labels},outcome="{name}"}}') for name in OUTCOMES}
    return {name: round(count) for name, count in found.items() if count}


async def test_every_end_is_counted_once_by_its_outcome(server: Running, stages: Stages) -> None:
    assert counts(server) == {}
    expected: dict[str, int] = {}

    async def one_more(outcome: str) -> None:
        expected[outcome] = expected.get(outcome, 0) + 1
        await until(lambda: counts(server) == expected)

    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        for reason in ("stop", "length", "tool_calls"):
            stream = await server.client.chat.completions.create(**HI, stream=True)
            request = await stages.request()
            await stages.say(request, Delta(request.id, 1, content="A"))
            await stages.say(request, Delta(request.id, 2, finish_reason=reason, usage=USAGE))
            assert [chunk async for chunk in stream]
            await one_more(reason)

        for failure, outcome in ((BROKEN, "error"), (UNKNOWN, "lost")):
            stream = await server.client.chat.completions.create(**HI, stream=True)
            request = await stages.request()
            await stages.say(request, Delta(request.id, 1, content="A"))
            assert (await anext(aiter(stream))).choices
            await stages.say(request, Delta(request.id, 2, failure=failure))
            with contextlib.suppress(openai.APIError):
                async for _ in stream:
                    pass
            await one_more(outcome)

        stream = await server.client.chat.completions.create(**HI, stream=True)
        await stages.request()
        await stream.close()
        await one_more("cancelled")

        for body in ({**HI, "temperature": -1}, {**HI, "messages": []}):
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 400
            await one_more("client_error")
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=PICTURE))
        request = await stages.request()
        await stages.tell(request, Failed(request.id, BAD_IMAGE))
        assert (await asking).status_code == 400
        await one_more("client_error")

        asking = asyncio.create_task(client.post("/v1/chat/completions", json=HI))
        await stages.request()
        server.ahead_s = 10_000.0
        assert (await asking).status_code == 504
        await one_more("timeout")


async def test_what_is_no_request_to_an_api_is_in_no_ratio(server: Running) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        for path in ("/health", "/health/ready", "/ping", "/v1/models", "/v1/models/no", "/nothing", "/"):
            await client.get(path)
        await client.get("/v1/chat/completions")
        await client.post("/nothing")
        await client.get("/v1/chat/completions/no/events")
    assert counts(server) == {}
