"""Ways in which tests ask a running gateway, and listen to it."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from gateway_stages import Running, until
from machine import PATIENCE_S
from redis.asyncio import Redis

from shared.bus.keys import Keys
from shared.errors import Failure

HI: list[Any] = [{"role": "user", "content": "Hi"}]
PNG = "data:image/png;base64," + base64.b64encode(b"pixels").decode()
LOOK: list[Any] = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": PNG}},
            {"type": "image_url", "image_url": {"url": "https://example.org/b.png"}},
            {"type": "text", "text": "Compare."},
        ],
    }
]
TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BROKEN = Failure(500, "The engine gave up.", type="server_error", code="internal_error")
BAD_IMAGE = Failure(400, "Not an image.", param="messages[0].content[0].image_url", code="invalid_value")


def ask(server: Running, messages: list[Any] = HI, **fields: Any) -> "asyncio.Task[Any]":
    """A request under way."""
    fields = {"model": "demo-model", "messages": messages, **fields}
    return asyncio.create_task(server.client.chat.completions.create(**fields))


async def contents(stream: Any) -> list[Any]:
    return [chunk async for chunk in stream]


async def events(url: str, body: dict[str, Any], **headers: str) -> list[str]:
    """The events of a stream as they are on the wire."""
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        reply = await client.post(f"{url}/v1/chat/completions", json=body, headers=headers)
        assert reply.status_code == 200
        return reply.text.split("\n\n")


def said(event: str) -> Any:
    """The JSON of an event, whatever its id."""
    return json.loads(event.rpartition("data: ")[2])


def overheard(response: Any, monkeypatch: pytest.MonkeyPatch) -> bytearray:
    """The body of a response that the client library reads, as far as it has read."""
    heard, parts = bytearray(), response.aiter_bytes

    async def aiter_bytes() -> AsyncIterator[bytes]:
        async for part in parts():
            heard.extend(part)
            yield part

    monkeypatch.setattr(response, "aiter_bytes", aiter_bytes)
    return heard


async def nothing_left(server: Running, redis: Redis, keys: Keys) -> None:
    """Every open request is gone from the gateway, and what is left in Redis is for the stages behind it."""
    await until(lambda: server.gateway.load().items() >= {"requests": 0, "choices": 0}.items())
    assert not await redis.keys(keys.blob("*", "*"))
