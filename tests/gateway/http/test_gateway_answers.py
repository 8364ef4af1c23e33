"""Answers over HTTP, as OpenAI's client reads them: a real Redis, a real port; the test plays every other stage."""

import asyncio
from typing import Any

import pytest
from asking import HI, TOOL, ask, contents, events, nothing_left, said
from gateway_stages import USAGE, Running, Stages
from redis.asyncio import Redis

from shared.bus.keys import Keys
from shared.bus.records import Records
from shared.messages import (
    Delta,
    Generate,
    ShownLogprob,
    ToolDelta,
    Usage,
    pack_ids,
    unpack_ids,
)
from shared.model.tokenizer import Tokenizer


async def test_what_the_engine_is_sent(server: Running, stages: Stages, tokenizer: Tokenizer) -> None:
    asked = ask(server, temperature=0.5, seed=3, max_tokens=9, extra_headers={"X-Request-ID": "mine"})
    (work,) = await stages.take()
    assert isinstance(work, Generate)
    ids = unpack_ids(work.prompt)
    assert ids[0] == tokenizer.control["<|begin_of_sentence|>"]
    assert tokenizer.control["<think>"] in ids
    assert (work.max_tokens, work.request.sampling.seed, work.request.sampling.temperature) == (9, 3, 0.5)
    assert work.request.output.thinking
    assert work.request.log_fields == {"request_id": work.request.id, "http_request_id": "mine"}
    assert work.request.gateway.startswith("gw.")
    assert work.request.shard in range(4)
    assert work.request.deadline == pytest.approx(work.request.created + 600)
    record = (await Records(stages.redis, stages.keys).get([work.request.id]))[work.request.id]
    assert record.request == work.request
    await stages.answer(work.request, "x")
    await asked


async def test_an_answer_that_is_not_streamed(server: Running, stages: Stages, redis: Redis, keys: Keys) -> None:
    asked = ask(server)
    request = await stages.request()
    await stages.say(request, Delta(request.id, 1, reasoning="let me "))
    await stages.say(request, Delta(request.id, 2, reasoning="see", content="Hel"))
    await stages.say(request, Delta(request.id, 4, content="lo", finish_reason="stop", usage=USAGE))
    reply = await asked
    (choice,) = reply.choices
    assert reply.id == f"chatcmpl-{request.id}"
    assert (reply.model, reply.object) == ("demo-model", "chat.completion")
    assert reply.system_fingerprint.startswith("fp_")
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hello", "stop")
    assert choice.message.reasoning_content == choice.message.reasoning == "let me see"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (11, 3, 14)
    assert reply.usage.prompt_tokens_details.cached_tokens == 4
    assert reply.usage.completion_tokens_details.reasoning_tokens == 1
    await nothing_left(server, redis, keys)
    assert await redis.xlen(keys.control()) == 0, "an answer that ended is not cancelled"


async def test_a_streamed_answer(server: Running, stages: Stages, redis: Redis, keys: Keys) -> None:
    stream = await ask(server, stream=True, stream_options={"include_usage": True})
    request = await stages.request()
    await stages.say(request, Delta(request.id, 1, reasoning="hm"))
    await stages.say(request, Delta(request.id, 2, content="Hel"), Delta(request.id, 3, content="lo"))
    await stages.say(request, Delta(request.id, 4, finish_reason="length", usage=USAGE))
    chunks = await contents(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Hello"
    assert [c.choices[0].delta.reasoning_content for c in chunks[1:2]] == ["hm"]
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 14
    assert {c.id for c in chunks} == {f"chatcmpl-{request.id}"}
    await nothing_left(server, redis, keys)


async def test_the_client_libraries_own_accumulator(server: Running, stages: Stages) -> None:
    async def read() -> Any:
        async with server.client.chat.completions.stream(model="demo-model", messages=HI, tools=[TOOL]) as stream:
            async for _ in stream:
                pass
            return await stream.get_final_completion()

    asked = asyncio.create_task(read())
    request = await stages.request()
    assert request.output.tools
    calls = (ToolDelta(0, "call-0", "f", '{"a"'), ToolDelta(0, None, None, ": 1}"), ToolDelta(1, "call-1", "f", "{}"))
    await stages.say(request, Delta(request.id, 1, content="So:"), Delta(request.id, 2, tool_calls=calls))
    await stages.say(request, Delta(request.id, 3, finish_reason="tool_calls", usage=USAGE))
    (choice,) = (await asked).choices
    assert choice.message.content == "So:"
    assert [(c.id, c.function.name, c.function.arguments) for c in choice.message.tool_calls] == [
        ("call-0", "f", '{"a": 1}'),
        ("call-1", "f", "{}"),
    ]
    assert choice.finish_reason == "tool_calls"


async def test_tool_calls_that_are_not_streamed(server: Running, stages: Stages) -> None:
    asked = ask(server, tools=[TOOL], tool_choice="auto")
    request = await stages.request()
    await stages.say(request, Delta(request.id, 1, tool_calls=(ToolDelta(0, "c", "f", "{}"),)))
    await stages.say(request, Delta(request.id, 2, finish_reason="tool_calls", usage=USAGE))
    (choice,) = (await asked).choices
    assert choice.message.content is None
    assert [call.function.name for call in choice.message.tool_calls] == ["f"]


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_and_token_ids(server: Running, stages: Stages, stream: bool) -> None:
    asked = ask(server, stream=stream, logprobs=True, top_logprobs=1, extra_body={"return_token_ids": True})
    request = await stages.request()
    assert request.sampling.logprobs == 1
    assert request.output.return_token_ids
    shown = ShownLogprob("a", b"a", -0.25, (("b", b"b", -2.0),))
    prompt = pack_ids([5, 9, 9, 6])
    await stages.say(request, Delta(request.id, 1, content="a", logprobs=(shown,), token_ids=(42,), prompt=prompt))
    await stages.say(request, Delta(request.id, 2, finish_reason="stop", usage=USAGE))
    reply = await asked
    if stream:
        first, second, _ = await contents(reply)
        prompt_ids, choice, message = (
            first.choices[0].delta.prompt_token_ids,
            second.choices[0],
            second.choices[0].delta,
        )
    else:
        choice, message = reply.choices[0], reply.choices[0].message
        prompt_ids = message.prompt_token_ids
    (entry,) = choice.logprobs.content
    assert (entry.token, entry.logprob, entry.bytes) == ("a", -0.25, [97])
    assert [(top.token, top.logprob) for top in entry.top_logprobs] == [("b", -2.0)]
    assert (message.content, message.completion_token_ids) == ("a", [42])
    assert prompt_ids == [5, 9, 9, 6]


@pytest.mark.parametrize("stream", [False, True])
async def test_two_choices_are_two_requests(server: Running, stages: Stages, stream: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if stream else {}
    asked = ask(server, n=2, seed=7, stream=stream, **options)
    first, second = [work.request for work in await stages.take(2)]
    assert second.id == f"{first.id}-1"
    assert (first.sampling.seed, second.sampling.seed) == (7, 8)
    for turn in range(3):
        for request in (first, second):
            await stages.say(request, Delta(request.id, turn + 1, content=f"{request.sampling.seed}"))
    await stages.say(second, Delta(second.id, 4, finish_reason="stop", usage=Usage(11, 5, 0, 11, 0, 0)))
    await stages.say(first, Delta(first.id, 4, finish_reason="length", usage=USAGE))
    reply = await asked
    if stream:
        chunks = await contents(reply)
        texts, ends, usage = ["", ""], ["", ""], chunks[-1].usage
        for chunk in chunks[:-1]:
            (choice,) = chunk.choices
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    else:
        texts = [choice.message.content for choice in reply.choices]
        ends, usage = [choice.finish_reason for choice in reply.choices], reply.usage
    assert (texts, ends) == (["777", "888"], ["length", "stop"])
    assert (usage.prompt_tokens, usage.completion_tokens) == (11, 8)


async def test_what_was_shown_is_not_shown_again(server: Running, stages: Stages) -> None:
    stream = await ask(server, stream=True)
    request = await stages.request()
    for seq in (1, 2, 1, 2, 3, 2, 3):
        await stages.say(request, Delta(request.id, seq, content=str(seq)))
    for _ in range(2):
        await stages.say(request, Delta(request.id, 4, finish_reason="stop", usage=USAGE))
    assert "".join(c.choices[0].delta.content or "" for c in await contents(stream)) == "123"


async def test_usage_keys_only_for_who_asks(server: Running, stages: Stages) -> None:
    body = {"messages": HI, "stream": True}
    asked = asyncio.create_task(events(server.url, body))
    await stages.answer(await stages.request(), "a")
    got = await asked
    assert got[-2:] == ["data: [DONE]", ""]
    assert not any("usage" in event for event in got)
    assert all(len(said(event)["choices"]) == 1 for event in got[:-2])


async def test_many_at_once_each_with_its_own_answer(server: Running, stages: Stages, redis: Redis, keys: Keys) -> None:
    async def one(i: int) -> str:
        if i % 2:
            chunks = await contents(await ask(server, stream=True, seed=i))
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return str((await ask(server, seed=i)).choices[0].message.content)

    asked = asyncio.gather(*map(one, range(64)))
    work = [entry.request for entry in await stages.take(64)]
    assert server.gateway.load().items() >= {"requests": 64, "choices": 64}.items()
    for turn in range(5):
        for request in work:
            await stages.say(request, Delta(request.id, turn + 1, content=f"{request.sampling.seed}."))
    for request in work:
        await stages.say(request, Delta(request.id, 6, finish_reason="stop", usage=USAGE))
    assert await asked == [f"{i}." * 5 for i in range(64)]
    await nothing_left(server, redis, keys)
    assert server.metric('millrace_http_requests_total{method="POST",path="/v1/chat/completions",status="200"}') == 64
    assert server.metric("millrace_time_to_first_token_seconds_count") == 64
    assert server.metric("millrace_answered_tokens_total") == 64 * 3
    assert server.metric("millrace_answered_prompt_tokens_total") == 64 * 11
    assert server.metric('millrace_open_requests{stream="true"}') == 0
