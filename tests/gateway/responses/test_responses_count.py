"""Tokens of a response's input, counted for the `openai` client as the engine would read them."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from gateway_stages import USAGE, Running, Stages, running, until
from redis.asyncio import Redis
from system import data_url, encoded, picture

from shared.bus.keys import Keys
from shared.messages import Accepted, Delta, Encode, Generate, unpack_ids

IMAGE = data_url(encoded(picture(28, 28), "PNG"), "image/png")
LOOK: list[Any] = [{"role": "user", "content": [{"type": "input_image", "detail": "auto", "image_url": IMAGE}]}]
TOOLS: list[Any] = [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}]


@pytest.fixture
async def server(checkpoint: Path, redis_url: str) -> AsyncIterator[Running]:
    async with running(checkpoint, redis_url) as started:
        yield started


async def prompt_of(server: Running, stages: Stages, **body: Any) -> tuple[int, str]:
    """The length of a response's prompt, and its id."""
    asked = asyncio.create_task(server.client.responses.create(model="demo-model", **body))
    (work,) = await stages.take()
    assert isinstance(work, Generate)
    await stages.say(
        work.request,
        Delta(work.request.id, 1, content="Hello"),
        Delta(work.request.id, 2, start=1, finish_reason="stop", usage=USAGE),
    )
    return len(unpack_ids(work.prompt)), (await asked).id


async def counted(server: Running, **body: Any) -> int:
    count = await server.client.responses.input_tokens.count(model="demo-model", **body)
    assert count.object == "response.input_tokens"
    return count.input_tokens


async def test_a_prompt_is_as_long_as_it_was_counted(server: Running, stages: Stages) -> None:
    body: dict[str, Any] = {"input": "Hi", "instructions": "Be brief.", "tools": TOOLS}
    first, first_id = await prompt_of(server, stages, **body)
    assert await counted(server, **body) == first
    later: dict[str, Any] = {"input": "And?", "previous_response_id": first_id}
    assert await counted(server, **later) == (await prompt_of(server, stages, **later))[0]
    assert await counted(server, input="And?") < await counted(server, **later)


async def test_the_encoder_counts_a_picture_and_nothing_is_kept(
    server: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    counting = asyncio.create_task(counted(server, input=LOOK, extra_body={"background": True}))
    (work,) = await stages.take()
    assert isinstance(work, Encode)
    await stages.tell(work.request, Accepted(work.request.id, 77))
    assert await counting == 77
    assert await stages.cancelled() == {work.request.id}
    await until(server.idle)
    with pytest.raises(openai.NotFoundError):
        await server.client.responses.retrieve(f"resp_{work.request.id}")


async def test_what_cannot_be_asked_is_not_counted(server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await counted(server, input="Hi", tools=[{"type": "web_search"}])
    assert refused.value.param == "tools[0].type"
    with pytest.raises(openai.BadRequestError, match="is not kept"):
        await counted(server, input="Hi", previous_response_id="resp_0123456789abcdef")
