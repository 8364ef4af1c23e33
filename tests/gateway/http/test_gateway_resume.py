"""Clients that come back: event ids, streams that go on at another gateway, answers that went astray or were lost."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from gateway_stages import USAGE, Running, Stages, running, until
from machine import PATIENCE_S
from openai import AsyncStream
from openai.types.chat import ChatCompletionChunk
from redis.asyncio import Redis

from shared.bus.keys import Keys
from shared.bus.records import Record, Records
from shared.errors import Failure
from shared.messages import Attach, Delta, Failed, Request, ToolDelta, Usage, pack_ids

HI: list[Any] = [{"role": "user", "content": "Hi"}]
WITH_PICTURE: list[Any] = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]}
]


class Event(msgspec.Struct, frozen=True):
    """One event of a stream as it is on the wire."""

    id: str | None
    data: str

    @property
    def chunk(self) -> Any:
        return json.loads(self.data)

    @property
    def text(self) -> str:
        choices = self.chunk["choices"] if self.data != "[DONE]" else []
        return "".join(choice["delta"].get("content") or "" for choice in choices)


class Reader:
    """A stream that is being read."""

    def __init__(self, reply: httpx.Response) -> None:
        self._lines = reply.aiter_lines()

    async def until(self, last: str) -> list[Event]:
        """The events up to the one with this id or this data."""
        events: list[Event] = []
        event_id = None
        async with asyncio.timeout(PATIENCE_S):
            async for line in self._lines:
                field, _, value = line.partition(": ")
                if field == "id":
                    event_id = value
                elif field == "data":
                    events.append(Event(event_id, value))
                    if last in (event_id, value):
                        return events
                    event_id = None
        raise AssertionError(f"the stream ended before {last}: {events}")

    async def rest(self) -> list[Event]:
        return await self.until("[DONE]")


@asynccontextmanager
async def reading(
    server: Running, path: str = "", body: dict[str, Any] | None = None, **headers: str
) -> AsyncIterator[Reader]:
    """A stream: a POST of `body` that asks for the ids of events, or the GET of what is at `path`."""
    headers = {"X-Event-IDs": "true", **headers} if body is not None else headers
    url = f"{server.url}/v1/chat/completions{path}"
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        payload = {"json": {"messages": HI, "stream": True, **body}} if body is not None else {}
        async with client.stream("POST" if payload else "GET", url, headers=headers, **payload) as reply:
            assert reply.status_code == 200, await reply.aread()
            yield Reader(reply)


async def get(server: Running, path: str, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        return await client.get(f"{server.url}/v1/chat/completions{path}", headers=headers)


def texts(events: list[Event]) -> str:
    return "".join(event.text for event in events)


# ------------------------------------------------------------------------------------------------------------- ids


async def test_every_event_of_a_delta_has_an_id(server: Running, stages: Stages) -> None:
    async with reading(server, body={"stream_options": {"include_usage": True}}) as reader:
        request = await stages.request()
        await stages.say(request, Delta(request.id, 2, content="Hel"))
        await reader.until("2")
        call = ToolDelta(0, "c", "f", "{}")
        await stages.say(request, Delta(request.id, 5, reasoning="hm", content="lo", tool_calls=(call,)))
        assert [event.id for event in await reader.until("5")] == ["2-5-1", "2-5-2", "2-5-3", "5"]
        await stages.say(request, Delta(request.id, 7, content="!", finish_reason="stop", usage=USAGE))
        text, finish, usage, done = await reader.rest()
    assert (text.id, finish.id, usage.id, done.id) == ("5-7-1", "7", None, None)
    assert usage.chunk["usage"]["total_tokens"] == 14


async def test_text_that_is_written_as_one_has_the_id_of_its_last_step(server: Running, stages: Stages) -> None:
    async with reading(server, body={}) as reader:
        request = await stages.request()
        (first,) = await reader.until("0")
        assert first.chunk["choices"][0]["delta"]["role"] == "assistant"
        await stages.say(request, *(Delta(request.id, seq, content=str(seq)) for seq in range(1, 6)))
        (merged,) = await reader.until("5")
        assert (merged.id, merged.text) == ("5", "12345")


async def test_an_id_of_several_choices_names_them_all(server: Running, stages: Stages) -> None:
    async with reading(server, body={"n": 2}) as reader:
        first, second = [work.request for work in await stages.take(2)]
        await stages.say(second, Delta(second.id, 4, content="b"))
        assert [event.id for event in await reader.until("0.4")] == [None, "0.0", "0.4"]
        await stages.say(first, Delta(first.id, 3, content="a"))
        assert [event.text for event in await reader.until("3.4")] == ["a"]


# ------------------------------------------------------------------------------------------------------- going on


async def test_a_stream_goes_on_at_another_gateway(
    server: Running, other: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    async with reading(server, body={"stream_options": {"include_usage": True}}) as abandoned:
        request = await stages.request()
        await stages.say(request, Delta(request.id, 3, content="Hel"))
        before = await abandoned.until("3")
        async with reading(other, f"/chatcmpl-{request.id}/events", **{"last-event-id": "3"}) as reader:
            attach = await stages.attached()
            assert (attach.request_id, attach.after) == (request.id, 3)
            assert attach.gateway.startswith("other.")
            await stages.send(attach.gateway, Delta(request.id, 5, content="lo", start=3))
            await stages.send(attach.gateway, Delta(request.id, 6, finish_reason="stop", usage=USAGE, start=5))
            after = await reader.rest()
    await until(lambda: not server.gateway.load()["choices"])
    assert texts(before) + texts(after) == "Hello"
    assert [event.id for event in before + after] == ["0", "3", "5", "6", None, None]
    assert {event.chunk["id"] for event in [*before, *after[:-1]]} == {f"chatcmpl-{request.id}"}
    assert {event.chunk["created"] for event in [*before, *after[:-1]]} == {int(request.created)}
    assert after[-2].chunk["usage"]["total_tokens"] == 14
    assert await redis.xlen(keys.control()) == 0, "the first gateway left alone what another was reading"
    assert (
        other.metric(
            'millrace_http_requests_total{method="GET",path="/v1/chat/completions/{name}/events",status="200"}'
        )
        == 1
    )


async def test_who_only_looked_on_ends_nothing_by_leaving(
    server: Running, other: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    async with reading(server, body={}) as reader:
        request = await stages.request()
        await stages.say(request, Delta(request.id, 1, content="a"))
        before = await reader.until("1")
        async with reading(other, f"/chatcmpl-{request.id}/events") as looker:
            gateway = (await stages.attached()).gateway
            await stages.send(gateway, Delta(request.id, 1, content="a"))
            assert texts(await looker.until("1")) == "a"
        await until(other.idle)
        assert (await Records(redis, keys).get([request.id]))[request.id].gateways == (request.gateway,)
        assert await redis.xlen(keys.control()) == 0
        await stages.say(request, Delta(request.id, 2, content="b", finish_reason="stop", usage=USAGE, start=1))
        assert texts(before) + texts(await reader.rest()) == "ab"


async def test_the_client_library_reads_it(server: Running, other: Running, stages: Stages) -> None:
    stream = await server.client.chat.completions.create(model="demo-model", messages=HI, stream=True)
    request = await stages.request()
    await stages.keep(request)
    again = await other.client.get(
        f"/chat/completions/chatcmpl-{request.id}/events",
        cast_to=ChatCompletionChunk,
        stream=True,
        stream_cls=AsyncStream[ChatCompletionChunk],
    )
    attach = await stages.attached()
    assert attach.after == 0
    await stages.send(attach.gateway, Delta(request.id, 3, content="all", finish_reason="length", usage=USAGE))
    chunks = [chunk async for chunk in again]
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", None, None]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "all"
    await stream.close()


async def test_two_choices_go_on_each_from_where_it_was(server: Running, other: Running, stages: Stages) -> None:
    async with reading(server, body={"n": 2}) as abandoned:
        first, second = [work.request for work in await stages.take(2)]
        await stages.say(first, Delta(first.id, 3, content="a", finish_reason="stop", usage=USAGE))
        await stages.say(second, Delta(second.id, 7, content="b"))
        await abandoned.until("3.7")
        async with reading(other, f"/chatcmpl-{first.id}/events", **{"last-event-id": "3.7"}) as reader:
            attached = [await stages.attached() for _ in range(2)]
            assert {attach.request_id: attach.after for attach in attached} == {first.id: 3, second.id: 7}
            gateway = attached[0].gateway
            await stages.send(gateway, Delta(first.id, 3, finish_reason="stop", usage=USAGE, start=3))
            await stages.send(gateway, Delta(second.id, 9, "", "c", finish_reason="stop", usage=USAGE, start=7))
            events = await reader.rest()
    assert [event.id for event in events] == ["3.7-9-1", "3.9", None]
    assert (texts(events), events[0].chunk["choices"][0]["index"]) == ("c", 1)


@pytest.mark.parametrize("shown", ["2-5-1", "2-5-2", "2-5-3", "5"])
async def test_a_reader_comes_back_between_the_events_of_a_delta(
    server: Running, other: Running, stages: Stages, shown: str
) -> None:
    calls = (ToolDelta(0, "c", "f", "{}"),)
    async with reading(server, body={}) as abandoned:
        request = await stages.request()
        whole = Delta(request.id, 5, reasoning="hm", content="b", tool_calls=calls, start=2)
        end = Delta(request.id, 7, "", "c", finish_reason="tool_calls", usage=USAGE, start=5)
        await stages.say(request, Delta(request.id, 2, reasoning="h"), whole)
        before = await abandoned.until(shown)
        async with reading(other, f"/chatcmpl-{request.id}/events", **{"last-event-id": shown}) as reader:
            attach = await stages.attached()
            assert (attach.after, attach.until) == ((5, 0) if shown == "5" else (2, 5))
            larger = msgspec.structs.replace(whole, seq=6, content="bc")  # made for somebody else here
            await stages.send(attach.gateway, larger, *([] if shown == "5" else [whole]), end)
            after = await reader.rest()
        rest = await abandoned.until("5") if shown != "5" else []
    ids = ["0", "2", "2-5-1", "2-5-2", "2-5-3", "5"]
    assert [event.id for event in before + after] == [*ids, "5-7-1", "7", None]
    assert [event.chunk["choices"] for event in before + rest] == [
        event.chunk["choices"] for event in (before + after)[: len(ids)]
    ]


async def test_who_has_seen_the_end_is_told_that_it_was(
    checkpoint: Path, redis_url: str, server: Running, stages: Stages
) -> None:
    async with reading(server, body={"stream_options": {"include_usage": True}}) as reader:
        request = await stages.request()
        await stages.answer(request, "x")
        await stages.keep(request)
        await reader.rest()
    async with (
        running(checkpoint, redis_url, name="other", hold_headers_s=0) as other,
        reading(other, f"/chatcmpl-{request.id}/events", **{"last-event-id": "2"}) as again,
    ):
        attach = await stages.attached()
        await stages.send(attach.gateway, Delta(request.id, 2, finish_reason="stop", usage=USAGE, start=2))
        usage, done = await again.rest()
    assert usage.chunk["usage"]["completion_tokens"] == 3
    assert done.data == "[DONE]"


async def test_a_position_behind_the_end_is_refused(server: Running, stages: Stages) -> None:
    async with reading(server, body={}) as reader:
        request = await stages.request()
        await stages.answer(request, "Hello", " there")
        await reader.rest()
    await stages.keep(request)
    asked = asyncio.create_task(get(server, f"/chatcmpl-{request.id}/events", **{"last-event-id": "99"}))
    await stages.attached()
    await stages.send(request.gateway, Delta(request.id, 3, finish_reason="stop", usage=USAGE, start=99))
    reply = await asked
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "Last-Event-ID"
    assert "behind the end" in reply.json()["error"]["message"]
    await until(server.idle)


async def test_a_position_behind_the_end_of_a_running_stream_is_an_error_at_its_end(
    server: Running, stages: Stages
) -> None:
    async with reading(server, body={}, **{"idempotency-key": "k"}) as reader:
        request = await stages.request()
        await reader.until("0")
        async with reading(server, f"/chatcmpl-{request.id}/events", **{"last-event-id": "99"}) as ahead:
            await stages.attached()
            await stages.answer(request, "Hello")
            error, done = await ahead.rest()
            assert (error.chunk["error"]["code"], error.chunk["error"]["param"]) == (400, "Last-Event-ID")
            assert done.data == "[DONE]"
        assert "Hello" in texts(await reader.rest())


async def test_token_ids_and_logprobs_are_still_asked_for(server: Running, other: Running, stages: Stages) -> None:
    body = {"return_token_ids": True, "logprobs": True}
    async with reading(server, body=body) as first:
        request = await stages.request()
        said = Delta(request.id, 1, content="a", token_ids=(4,), prompt=pack_ids([5, 9, 9, 6]))
        await stages.say(request, said)
        events = await first.until("1")
        async with reading(other, f"/chatcmpl-{request.id}/events") as again:
            await stages.send((await stages.attached()).gateway, said)
            assert [event.chunk["choices"] for event in await again.until("1")] == [
                event.chunk["choices"] for event in events
            ]
    opening, event = [event.chunk["choices"][0]["delta"] for event in events]
    assert opening == {"role": "assistant", "content": "", "prompt_token_ids": [5, 9, 9, 6]}
    assert event["completion_token_ids"] == [4]


@pytest.mark.parametrize(
    ("shown", "after", "until", "expected"),
    [("0-2-1.0", (0, 0), (2, 0), ["0", "1", "2"]), ("2.0", (2, 0), (0, 0), ["1", "2"])],
)
async def test_each_choice_says_its_prompt_once_however_often_its_reader_comes_back(
    server: Running,
    other: Running,
    stages: Stages,
    shown: str,
    after: tuple[int, int],
    until: tuple[int, int],
    expected: list[str],
) -> None:
    """The second choice's prompt is another here, as it is where the picture at a link changed in between."""
    body = {"n": 2, "return_token_ids": True}
    async with reading(server, body=body) as abandoned:
        first, second = [work.request for work in await stages.take(2)]
        said = Delta(first.id, 2, content="0", token_ids=(4, 4), prompt=pack_ids([5, 9, 6]))
        await stages.say(first, said)
        before = await abandoned.until(shown)
        async with reading(other, f"/chatcmpl-{first.id}/events", **{"last-event-id": shown}) as reader:
            attached = {attach.request_id: attach for attach in [await stages.attached() for _ in range(2)]}
            asked = [attached[request.id] for request in (first, second)]
            assert ([one.after for one in asked], [one.until for one in asked]) == ([*after], [*until])
            gateway = asked[0].gateway
            if until[0]:
                await stages.send(gateway, said)
            end = Delta(first.id, 4, content="1", token_ids=(4,), finish_reason="stop", usage=USAGE, start=2)
            prompt = pack_ids([5, 9, 9, 6])
            whole = Delta(second.id, 2, "", "2", token_ids=(4,), finish_reason="stop", usage=USAGE, prompt=prompt)
            await stages.send(gateway, end, whole)
            events = await reader.rest()
    assert [event.text for event in events if event.text] == expected
    deltas = [event.chunk["choices"][0] for event in [*before, *events][:-1]]
    prompts = [(one["index"], one["delta"]["prompt_token_ids"]) for one in deltas if "role" in one["delta"]]
    assert prompts == [(0, [5, 9, 6]), (1, [5, 9, 9, 6])]


async def test_who_waits_for_the_prompts_ids_is_told_of_a_failure_all_the_same(
    checkpoint: Path, redis_url: str, stages: Stages
) -> None:
    async with (
        running(checkpoint, redis_url, hold_headers_s=0) as server,
        reading(server, body={"messages": WITH_PICTURE, "return_token_ids": True}) as reader,
    ):
        request = await stages.request()
        await stages.tell(request, Failed(request.id, Failure(400, "Not an image.", param="messages[0]")))
        error, done = await reader.rest()
    assert (error.chunk["error"]["code"], done.data) == (400, "[DONE]")


async def test_what_there_is_to_go_on_with(server: Running, stages: Stages, redis: Redis, keys: Keys) -> None:
    async with reading(server, body={"n": 2}):
        first, second = [work.request for work in await stages.take(2)]
        for name in ("chatcmpl-0000000000000000", "chatcmpl-", first.id, f"chatcmpl-{second.id}", "x" * 300):
            for path in (f"/{name}/events", f"/{name}"):
                reply = await get(server, path)
                assert (reply.status_code, reply.json()["error"]["code"]) == (404, "request_not_found")
        for last in ("1", "1.2.3", "1-2.3", "1-2-3-4.5", "a.b", "1.", "-1.2", "1.2e3", "9" * 20 + ".1"):
            reply = await get(server, f"/chatcmpl-{first.id}/events", **{"last-event-id": last})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "Last-Event-ID")
        await redis.delete(keys.request(second.id))
        assert (await get(server, f"/chatcmpl-{first.id}/events")).status_code == 404


async def test_an_answer_is_only_for_whose_it_is(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    async with running(checkpoint, redis_url, api_keys=("key-1", "key-2")) as server:
        asked = asyncio.create_task(server.client.chat.completions.create(model="demo-model", messages=HI))
        request = await stages.request()
        assert b"key-1" not in request.form
        for path in (f"/chatcmpl-{request.id}/events", f"/chatcmpl-{request.id}"):
            assert (await get(server, path, authorization="Bearer key-2")).status_code == 404
        assert (await get(server, f"/chatcmpl-{request.id}", authorization="Bearer key-1")).status_code == 202
        await stages.answer(request, "x")
        await asked


async def test_how_long_an_answer_is_kept(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    async with running(checkpoint, redis_url, retain_s=7, request_timeout_s=50) as server:
        async with reading(server, body={}):
            assert (await stages.request()).retain_s == 7
        async with reading(server, body={"n": 2}):
            assert {work.request.retain_s for work in await stages.take(2)} == {57}
    async with running(checkpoint, redis_url, retain_s=0) as server, reading(server, body={"n": 2}):
        assert {work.request.retain_s for work in await stages.take(2)} == {0}


# ------------------------------------------------------------------------------------------------------- cancelling


async def post(server: Running, path: str, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        return await client.post(f"{server.url}/v1/chat/completions{path}", headers=headers)


async def test_a_request_with_a_key_is_cancelled_at_any_gateway(
    server: Running, other: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    async with reading(server, body={"n": 2}, **{"Idempotency-Key": "mine"}) as reader:
        requests = [work.request for work in await stages.take(2)]
        await reader.until("0.0")
    await until(server.idle)
    assert await redis.xlen(keys.control()) == 0, "leaving does not cancel it"
    reply = await post(other, f"/chatcmpl-{requests[0].id}/cancel")
    assert (reply.status_code, reply.json()["status"]) == (200, "cancelled")
    assert await stages.cancelled() == {request.id for request in requests}
    records = await Records(redis, keys).get([request.id for request in requests])
    assert all(record.cancelled for record in records.values() if isinstance(record, Record))


async def test_an_answer_that_is_complete_is_not_cancelled(
    server: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    async with reading(server, body={}) as reader:
        request = await stages.request()
        await stages.answer(request, "x")
        await reader.rest()
    await stages.keep(request)
    reply = await post(server, f"/chatcmpl-{request.id}/cancel")
    assert (reply.status_code, reply.json()["status"]) == (200, "completed")
    assert await redis.xlen(keys.control()) == 0


async def test_who_may_cancel_a_request(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    async with running(checkpoint, redis_url, api_keys=("key-1", "key-2")) as server:
        asked = asyncio.create_task(server.client.chat.completions.create(model="demo-model", messages=HI))
        request = await stages.request()
        path = f"/chatcmpl-{request.id}/cancel"
        assert (await post(server, path)).status_code == 401
        refused = await post(server, path, authorization="Bearer key-2")
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "request_not_found")
        assert (await post(server, "/no-such-name/cancel", authorization="Bearer key-1")).status_code == 404
        await stages.answer(request, "x")
        await asked


# --------------------------------------------------------------------------------------------------- the whole answer


async def test_the_whole_answer_when_there_is_one(server: Running, other: Running, stages: Stages) -> None:
    async with reading(server, body={"n": 2}) as reader:
        first, second = [work.request for work in await stages.take(2)]
        await stages.answer(first, "a")
        await stages.keep(first)
        reply = await get(other, f"/chatcmpl-{first.id}")
        assert (reply.status_code, reply.headers["retry-after"]) == (202, "1")
        assert (reply.json()["id"], reply.json()["status"]) == (f"chatcmpl-{first.id}", "in_progress")
        await stages.answer(second, "b")
        await stages.keep(second)
        await reader.rest()
    asked = asyncio.create_task(other.client.chat.completions.retrieve(f"chatcmpl-{first.id}"))
    for _ in range(2):
        attach = await stages.attached()
        assert attach.after == 0
        text = "a" if attach.request_id == first.id else "b"
        delta = Delta(attach.request_id, 2, content=text, finish_reason="stop", usage=USAGE)
        await stages.send(attach.gateway, delta)
    answer = await asked
    assert [choice.message.content for choice in answer.choices] == ["a", "b"]
    assert (answer.id, answer.created) == (f"chatcmpl-{first.id}", int(first.created))
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6


async def test_a_kept_answer_outlives_the_time_it_had(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    async with running(checkpoint, redis_url, request_timeout_s=50) as server:
        async with reading(server, body={}) as reader:
            request = await stages.request()
            await stages.keep(request)
            await stages.answer(request, "x")
            await reader.rest()
        server.ahead_s = 51  # what it had
        async with reading(server, f"/chatcmpl-{request.id}/events") as again:
            await stages.attached()
            await again.until("0")
            await asyncio.sleep(0.1)  # five times as long as it takes the gateway to look at deadlines
            delta = Delta(request.id, 2, content="x", finish_reason="stop", usage=USAGE)
            await stages.send(request.gateway, delta)
            assert texts(await again.rest()) == "x"


# ------------------------------------------------------------------------------------------------- gaps, other readers


async def test_what_is_missing_is_asked_for_and_nothing_is_shown_before(
    server: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    async with reading(server, body={}) as reader:
        request = await stages.request()
        await stages.say(request, Delta(request.id, 1, content="a"))
        await reader.until("1")
        for seq in (4, 5):
            await stages.send(request.gateway, Delta(request.id, seq, content="x", start=seq - 1))
        attach = await stages.attached()
        assert attach == Attach(request.id, request.gateway, 1)
        await stages.send(request.gateway, Delta(request.id, 6, content="bcdef", start=1))
        await stages.send(request.gateway, Delta(request.id, 7, finish_reason="stop", usage=USAGE, start=6))
        events = await reader.rest()
    assert texts(events) == "bcdef"
    assert await redis.xlen(keys.tokens(request.shard)) == 1, "once until it is answered"


async def test_two_readers_of_one_answer_at_one_gateway(server: Running, stages: Stages) -> None:
    async with reading(server, body={}) as first:
        request = await stages.request()
        await stages.say(request, Delta(request.id, 5, content="hello"))
        await first.until("5")
        async with reading(server, f"/chatcmpl-{request.id}/events") as second:
            assert (await stages.attached()).after == 0
            assert server.gateway.load()["choices"] == 2
            # Made for the second, of no use to the first; then what comes for both.
            await stages.send(request.gateway, Delta(request.id, 6, content="hello,", start=0))
            await second.until("6")
            await stages.send(request.gateway, Delta(request.id, 6, content=",", start=5))
            await stages.send(request.gateway, Delta(request.id, 7, content=" you", start=6))
            await second.until("7")
            await first.until("7")
        await until(lambda: server.gateway.load()["choices"] == 1)
        await stages.send(request.gateway, Delta(request.id, 8, finish_reason="stop", usage=USAGE, start=7))
        await first.rest()
    assert await stages.redis.xlen(stages.keys.control()) == 0, "one reader left, and the other stayed"
    assert await stages.redis.xlen(stages.keys.tokens(request.shard)) == 1


async def test_an_end_that_cannot_be_used_is_asked_for_again(server: Running, stages: Stages) -> None:
    async with reading(server, body={}) as reader:
        request = await stages.request()
        await stages.say(request, Delta(request.id, 3, content="abc"))
        await reader.until("3")
        await stages.send(request.gateway, Delta(request.id, 5, "", "abcd", finish_reason="stop", usage=USAGE, start=0))
        assert (await stages.attached()).after == 3
        await stages.send(request.gateway, Delta(request.id, 5, "", "d", finish_reason="stop", usage=USAGE, start=3))
        assert texts(await reader.rest()) == "d"


# ------------------------------------------------------------------------------------------------ silence and losses


async def test_a_silent_request_that_another_gateway_has_is_asked_for_again(
    checkpoint: Path, redis_url: str, stages: Stages, redis: Redis, keys: Keys
) -> None:
    async with running(checkpoint, redis_url, watch_s=0.05) as server, reading(server, body={}) as reader:
        request = await stages.request()
        await redis.hset(keys.request(request.id), "gateways", "another")
        attach = await stages.attached()
        assert attach == Attach(request.id, request.gateway, 0)
        await stages.say(request, Delta(request.id, 1, content="a", finish_reason="stop", usage=USAGE))
        assert texts(await reader.rest()) == "a"


async def test_an_end_that_was_missed_is_asked_for(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    async with running(checkpoint, redis_url, watch_s=0.05) as server, reading(server, body={}) as reader:
        request = await stages.request()
        await stages.say(request, Delta(request.id, 1, content="a"))
        await reader.until("1")
        await stages.keep(request)
        assert (await stages.attached()).after == 1
        await stages.say(request, Delta(request.id, 2, finish_reason="stop", usage=USAGE))
        await reader.rest()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_redis_has_lost_is_answered(
    checkpoint: Path, redis_url: str, stages: Stages, redis: Redis, keys: Keys, stream: bool
) -> None:
    async with running(checkpoint, redis_url, watch_s=0.05) as server:
        asked = asyncio.create_task(
            server.client.chat.completions.create(model="demo-model", messages=HI, stream=stream)
        )
        request = await stages.request()
        if stream:
            replying = await asked
            await redis.flushall()
            with pytest.raises(openai.APIError, match="lost this request") as told:
                async for _ in replying:
                    pass
            assert told.value.code == "503"
        else:
            await redis.flushall()
            with pytest.raises(openai.InternalServerError, match="lost this request") as failed:
                await asked
            assert (failed.value.status_code, failed.value.response.headers["retry-after"]) == (503, "1")
            assert failed.value.code == "request_lost"
        await until(lambda: not server.gateway.load()["choices"])
        again = asyncio.create_task(server.client.chat.completions.create(model="demo-model", messages=HI))
        stages = Stages(redis, keys)
        request = await stages.request()
        assert await redis.exists(keys.deltas(request.gateway)), "made again, for others write to what is there only"
        await stages.answer(request, "back")
        assert (await again).choices[0].message.content == "back"


async def test_what_was_read_is_cut(checkpoint: Path, redis_url: str, stages: Stages, redis: Redis, keys: Keys) -> None:
    """A gateway's stream is empty again, but for what its nodes round up to, when nothing is said any more."""
    texts = [f"{n} " for n in range(300)]
    async with running(checkpoint, redis_url, watch_s=0.05) as server:
        asked = asyncio.create_task(server.client.chat.completions.create(model="demo-model", messages=HI))
        request = await stages.request()
        await stages.answer(request, *texts)
        assert (await asked).choices[0].message.content == "".join(texts)
        async with asyncio.timeout(PATIENCE_S):
            while await redis.xlen(keys.deltas(request.gateway)) > 100:  # noqa: ASYNC110  # nobody tells of it
                await asyncio.sleep(0.01)
        assert 0 < await redis.ttl(keys.deltas(request.gateway)) <= 60


async def test_everything_is_looked_up_once_redis_is_back_without_it(
    server: Running, stages: Stages, redis: Redis
) -> None:
    """`watch_s` is seconds here: it is the stream's absence that tells."""
    async with reading(server, body={}) as reader:
        await stages.request()
        await redis.flushall()
        _, error, _ = await reader.rest()
    assert error.chunk["error"]["code"] == 503


async def test_a_request_that_ends_unkept_is_not_lost(
    checkpoint: Path, redis_url: str, stages: Stages, redis: Redis, keys: Keys
) -> None:
    async with running(checkpoint, redis_url, retain_s=0) as server, reading(server, body={}) as reader:
        request = await stages.request()
        await stages.answer(request, "x")
        await Records(redis, keys).delete([request.id])
        assert texts(await reader.rest()) == "x"


async def test_postproc_does_not_know_it_either(server: Running, stages: Stages) -> None:
    gone = Failure(404, "No such request.", code="request_not_found")
    async with reading(server, body={}) as reader:
        request = await stages.request()
        await stages.say(request, Delta(request.id, 0, failure=gone))
        _, error, _ = await reader.rest()
    assert error.chunk["error"]["message"].startswith("The server lost this request")


# ------------------------------------------------------------------------------------------------- a gateway that ends


async def test_a_stream_that_a_closing_gateway_drops_goes_on_elsewhere(
    checkpoint: Path, redis_url: str, other: Running, stages: Stages, redis: Redis, keys: Keys
) -> None:
    async with running(checkpoint, redis_url) as server, reading(server, body={}) as reader:
        request = await stages.request()
        await stages.say(request, Delta(request.id, 1, content="a"))
        await reader.until("1")
        await server.gateway.close()
        error, _ = await reader.rest()
        assert error.chunk["error"]["code"] == 503
    async with reading(other, f"/chatcmpl-{request.id}/events", **{"last-event-id": "1"}) as again:
        gateway = (await stages.attached()).gateway
        await stages.send(
            gateway, Delta(request.id, 2, "", "b", finish_reason="stop", usage=Usage(1, 1, 0, 0, 0, 0), start=1)
        )
        assert texts(await again.rest()) == "b"
    assert await redis.xlen(keys.control()) == 0


async def test_what_nobody_can_come_back_for_is_cancelled_by_a_closing_gateway(
    checkpoint: Path, redis_url: str, stages: Stages
) -> None:
    async with running(checkpoint, redis_url) as server:
        asked = asyncio.create_task(server.client.chat.completions.create(model="demo-model", messages=HI))
        request: Request = await stages.request()
        await server.gateway.close()
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            await asked
        assert await stages.cancelled() == {request.id}
