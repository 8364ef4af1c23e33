"""Deltas as bytes: chunks of a stream, and one answer put together from the same deltas."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from services.gateway.dialects.chat_events import (
    AnswerHead,
    ChunkWriter,
    choice_json,
    completion_body,
    error_event,
    quote,
    total_usage,
)
from services.gateway.dialects.collected import CollectedChoice
from services.gateway.dialects.event_ids import EventIds, NoEventIds
from services.gateway.dialects.merge import merge_text
from services.gateway.inflight.request import StreamPosition
from shared.errors import Failure
from shared.messages import Delta, ShownLogprob, ToolDelta, Usage, pack_ids

HEAD = AnswerHead("chatcmpl-1", 123, 'a "model"', "fp_1")
USAGE = Usage(10, 20, 5, 3, 2, 1)
MARK = b"id: 1\n"


def ids(n: int = 2) -> EventIds:
    return EventIds([StreamPosition(0)] * n)


def chunks_of(data: bytes) -> list[dict[str, Any]]:
    """The JSON of each event, checked against the client's own types."""
    events = data.split(b"\n\n")
    assert events.pop() == b""
    parsed = [json.loads(event.rpartition(b"data: ")[2]) for event in events]
    for one in parsed:
        ChatCompletionChunk.model_validate(one)
    return parsed


def ids_of(data: bytes) -> list[bytes | None]:
    """The id of each event."""
    events = data.split(b"\n\n")[:-1]
    return [event.partition(b"\n")[0].removeprefix(b"id: ") if event.startswith(b"id: ") else None for event in events]


def deltas_of(data: bytes) -> list[dict[str, Any]]:
    return [chunk["choices"][0]["delta"] for chunk in chunks_of(data)]


def test_the_frame_of_every_chunk() -> None:
    (chunk,) = chunks_of(ChunkWriter(HEAD, 2, include_usage=False).delta(1, Delta("r", 1, content="Hi"), ids()))
    assert chunk == {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 123,
        "model": 'a "model"',
        "system_fingerprint": "fp_1",
        "choices": [{"index": 1, "delta": {"content": "Hi"}, "logprobs": None, "finish_reason": None}],
    }


def test_the_first_chunk_names_the_role() -> None:
    assert deltas_of(ChunkWriter(HEAD, 1, False).first_chunks(MARK)) == [{"role": "assistant", "content": ""}]


def test_where_token_ids_are_asked_for_the_role_comes_with_the_prompts() -> None:
    chunks, places = ChunkWriter(HEAD, 1, False, token_ids=True), ids(1)
    assert chunks.first_chunks(places.line()) == b""
    first = Delta("r", 3, content="a", token_ids=(4,), prompt=pack_ids([1, 2]))
    data = chunks.delta(0, first, places)
    assert deltas_of(data) == [
        {"role": "assistant", "content": "", "prompt_token_ids": [1, 2]},
        {"content": "a", "completion_token_ids": [4]},
    ]
    assert ids_of(data) == [b"0-3-1", b"3"]
    assert chunks.delta(0, first, ids(1), skip=1) == data.partition(b"\n\n")[2]
    assert deltas_of(chunks.delta(0, Delta("r", 5, content="b", token_ids=(5,), start=3), places)) == [
        {"content": "b", "completion_token_ids": [5]}
    ]


def test_an_engine_that_does_not_say_the_prompt_leaves_its_ids_null() -> None:
    chunks = ChunkWriter(HEAD, 1, False, token_ids=True)
    (opening, _) = deltas_of(chunks.delta(0, Delta("r", 3, content="a", token_ids=(4,)), ids(1)))
    assert opening["prompt_token_ids"] is None
    assert answer(Delta("r", 1, finish_reason="stop"), with_ids=True)["message"]["prompt_token_ids"] is None


def test_every_event_says_how_much_its_reader_has() -> None:
    chunks, places = ChunkWriter(HEAD, 2, False), ids()
    calls = (ToolDelta(0, "c0", "f", "{}"),)
    step = Delta("r", 7, reasoning="a", content="b", tool_calls=calls, finish_reason="tool_calls", usage=USAGE, start=2)
    data = chunks.first_chunks(places.line())
    data += chunks.delta(1, Delta("r", 3, content="x"), places)
    data += chunks.delta(0, step, places)
    data += chunks.delta(1, Delta("r", 9, content="y", token_ids=(1,)), places)
    within = [f"2-7-{event}.3".encode() for event in range(1, 5)]
    assert ids_of(data) == [None, b"0.0", b"0.3", *within, b"7.3", b"7.9"]


@pytest.mark.parametrize("shown", range(6))
def test_who_has_some_events_of_a_delta_gets_the_others(shown: int) -> None:
    calls = (ToolDelta(0, "c0", "f", "{}"),)
    delta = Delta("r", 7, reasoning="a", content="b", tool_calls=calls, finish_reason="stop", usage=USAGE, start=2)
    events = ChunkWriter(HEAD, 1, False).delta(0, delta, ids()).split(b"\n\n")
    assert ChunkWriter(HEAD, 1, False).delta(0, delta, ids(), shown).split(b"\n\n") == events[shown:]


def test_an_id_of_one_choice_is_its_number() -> None:
    assert EventIds([StreamPosition(5)]).line() == b"id: 5\n"


def test_reasoning_has_both_names_or_none() -> None:
    assert deltas_of(ChunkWriter(HEAD, 1, False).delta(0, Delta("r", 1, reasoning="a", content="b"), ids())) == [
        {"reasoning_content": "a", "reasoning": "a"},
        {"content": "b"},
    ]


def test_one_tool_fragment_a_chunk_and_its_name_once_without_arguments() -> None:
    calls = (ToolDelta(0, "c0", "f", '{"a":'), ToolDelta(0, None, None, "1}"), ToolDelta(1, "c1", "g", ""))
    assert [
        delta["tool_calls"]
        for delta in deltas_of(ChunkWriter(HEAD, 1, False).delta(0, Delta("r", 1, tool_calls=calls), ids()))
    ] == [
        [{"index": 0, "id": "c0", "type": "function", "function": {"name": "f", "arguments": ""}}],
        [{"index": 0, "function": {"arguments": '{"a":'}}],
        [{"index": 0, "function": {"arguments": "1}"}}],
        [{"index": 1, "id": "c1", "type": "function", "function": {"name": "g", "arguments": ""}}],
    ]


def test_the_finish_is_a_chunk_of_its_own() -> None:
    data = ChunkWriter(HEAD, 1, False).delta(
        0, Delta("r", 2, content="end", finish_reason="length", usage=USAGE), ids()
    )
    text, finish = (chunk["choices"][0] for chunk in chunks_of(data))
    assert (text["delta"], text["finish_reason"]) == ({"content": "end"}, None)
    assert (finish["delta"], finish["finish_reason"]) == ({}, "length")


def test_usage_is_null_until_it_comes_and_absent_unless_asked_for() -> None:
    asked = ChunkWriter(HEAD, 1, include_usage=True)
    assert chunks_of(asked.first_chunks(MARK))[0]["usage"] is None
    (last,) = chunks_of(asked.usage(total_usage([USAGE])))
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 30
    assert "usage" not in chunks_of(ChunkWriter(HEAD, 1, False).first_chunks(MARK))[0]


def test_a_postproc_that_does_not_count_on_the_way_leaves_usage_null() -> None:
    writer = ChunkWriter(HEAD, 1, True, continuous_usage=True)
    chunks = chunks_of(writer.delta(0, Delta("r", 3, content="a"), ids(1)))
    assert [chunk["usage"] for chunk in chunks] == [None, None]


def test_an_event_without_an_id_is_its_data() -> None:
    data = ChunkWriter(HEAD, 1, False).delta(0, Delta("r", 1, reasoning="a", content="b"), NoEventIds())
    assert ids_of(data) == [None, None]
    assert len(deltas_of(data)) == 2


def test_details_ride_on_the_first_chunk_of_a_delta() -> None:
    shown = ShownLogprob("é", "é".encode(), -0.5, (("x", b"x", float("-inf")),))
    delta = Delta("r", 2, reasoning="é", content="b", logprobs=(shown,), token_ids=(7, 8))
    first, second = (chunk["choices"][0] for chunk in chunks_of(ChunkWriter(HEAD, 1, False).delta(0, delta, ids())))
    assert first["delta"]["completion_token_ids"] == [7, 8]
    assert first["logprobs"] == {
        "content": [
            {
                "token": "é",
                "logprob": -0.5,
                "bytes": [195, 169],
                "top_logprobs": [{"token": "x", "logprob": -9999.0, "bytes": [120]}],
            }
        ],
        "refusal": None,
    }
    assert second["logprobs"] is None
    silent = chunks_of(ChunkWriter(HEAD, 1, False).delta(0, Delta("r", 1, token_ids=(9,)), ids()))
    assert silent[0]["choices"][0]["delta"] == {"completion_token_ids": [9]}


def test_an_error_inside_a_stream() -> None:
    data = error_event(Failure(503, "gone", type="server_error", param="p", code="c"))
    assert json.loads(data.removeprefix(b"data: ")) == {
        "error": {"message": "gone", "type": "server_error", "param": "p", "code": 503}
    }


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_text_is_one_line_whatever_takes_it_apart(text: str) -> None:
    quoted = quote(text)
    assert json.loads(quoted) == text
    assert len(quoted.decode().splitlines()) == 1


PIECES = st.one_of(
    st.builds(lambda t: Delta("r", 0, content=t), st.sampled_from("abc")),
    st.builds(lambda t: Delta("r", 0, reasoning=t), st.sampled_from("def")),
    st.builds(lambda t, u: Delta("r", 0, reasoning=t, content=u), st.sampled_from("d"), st.sampled_from("a")),
    st.builds(lambda: Delta("r", 0, tool_calls=(ToolDelta(0, "c", "f", "x"),))),
    st.builds(lambda: Delta("r", 0, content="t", token_ids=(1,))),
    st.builds(lambda: Delta("r", 0, content="t", prompt=pack_ids([1]))),
)


@given(st.lists(st.tuples(st.integers(0, 1), PIECES), max_size=12))
def test_merging_changes_the_cut_and_not_the_text(deltas: list[tuple[int, Delta]]) -> None:
    merged = merge_text(deltas)
    assert len(merged) <= len(deltas)
    writer = ChunkWriter(HEAD, 2, False)
    assert _flow(writer, merged) == _flow(writer, deltas)


def _flow(writer: ChunkWriter, deltas: list[tuple[int, Delta]]) -> list[tuple[int, str, Any]]:
    """(choice, field, value) in order, with neighbouring text of a field joined."""
    flow: list[tuple[int, str, Any]] = []
    for chunk in chunks_of(b"".join(writer.delta(index, delta, ids()) for index, delta in deltas)):
        (choice,) = chunk["choices"]
        for field, value in choice["delta"].items():
            last = [i for i, (index, _, _) in enumerate(flow) if index == choice["index"]][-1:]
            joins = field in ("content", "reasoning") and last and flow[last[0]][1] == field
            if joins:
                flow[last[0]] = (choice["index"], field, flow[last[0]][2] + value)
            elif field != "reasoning_content":
                flow.append((choice["index"], field, value))
    return sorted(flow, key=lambda item: item[0])


def test_plain_text_that_waited_is_one_chunk() -> None:
    deltas = [(0, Delta("r", i, content=str(i))) for i in range(5)]
    assert [delta.content for _, delta in merge_text(deltas)] == ["01234"]


def test_the_first_text_that_waited_keeps_its_place_and_usage() -> None:
    deltas = [(0, Delta("r", 1, content="a", usage=USAGE)), (0, Delta("r", 2, content="b", start=1))]
    assert merge_text(deltas) == [(0, Delta("r", 2, content="ab", usage=USAGE))]
    later = Usage(11, 2, 1, 4, 0, 0)
    deltas[1] = (0, Delta("r", 2, content="b", start=1, usage=later))
    assert merge_text(deltas) == [(0, Delta("r", 2, content="ab", usage=later))]


def answer(*deltas: Delta, **options: Any) -> dict[str, Any]:
    collected = CollectedChoice()
    for delta in deltas:
        collected.add(delta)
    settings = {"with_logprobs": False, "with_ids": False, **options}
    body = json.loads(completion_body(HEAD, [choice_json(collected, 0, **settings)], total_usage([USAGE])))
    ChatCompletion.model_validate(body)
    return dict(body["choices"][0])


def test_an_answer_put_together() -> None:
    choice = answer(
        Delta("r", 1, reasoning="th"),
        Delta("r", 2, reasoning="ink", content="an"),
        Delta("r", 3, content="swer", finish_reason="stop"),
    )
    said = {"role": "assistant", "content": "answer", "refusal": None}
    assert choice == {
        "index": 0,
        "message": {**said, "reasoning_content": "think", "reasoning": "think"},
        "logprobs": None,
        "finish_reason": "stop",
    }


def test_an_answer_of_tool_calls_alone_has_no_content() -> None:
    message = answer(
        Delta("r", 1, tool_calls=(ToolDelta(0, "c0", "f", "{"), ToolDelta(0, None, None, "}"))),
        Delta("r", 2, tool_calls=(ToolDelta(1, "c1", "g", "{}"),), finish_reason="tool_calls"),
    )["message"]
    assert message["content"] is None
    assert message["tool_calls"] == [
        {"id": "c0", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        {"id": "c1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    assert "reasoning_content" not in message


def test_details_of_an_answer() -> None:
    shown = ShownLogprob("a", b"a", -0.5, ())
    choice = answer(
        Delta("r", 1, content="a", logprobs=(shown,), token_ids=(4,), prompt=pack_ids([1, 2])),
        Delta("r", 3, token_ids=(5,), finish_reason="stop", start=1),
        with_logprobs=True,
        with_ids=True,
    )
    assert [one["token"] for one in choice["logprobs"]["content"]] == ["a"]
    assert (choice["message"]["prompt_token_ids"], choice["message"]["completion_token_ids"]) == ([1, 2], [4, 5])


def test_an_answer_that_never_left_thinking_has_empty_content() -> None:
    assert answer(Delta("r", 1, reasoning="th", finish_reason="length"))["message"]["content"] == ""


def test_usage_of_several_choices_counts_the_prompt_once() -> None:
    usage = total_usage([USAGE, Usage(10, 7, 1, 9, 2, 1)])
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (10, 27, 37)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3, "image_tokens": 2, "video_tokens": 1}
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 6


@pytest.mark.parametrize("n", [1, 3])
def test_choices_are_told_apart(n: int) -> None:
    writer = ChunkWriter(HEAD, n, False)
    data = b"".join(writer.delta(i, Delta("r", 1, content=str(i)), ids(n)) for i in range(n))
    assert [(c["choices"][0]["index"], c["choices"][0]["delta"]["content"]) for c in chunks_of(data)] == [
        (i, str(i)) for i in range(n)
    ]
