"""Every form of answer over HTTP, held against the types of OpenAI's and Anthropic's packages (`strict_types.py`).

What those types leave open, and OpenAI's description of its API demands, is asserted beside them. What we add is named
here and in docs/api.md; a field that neither knows fails.
"""

import asyncio
import json
from typing import Any

import anthropic.types
import httpx
import msgspec
import pytest
from asking import BROKEN, HI, TOOL
from batch_files import answering, chat_line, create, ended, jsonl
from gateway_stages import USAGE, Running, Stages
from machine import PATIENCE_S
from openai.types import Batch, Completion, FileDeleted, FileObject, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseItem
from openai.types.responses.input_token_count_response import InputTokenCountResponse
from openai.types.shared import ErrorObject
from strict_types import events_of, held, response_events

from shared.errors import Failure
from shared.messages import Delta, Failed, ShownLogprob, ToolDelta

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
SHOWN = (ShownLogprob("a", b"a", -0.5, (("a", b"a", -0.5), ("b", b"b", float("-inf")))),)
CALL = Delta("", 4, tool_calls=(ToolDelta(0, "c0", "f", '{"a"'),))
CUT = Delta("", 9, finish_reason="length", usage=USAGE)
STOPPED = Delta("", 9, finish_reason="stop", usage=USAGE)
# Ends that a small model never reaches, too.
ENDS: dict[str, tuple[Delta, ...]] = {
    "text": (Delta("", 1, reasoning="hm"), Delta("", 2, content="a"), STOPPED),
    "calls": (
        Delta("", 1, reasoning="hm"),
        Delta("", 2, content="a"),
        CALL,
        Delta("", 5, tool_calls=(ToolDelta(0, None, None, ":1}"), ToolDelta(1, "c1", "agents.h", "{}"))),
        Delta("", 6, content="later", later=5),
        Delta("", 9, finish_reason="tool_calls", usage=USAGE),
    ),
    "cut within a call": (CALL, CUT),
    "cut within the reasoning": (Delta("", 1, reasoning="hm"), CUT),
    "cut before a text": (CUT,),
    "no text": (STOPPED,),
    "log-probabilities": (
        Delta("", 1, reasoning="a", logprobs=SHOWN),
        Delta("", 2, content="a", logprobs=SHOWN),
        STOPPED,
    ),
}
COUNTS = {"image_tokens", "video_tokens"}
IDS = {"prompt_token_ids", "completion_token_ids"}
CHAT_EXTENSIONS = {"reasoning", "reasoning_content", *COUNTS, *IDS}
# Of the last two openai's package has types without them, for events, and OpenAI's description has them.
RESPONSE_EXTENSIONS = {"store", "presence_penalty", "frequency_penalty", *COUNTS, "bytes", "name"}
FUNCTION: dict[str, Any] = {"type": "function", "name": "h"}
TOOLS: list[Any] = [{**FUNCTION, "name": "f"}, {"type": "namespace", "name": "agents", "tools": [FUNCTION]}]
MODEL_EXTENSIONS = {"root", "max_model_len", "limits", "features"}


async def ask(server: Running, path: str, body: Any = None) -> httpx.Response:
    """The answer to a POST, or to a GET without a body."""
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        return await client.request("GET" if body is None else "POST", path, json=body)


async def answer(server: Running, stages: Stages, path: str, body: dict[str, Any], *parts: Delta | Failure) -> str:
    """The answer to a request each of whose choices is these deltas, or fails."""
    asking = asyncio.create_task(ask(server, path, body))
    for work in await stages.take(body.get("n", 1)):
        for part in parts:
            if isinstance(part, Failure):
                await stages.tell(work.request, Failed(work.request.id, part))
            else:
                await stages.say(work.request, msgspec.structs.replace(part, request_id=work.request.id))
    return (await asking).text


@pytest.mark.parametrize("end", ENDS)
async def test_a_chat_completion(server: Running, stages: Stages, end: str) -> None:
    asked: dict[str, Any] = {"messages": HI, "tools": [TOOL], "return_token_ids": True, "n": 2}
    if end == "log-probabilities":
        asked |= {"logprobs": True, "top_logprobs": 2}
    body = await answer(server, stages, CHAT, asked, *ENDS[end])
    held(ChatCompletion, body, CHAT_EXTENSIONS)
    for choice in json.loads(body)["choices"]:
        assert choice.keys() == {"index", "message", "logprobs", "finish_reason"}
        assert choice["message"].keys() >= {"role", "content", "refusal"}
    asked |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    events = events_of(await answer(server, stages, CHAT, asked, *ENDS[end]))
    assert events
    for _, data in events:
        held(ChatCompletionChunk, data, CHAT_EXTENSIONS)
        assert all(choice.keys() >= {"index", "delta", "finish_reason"} for choice in json.loads(data)["choices"])


@pytest.mark.parametrize("end", ["text", "cut before a text", "log-probabilities"])
async def test_a_completion(server: Running, stages: Stages, end: str) -> None:
    asked: dict[str, Any] = {"prompt": "a", **({"logprobs": 2} if end == "log-probabilities" else {})}
    held(Completion, await answer(server, stages, COMPLETIONS, asked, *ENDS[end]), COUNTS)
    asked |= {"stream": True, "stream_options": {"include_usage": True}}
    events = events_of(await answer(server, stages, COMPLETIONS, asked, *ENDS[end]))
    assert events
    for _, data in events:
        chunk = json.loads(data)
        for choice in chunk["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"  # null in OpenAI's streams, not in their type
        held(Completion, json.dumps(chunk), COUNTS)


@pytest.mark.parametrize("summary", ["auto", None])
@pytest.mark.parametrize("end", ENDS)
async def test_a_response(server: Running, stages: Stages, end: str, summary: str | None) -> None:
    asked: dict[str, Any] = {"input": "Hi", "tools": TOOLS, "reasoning": {"summary": summary}}
    if end == "log-probabilities":
        asked |= {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    body = await answer(server, stages, RESPONSES, asked, *ENDS[end])
    made = held(Response, body, RESPONSE_EXTENSIONS)
    for part in (part for item in json.loads(body)["output"] for part in item.get("content", ())):
        assert part["type"] != "output_text" or part.keys() == {"type", "text", "annotations", "logprobs"}
    assert (await ask(server, f"{RESPONSES}/{made.id}")).text == body
    asked["stream"] = True
    live = response_events(await answer(server, stages, RESPONSES, asked, *ENDS[end]), RESPONSE_EXTENSIONS)
    again = await ask(server, f"{RESPONSES}/{live[-1].response.id}?stream=true")
    assert response_events(again.text, RESPONSE_EXTENSIONS)[-1] == live[-1]


async def test_a_response_that_has_no_answer(server: Running, stages: Stages) -> None:
    queued = await ask(server, RESPONSES, {"input": "Hi", "background": True})
    made = held(Response, queued.text, RESPONSE_EXTENSIONS)
    assert made.status == "queued"
    cancelled = await ask(server, f"{RESPONSES}/{made.id}/cancel", {})
    assert held(Response, cancelled.text, RESPONSE_EXTENSIONS).status == "cancelled"
    await stages.take()
    asked = {"input": "Hi", "stream": True}
    failed = response_events(
        await answer(server, stages, RESPONSES, asked, BROKEN), {*RESPONSE_EXTENSIONS, "param", "type"}
    )
    assert failed[-1].response.error.code == "server_error"


async def test_the_input_of_a_response(server: Running, stages: Stages) -> None:
    items: list[Any] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
    ]
    asking = asyncio.create_task(ask(server, RESPONSES, {"input": items}))
    request = await stages.request()
    await stages.answer(request, "x")
    await asking
    listed = json.loads((await ask(server, f"{RESPONSES}/resp_{request.id}/input_items?order=asc")).text)
    assert listed.keys() == {"object", "data", "first_id", "last_id", "has_more"}
    assert len(listed["data"]) == len(items)
    for item in listed["data"]:
        held(ResponseItem, json.dumps(item))
    assert listed["data"][1]["content"] == [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}]
    counted = await ask(server, f"{RESPONSES}/input_tokens", {"input": items})
    assert held(InputTokenCountResponse, counted.text).input_tokens > 0


@pytest.mark.parametrize("end", [end for end in ENDS if end != "log-probabilities"])
async def test_a_message(server: Running, stages: Stages, end: str) -> None:
    asked: dict[str, Any] = {"messages": HI, "max_tokens": 99}
    held(anthropic.types.Message, await answer(server, stages, MESSAGES, asked, *ENDS[end]))
    events = events_of(await answer(server, stages, MESSAGES, {**asked, "stream": True}, *ENDS[end]))
    assert (events[0][0], events[-1][0]) == ("message_start", "message_stop")
    for name, data in events:
        assert held(anthropic.types.RawMessageStreamEvent, data).type == name
    counted = await ask(server, f"{MESSAGES}/count_tokens", {"messages": HI})
    assert held(anthropic.types.MessageTokensCount, counted.text).input_tokens > 0


async def test_failures(server: Running, stages: Stages) -> None:
    for path, body in (
        (CHAT, {"messages": HI, "top_p": 2}),
        (CHAT, {"messages": HI, "model": 1}),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}),
        (RESPONSES, {"input": "a", "tools": [{"type": "web_search"}]}),
        (f"{RESPONSES}/resp_0123456789abcdef", None),
        ("/v1/files/file-000000000000000000000000", None),
        ("/v1/nothing", None),
        ("/v1/files", {}),
    ):
        reply = await ask(server, path, body)
        assert reply.status_code >= 400
        _held_error(reply.text)
    _held_error(await answer(server, stages, CHAT, {"messages": HI}, BROKEN))
    for kind in (CHAT, COMPLETIONS):
        question = {"messages": HI} if kind == CHAT else {"prompt": "a"}
        text = await answer(server, stages, kind, {**question, "stream": True}, Delta("", 1, content="a"), BROKEN)
        failed = json.loads(events_of(text)[-1][1])
        assert failed["error"]["code"] == BROKEN.status  # a number on purpose: docs/api.md
        _held_error(json.dumps({"error": {**failed["error"], "code": None}}))
    for body in (
        {"messages": HI},
        {"messages": HI, "max_tokens": 9, "tools": [{"type": "bash_20250124", "name": "b"}]},
    ):
        held(anthropic.types.ErrorResponse, (await ask(server, MESSAGES, body)).text)
    held(
        anthropic.types.ErrorResponse, await answer(server, stages, MESSAGES, {"messages": HI, "max_tokens": 9}, BROKEN)
    )
    asked = {"messages": HI, "max_tokens": 9, "stream": True}
    name, data = events_of(await answer(server, stages, MESSAGES, asked, Delta("", 1, content="a"), BROKEN))[-1]
    assert held(anthropic.types.ErrorResponse, data).type == name


def _held_error(body: str) -> None:
    fields = json.loads(body)["error"]
    assert fields.keys() == {"message", "type", "param", "code"}
    held(ErrorObject, json.dumps(fields))


async def test_models_files_and_batches(server: Running, stages: Stages) -> None:
    models = await ask(server, "/v1/models")
    [model] = models.json()["data"]
    for body in (json.dumps(model), (await ask(server, f"/v1/models/{model['id']}")).text):
        held(Model, body, MODEL_EXTENSIONS)
    async with answering(stages):
        batch = await create(server, jsonl(chat_line("1"), chat_line("2", top_p=2)), metadata={"a": "b"})
        made = await ended(server, batch.id)
    faulty = await ended(server, (await create(server, b'{"a": 1}\n')).id)
    for shown in (batch, made, faulty):
        held(Batch, shown.to_json())
    listed = (await ask(server, "/v1/batches")).json()
    assert listed.keys() == {"object", "data", "first_id", "last_id", "has_more"}
    for one in listed["data"]:
        held(Batch, json.dumps(one))
        held(Batch, (await ask(server, f"/v1/batches/{one['id']}")).text)
    assert made.output_file_id
    assert made.error_file_id
    [line] = await _lines(server, made.output_file_id)
    held(ChatCompletion, json.dumps(line["response"]["body"]), CHAT_EXTENSIONS)
    [line] = await _lines(server, made.error_file_id)
    _held_error(json.dumps(line["response"]["body"]))
    for file in (await ask(server, "/v1/files")).json()["data"]:
        held(FileObject, json.dumps(file))
        held(FileObject, (await ask(server, f"/v1/files/{file['id']}")).text)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        held(FileDeleted, (await client.delete(f"/v1/files/{made.output_file_id}")).text)


async def _lines(server: Running, file_id: str) -> list[dict[str, Any]]:
    content = (await ask(server, f"/v1/files/{file_id}/content")).text
    lines = [json.loads(line) for line in content.splitlines()]
    for line in lines:
        assert line.keys() == {"id", "custom_id", "response", "error"}
        assert line["response"].keys() == {"status_code", "request_id", "body"}
    return lines
