"""The `openai` client's `responses`, with a stand-in for the other stages: what is kept, where it is read, by whom."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from gateway_stages import USAGE, Running, Stages, running, until
from machine import PATIENCE_S
from openai.types.responses import Response, ResponseReasoningItem
from pydantic import BaseModel
from redis.asyncio import Redis
from system import data_url, encoded, picture

from shared.bus.keys import Keys
from shared.bus.leases import Fence
from shared.bus.records import Records
from shared.errors import Failure
from shared.messages import Begin, Delta, Encode, Failed, Generate, Request, ToolDelta

IMAGE = data_url(encoded(picture(28, 28), "PNG"), "image/png")
# What a response has by the schema of Open Responses, beside the fields that openai's types demand.
OPEN_RESPONSES = {
    *("id", "object", "created_at", "completed_at", "status", "incomplete_details", "model", "previous_response_id"),
    *("instructions", "output", "error", "tools", "tool_choice", "truncation", "parallel_tool_calls", "text", "top_p"),
    *("presence_penalty", "frequency_penalty", "top_logprobs", "temperature", "reasoning", "user", "usage", "store"),
    *("max_output_tokens", "max_tool_calls", "background", "service_tier", "metadata", "safety_identifier"),
    "prompt_cache_key",
}
TOOLS: list[Any] = [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}]


async def answered(server: Running, stages: Stages, *deltas: Delta, **body: Any) -> Response:
    """A response whose answer is these deltas, or one word."""
    asking = asyncio.create_task(server.client.responses.create(**{"input": "Hi", **body}))
    request = await stages.request()
    end = Delta(request.id, 99, finish_reason="stop", usage=USAGE)
    said = [msgspec.structs.replace(delta, request_id=request.id) for delta in deltas]
    await stages.say(request, *(said or [Delta(request.id, 1, content="Hello")]), end)
    response: Response = await asking
    return response


async def journaled(stages: Stages, redis: Redis, keys: Keys, request: Request) -> None:
    """Let a request have been begun by an engine, as its record has it."""
    await Records(redis, keys).write_journal(
        [(request.id, 0, [1])], [Begin(request.id, 1, 0, 1, 0, 0, 0)], (), Fence(keys, "", {})
    )


async def test_a_response_is_kept_and_read_anywhere(server: Running, other: Running, stages: Stages) -> None:
    made = await answered(
        server,
        stages,
        Delta("", 3, reasoning="hm", content="Hello", tool_calls=(ToolDelta(0, "c", "f", "{}"),)),
        tools=TOOLS,
        instructions="Be brief.",
        metadata={"a": "b"},
    )
    assert made.output_text == "Hello"
    assert [item.type for item in made.output] == ["reasoning", "message", "function_call"]
    assert (made.status, made.usage.total_tokens) == ("completed", 14)
    read = await other.client.responses.retrieve(made.id)
    assert read == made
    [item] = (await other.client.responses.input_items.list(made.id)).data
    assert item.content[0].text == "Hi"
    for call in (other.client.responses.retrieve, other.client.responses.delete, other.client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            await call("resp_0123456789abcdef")
        with pytest.raises(openai.NotFoundError):
            await call(made.id, extra_headers={"Authorization": "Bearer key-2"})
    assert await other.client.responses.cancel(made.id) == made
    await other.client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        await server.client.responses.retrieve(made.id)


async def test_reasoning_is_sent_as_a_summary_where_one_is_asked_for(
    server: Running, other: Running, stages: Stages
) -> None:
    made = await answered(server, stages, Delta("", 2, reasoning="hm", content="Hello"), reasoning={"summary": "auto"})
    item = made.output[0]
    assert isinstance(item, ResponseReasoningItem)
    assert ([part.text for part in item.summary], item.content) == (["hm"], [])
    assert (made.output_text, made.reasoning.summary if made.reasoning else None) == ("Hello", "auto")
    assert await other.client.responses.retrieve(made.id) == made
    events = await collect(other, made.id.removeprefix("resp_"), 3)
    assert [(event.type, event.delta) for event in events if hasattr(event, "delta")] == [
        ("response.reasoning_summary_text.delta", "hm"),
        ("response.output_text.delta", "Hello"),
    ]
    question: list[Any] = [{"role": "user", "content": "Hi"}]
    items: list[Any] = [output.model_dump(exclude_none=True) for output in made.output]
    references: list[Any] = [{"type": "item_reference", "id": output.id} for output in made.output]
    prompts = []
    for body in (
        {"input": [*question, *items, *question]},
        {"input": [*question, *references, *question]},
        {"input": "Hi", "previous_response_id": made.id},
    ):
        asking = asyncio.create_task(server.client.responses.create(**body))
        [work] = await stages.take()
        assert isinstance(work, Generate)
        prompts.append(work.prompt)
        await stages.say(work.request, Delta(work.request.id, 1, content="x", finish_reason="stop", usage=USAGE))
        await asking
    assert prompts[0] == prompts[1] == prompts[2]


async def test_what_is_not_to_be_stored_is_not(server: Running, stages: Stages, redis: Redis, keys: Keys) -> None:
    made = await answered(server, stages, store=False)
    assert made.output_text == "Hello"
    with pytest.raises(openai.NotFoundError):
        await server.client.responses.retrieve(made.id)
    assert not await redis.keys(keys.responses().blob("*", "*"))


async def test_a_stream_and_its_rest_at_another_gateway(
    server: Running, other: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    stream = await server.client.responses.create(input="Hi", stream=True)
    request = await stages.request()
    await journaled(stages, redis, keys, request)
    await stages.say(request, Delta(request.id, 1, content="Hel"))
    seen = []
    async for event in stream:
        seen.append(event)
        if event.type == "response.output_text.delta":
            break
    running_now = await other.client.responses.retrieve(f"resp_{request.id}")
    assert (running_now.status, running_now.output) == ("in_progress", [])
    rest = asyncio.create_task(collect(other, request.id, seen[-1].sequence_number))
    attach = await stages.attached()
    assert attach.after == 0, "the numbers are a function of the whole answer"
    end = Delta(request.id, 3, content="lo", finish_reason="stop", usage=USAGE, start=1)
    await stages.send(attach.gateway, Delta(request.id, 1, content="Hel", start=0), end)
    after = await rest
    assert [event.delta for event in after if event.type == "response.output_text.delta"] == ["lo"]
    await stages.say(request, Delta(request.id, 3, content="lo", finish_reason="stop", usage=USAGE))
    live = [event async for event in stream]
    assert without_time(live) == without_time(after)
    assert without_time(await collect(other, request.id, seen[-1].sequence_number)) == without_time(live)
    assert await collect(server, request.id, live[-1].sequence_number) == []


async def collect(server: Running, request_id: str, after: int) -> list[Any]:
    stream = await server.client.responses.retrieve(f"resp_{request_id}", stream=True, starting_after=after)
    return [event async for event in stream]


def without_time(events: list[Any]) -> list[Any]:
    shown = [event.model_dump() for event in events]
    for event in shown:
        event.get("response", {}).pop("completed_at", None)
    return shown


async def test_an_answer_that_nobody_waited_for_is_derived(
    server: Running, other: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    queued = await server.client.responses.create(input="Hi", background=True)
    assert (queued.status, queued.output) == ("queued", [])
    request = await stages.request()
    assert request.retain_s == 24 * 3600
    assert (await other.client.responses.retrieve(queued.id)).status == "queued"
    await journaled(stages, redis, keys, request)
    assert (await other.client.responses.retrieve(queued.id)).status == "in_progress"
    await stages.keep(request)  # its gateway hears nothing of it
    reading = asyncio.create_task(other.client.responses.retrieve(queued.id))
    attach = await stages.attached()
    await stages.send(attach.gateway, Delta(request.id, 1, content="Done", start=0))
    await stages.send(attach.gateway, Delta(request.id, 2, finish_reason="stop", usage=USAGE, start=1))
    read = await reading
    assert (read.status, read.output_text) == ("completed", "Done")
    assert await other.client.responses.retrieve(queued.id) == read
    assert await redis.pttl(keys.request(request.id)) <= 60_000, "it is kept elsewhere now"


async def test_the_reason_of_a_failure_in_the_background_is_kept(
    server: Running, other: Running, stages: Stages
) -> None:
    item: Any = {"role": "user", "content": [{"type": "input_image", "image_url": "https://example.org/a.png"}]}
    queued = await server.client.responses.create(input=[item], background=True)
    [work] = await stages.take()
    assert isinstance(work, Encode)
    assert [media.param for media in work.media] == ["input[0].content[0].image_url"]
    await stages.tell(work.request, Failed(work.request.id, Failure(400, "No picture.", code="invalid_image")))
    await until(server.idle)
    read = await other.client.responses.retrieve(queued.id)
    assert (read.status, read.error.message, read.error.code) == ("failed", "No picture.", "invalid_prompt")


async def test_a_client_that_leaves_cancels_what_is_not_in_the_background(server: Running, stages: Stages) -> None:
    for background in (False, True):
        stream = await server.client.responses.create(input="Hi", stream=True, background=background)
        request = await stages.request()
        await stages.say(request, Delta(request.id, 1, content="Hel"))
        await anext(aiter(stream))
        await stream.close()
        await until(server.idle)
        read = await server.client.responses.retrieve(f"resp_{request.id}")
        assert read.status == ("queued" if background else "cancelled")
        if not background:
            assert await stages.cancelled() == {request.id}


async def test_cancel_ends_the_streams_of_all_gateways(
    server: Running, other: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    stream = await server.client.responses.create(input="Hi", stream=True, background=True)
    request = await stages.request()
    cancelled = await other.client.responses.cancel(f"resp_{request.id}")
    assert cancelled.status == "cancelled"
    assert await stages.cancelled() == {request.id}
    last = [event async for event in stream][-1]
    assert (last.type, last.response.status) == ("response.failed", "cancelled")
    assert (await other.client.responses.retrieve(f"resp_{request.id}")).status == "cancelled"
    again = await server.client.responses.cancel(f"resp_{request.id}")
    assert again == cancelled


async def test_the_next_turn_has_the_turns_before_it(server: Running, other: Running, stages: Stages) -> None:
    question: list[Any] = [
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "What?"}, {"type": "input_image", "image_url": IMAGE}],
        }
    ]
    call = ToolDelta(0, "call-1", "f", '{"a": 1}')
    first = await answered(
        server, stages, Delta("", 2, reasoning="hm", tool_calls=(call,)), input=question, tools=TOOLS, instructions="A"
    )
    result: Any = {"type": "function_call_output", "call_id": "call-1", "output": "42"}
    second = await answered(other, stages, input=[result], previous_response_id=first.id, tools=TOOLS)
    asking = asyncio.create_task(server.client.responses.create(input="And?", previous_response_id=second.id))
    [work] = await stages.take()
    assert isinstance(work, Encode), "the picture of the first turn is part of the third"
    assert [media.param for media in work.media] == ["previous_response_id"]
    await stages.answer(work.request, "So.")
    third = await asking
    assert (third.previous_response_id, third.instructions) == (second.id, None)
    items = (await server.client.responses.input_items.list(first.id)).data
    assert items[0].content[1].image_url == IMAGE
    await other.client.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError, match="earlier turn") as refused:
        await server.client.responses.create(input="And?", previous_response_id=third.id)
    assert (refused.value.code, refused.value.param) == ("previous_response_not_found", "previous_response_id")
    with pytest.raises(openai.BadRequestError, match="is not kept"):
        await server.client.responses.create(
            input="And?", previous_response_id=second.id, extra_headers={"Authorization": "Bearer key-2"}
        )


async def test_the_first_answer_to_a_key_is_every_answer_to_it(server: Running, other: Running, stages: Stages) -> None:
    headers = {"Idempotency-Key": "k"}
    first = asyncio.create_task(server.client.responses.create(input="Hi", extra_headers=headers))
    request = await stages.request()
    second = asyncio.create_task(other.client.responses.create(input="Hi", extra_headers=headers))
    attach = await stages.attached()
    deltas = Delta(request.id, 1, content="Hello"), Delta(request.id, 2, finish_reason="stop", usage=USAGE, start=1)
    await stages.send(attach.gateway, *deltas)
    await stages.say(request, *deltas)
    one, two = await first, await second
    assert (one.id, one.output) == (two.id, two.output)
    third = await other.client.responses.create(input="Hi", extra_headers=headers)
    assert third == await server.client.responses.retrieve(one.id)
    again = await other.client.responses.create(input="Hi", stream=True, extra_headers=headers)
    assert [event async for event in again][-1].response == third
    queued = await server.client.responses.create(input="Ho", background=True, extra_headers={"Idempotency-Key": "b"})
    twice = await other.client.responses.create(input="Ho", background=True, extra_headers={"Idempotency-Key": "b"})
    assert twice == queued


async def test_a_deadline_fails_a_stored_response(server: Running, stages: Stages) -> None:
    stream = await server.client.responses.create(input="Hi", stream=True)
    request = await stages.request()
    server.ahead_s = 10_000.0
    last = [event async for event in stream][-1]
    assert (last.type, last.response.error.type) == ("response.failed", "timeout")
    assert (await server.client.responses.retrieve(f"resp_{request.id}")).status == "failed"


async def test_parsed_output_and_the_stream_helper(server: Running, stages: Stages) -> None:
    class Answer(BaseModel):
        n: int

    parsing = asyncio.create_task(server.client.responses.parse(input="Hi", model="demo", text_format=Answer))
    [work] = await stages.take()
    assert isinstance(work, Generate)
    grammar = work.request.sampling.grammar
    assert grammar is not None
    assert (grammar.param, '"n"' in grammar.text) == ("text.format", True)
    await stages.answer(work.request, '{"n": ', "3}")
    assert (await parsing).output_parsed == Answer(n=3)
    async with server.client.responses.stream(input="Hi", model="demo", text_format=Answer) as stream:
        await stages.answer(await stages.request(), '{"n": ', "4}")
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert final.output_parsed == Answer(n=4)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == '{"n": 4}'


async def test_what_is_refused_has_openais_form(server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await server.client.responses.create(input="Hi", tools=[{"type": "web_search"}])
    assert (refused.value.param, refused.value.code) == ("tools[0].type", "unsupported_parameter")


async def test_routes_refuse_what_is_malformed(server: Running, stages: Stages) -> None:
    made = await answered(server, stages, input=[{"role": "user", "content": text} for text in "abc"])
    headers = {"Authorization": "Bearer key-1"}
    async with httpx.AsyncClient(base_url=f"{server.url}/v1/responses", headers=headers, timeout=PATIENCE_S) as client:
        for query in ("stream=maybe", "stream=true&starting_after=x"):
            assert (await client.get(f"/{made.id}?{query}")).status_code == 400
        for query in ("order=up", "limit=0", "limit=x", "after=x"):
            assert (await client.get(f"/{made.id}/input_items?{query}")).status_code == 400
    pages = server.client.responses.input_items.list(made.id, limit=1, order="asc")
    assert [item.content[0].text async for item in pages] == ["a", "b", "c"]


async def test_half_a_character_is_kept_as_it_was_understood(server: Running, stages: Stages) -> None:
    headers = {"Authorization": "Bearer key-1"}
    async with httpx.AsyncClient(base_url=f"{server.url}/v1", headers=headers, timeout=PATIENCE_S) as client:
        asking = asyncio.create_task(client.post("/responses", content=b'{"input": "a\\ud800"}'))
        await stages.answer(await stages.request(), "Hello")
        made = (await asking).json()
    [item] = (await server.client.responses.input_items.list(made["id"])).data
    assert item.content[0].text == "a\ufffd"
    assert OPEN_RESPONSES - made.keys() == set()


async def test_a_body_that_is_too_large_to_keep_is_refused(checkpoint: Path, redis_url: str) -> None:
    async with running(checkpoint, redis_url, responses_budget_bytes=4000) as small:
        with pytest.raises(openai.APIStatusError) as refused:
            await small.client.responses.create(input="x" * 1001)
        assert (refused.value.status_code, refused.value.param) == (413, "store")


async def test_the_budget_evicts_what_was_used_longest_ago(
    checkpoint: Path, redis_url: str, stages: Stages, redis: Redis, keys: Keys
) -> None:
    async with running(checkpoint, redis_url, responses_budget_bytes=8000) as small:
        made = [await answered(small, stages, input="x" * 1500) for _ in range(6)]
        await small.client.responses.retrieve(made[-1].id)
        with pytest.raises(openai.NotFoundError):
            await small.client.responses.retrieve(made[0].id)
    total = int(await redis.hget(keys.responses().blob_sizes(), "sum"))
    assert total <= 8000
