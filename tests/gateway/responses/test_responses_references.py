"""Items that stand for the output of stored responses, as the AI SDK sends them instead of what the model said."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import openai
import pytest
from gateway_stages import USAGE, Running, Stages, running
from machine import PATIENCE_S
from openai.types.responses import Response

from services.gateway.dialects.responses.answered import Answered
from services.gateway.dialects.responses.responses import ResponsesDialect
from services.gateway.http.memory import Reservation
from services.gateway.http.structure import MAX_CONTAINERS
from services.gateway.request.answer_format import AnswerFormat
from services.gateway.responses import references
from services.gateway.responses.ends import Ends
from services.gateway.responses.session import ResponseSession
from services.gateway.responses.store import StoredHead
from services.gateway.responses.turns import EarlierTurnsReader
from shared.messages import Delta, Generate, ShownLogprob, ToolDelta, unpack_ids

TOOLS: list[Any] = [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}]
QUESTION = {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}
RATED: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 20}
OTHERS = tuple((f"other {rank}", b"other", -2.0) for rank in range(20))
ENTRIES = (ShownLogprob("hm", b"hm", -1.0, OTHERS), ShownLogprob("Hello", b"Hello", -1.0, OTHERS))
SAID = Delta("", 3, reasoning="hm", content="Hello", tool_calls=(ToolDelta(0, "c", "f", '{"a": 1}'),))


async def answered(server: Running, stages: Stages, given: list[Any], **body: Any) -> tuple[Response, list[int]]:
    """A response with reasoning, a text and a call, and the prompt that its engine was given."""
    asking = asyncio.create_task(server.client.responses.create(input=given, tools=TOOLS, **body))
    (work,) = await stages.take()
    assert isinstance(work, Generate)
    request = work.request
    end = Delta(request.id, 99, start=3, finish_reason="tool_calls", usage=USAGE)
    entries = ENTRIES if "include" in body else ()
    await stages.say(request, Delta(request.id, 3, SAID.reasoning, SAID.content, SAID.tool_calls, entries), end)
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


async def test_what_the_model_said_comes_without_logprobs(server: Running, stages: Stages) -> None:
    first, _ = await answered(server, stages, [QUESTION], **RATED)
    assert len(first.output[1].content[0].logprobs[0].top_logprobs) == 20  # type: ignore[union-attr,index]
    second, _ = await answered(server, stages, [QUESTION, reference(first.output[1])])
    _, said = (await server.client.responses.input_items.list(second.id, order="asc")).data
    assert said.content[0].text == "Hello"  # type: ignore[union-attr,index]
    assert not said.content[0].logprobs  # type: ignore[union-attr,index]


async def test_what_is_referred_to_counts_where_a_response_is_kept(
    checkpoint: Path, redis_url: str, stages: Stages
) -> None:
    async with running(checkpoint, redis_url, responses_budget_bytes=60_000) as server:
        first, _ = await answered(server, stages, [QUESTION])
        again: list[Any] = [reference(first.output[1])] * 130  # a body of 10,000 bytes that stands for 20,000
        with pytest.raises(openai.APIStatusError) as refused:
            await server.client.responses.create(input=again)
    assert (refused.value.status_code, refused.value.param) == (413, "store")


@pytest.mark.parametrize("path", ["responses", "responses/input_tokens"])
async def test_a_body_is_measured_before_it_is_read(
    server: Running, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    begun = []

    async def begin(self: ResponseSession, *given: Any) -> Any:
        begun.append(given)
        return self._dialect, 0

    monkeypatch.setattr(ResponseSession, "begin", begin)
    async with httpx.AsyncClient(headers={"Authorization": "Bearer key-1"}, timeout=PATIENCE_S) as client:
        body = b'{"input":[{"x":"item_reference"}' + b",[]" * MAX_CONTAINERS + b"]}"
        refused = await client.post(f"{server.url}/v1/{path}", content=body)
        assert refused.status_code == 413
        assert not begun
        await client.post(f"{server.url}/v1/{path}", content=b'{"input":[{"type":"item_reference"}]}')
        assert begun


async def test_it_is_read_where_other_bodies_are() -> None:
    sizes = []

    async def compute(size: int, function: Callable[[], Any]) -> Any:
        sizes.append(size)
        return function()

    given = b'[{"x":"item_reference"},"item_reference",["item_reference"],{"type":["item_reference"]}]'
    body = b'{"input":%b}' % given
    dialect = ResponsesDialect(cast(Any, None), 0, 0)
    session = ResponseSession(dialect, *cast(Any, (None, None, None)))
    session._turns = EarlierTurnsReader(cast(Any, None), 0)
    assert (await session.begin(body, "", cast(Any, None), compute))[0].resolved is None
    assert sizes == [len(body), len(given)]


class Held:
    """Reservation that counts, and stored responses that say when they are read."""

    def __init__(self) -> None:
        self.size = 0
        self.sizes: list[int] = []  # when each response was read
        self.end = Answered(reasoning="r" * 3000, content="c" * 2000, finish_reason="stop")

    def grow(self, count: int) -> None:
        self.size += count

    async def head(self, request_id: str, owner: str) -> Any:
        return StoredHead("", 0.0, AnswerFormat(kept=b'{"tools":[],"store":true}'), ("0" * 16, "1" * 16))

    async def items(self, request_id: str) -> bytes:
        return b"[]"

    async def find_said(self, request_id: str, head: Any) -> Answered:
        self.sizes.append(self.size)
        return self.end


async def test_whole_responses_are_reserved_one_by_one() -> None:
    held = Held()
    ends = cast(Ends, SimpleNamespace(store=held, find_said=held.find_said))
    names = [f"msg_{number:016x}" for number in (0, 1, 2, 0)]
    given = references.read(b"[%b]" % b",".join(b'{"type":"item_reference","id":"%b"}' % n.encode() for n in names))
    assert given is not None
    items, total = await references.resolve(given, ends, "", 30_000, cast(Reservation, held))
    assert held.sizes[:2] == [0, held.sizes[2] // 2]
    assert held.sizes[1] > 5000
    assert total == held.size > 3 * 5000 + 2000
    assert sum(map(len, items)) < 4 * 2300, "only what is named is kept"
    earlier = Held()
    ends = cast(Ends, SimpleNamespace(store=earlier, find_said=earlier.find_said))
    turns = await EarlierTurnsReader(ends, 30_000).read(f"resp_{2:016x}", "", cast(Reservation, earlier))
    assert earlier.sizes[:2] == [0, earlier.sizes[2] // 2]
    assert turns.size == earlier.size > 3 * 5000
