"""Items that stand for the output of stored responses, as the AI SDK sends them instead of what the model said."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from gateway_stages import USAGE, Running, Stages, running
from openai.types.responses import Response

from shared.messages import Delta, Generate, ToolDelta, unpack_ids

TOOLS: list[Any] = [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}]
QUESTION = {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}
SAID = Delta("", 3, reasoning="hm", content="Hello", tool_calls=(ToolDelta(0, "c", "f", '{"a": 1}'),))


@pytest.fixture
async def server(checkpoint: Path, redis_url: str) -> AsyncIterator[Running]:
    async with running(checkpoint, redis_url, api_keys=("key-1", "key-2")) as started:
        yield started


@pytest.fixture
async def other(checkpoint: Path, redis_url: str) -> AsyncIterator[Running]:
    async with running(checkpoint, redis_url, name="other", api_keys=("key-1", "key-2")) as started:
        yield started


async def answered(server: Running, stages: Stages, given: list[Any], **body: Any) -> tuple[Response, list[int]]:
    """A response with reasoning, a text and a call, and the prompt that its engine was given."""
    asking = asyncio.create_task(server.client.responses.create(input=given, tools=TOOLS, **body))
    (work,) = await stages.take()
    assert isinstance(work, Generate)
    request = work.request
    end = Delta(request.id, 99, start=3, finish_reason="tool_calls", usage=USAGE)
    await stages.say(request, Delta(request.id, 3, SAID.reasoning, SAID.content, SAID.tool_calls), end)
    return await asking, unpack_ids(work.prompt)


def reference(item: Any) -> dict[str, str]:
    return {"type": "item_reference", "id": item.id}


async def test_a_reference_is_what_it_stands_for(server: Running, other: Running, stages: Stages) -> None:
    first, _ = await answered(server, stages, [QUESTION])
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
    result = {"type": "function_call_output", "call_id": "c", "output": "sunny"}
    whole = [item.model_dump(exclude_none=True) for item in first.output]
    second, prompt = await answered(other, stages, [QUESTION, *map(reference, first.output), result])
    _, expected = await answered(other, stages, [QUESTION, *whole, result])
    assert prompt == expected
    listed = (await server.client.responses.input_items.list(second.id, order="asc")).data
    assert [item.type for item in listed] == [
        "message",
        "reasoning",
        "message",
        "function_call",
        "function_call_output",
    ]
    # A later turn reads the items, though the response that they came from is gone.
    await server.client.responses.delete(first.id)
    await answered(server, stages, [QUESTION], previous_response_id=second.id)


@pytest.mark.parametrize("name", ["rs_0123456789abcdef", "msg_1", "fc_0123456789abcdef-0", None])
async def test_a_reference_to_nothing_is_named(server: Running, name: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await server.client.responses.create(input=[QUESTION, {"type": "item_reference", "id": name}])  # type: ignore[list-item]
    assert (refused.value.param, refused.value.code) == ("input[1].id", "item_not_found")


async def test_a_reference_that_is_repeated_is_bounded(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    async with running(checkpoint, redis_url, max_body_bytes=8000) as server:
        first, _ = await answered(server, stages, [QUESTION])
        again: list[Any] = [reference(first.output[1])] * 100  # each shorter than the item
        with pytest.raises(openai.APIStatusError) as refused:
            await server.client.responses.create(input=again)
    assert (refused.value.status_code, refused.value.param) == (413, "input")


async def test_another_keys_items_are_nothing(server: Running, stages: Stages) -> None:
    first, _ = await answered(server, stages, [QUESTION])
    with pytest.raises(openai.BadRequestError) as refused:
        await server.client.responses.create(
            input=[QUESTION, reference(first.output[0])],  # type: ignore[list-item]
            extra_headers={"Authorization": "Bearer key-2"},
        )
    assert refused.value.code == "item_not_found"
    with pytest.raises(openai.BadRequestError):
        await server.client.responses.create(input=[{"type": "item_reference", "id": f"{first.output[0].id}-7"}])  # type: ignore[list-item]
