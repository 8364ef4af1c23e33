"""Answers of the Messages API, judged by the types and the stream helper of the anthropic package."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.dialects.collected import CollectedChoice
from services.gateway.dialects.messages.events import (
    PING,
    BlockWriter,
    MessageHead,
    error_body,
    error_event,
    message_body,
)
from services.gateway.dialects.messages.request import Kept
from services.gateway.errors import FailureBodies, openai_body
from shared.errors import Failure
from shared.messages import Delta, ToolDelta, Usage

pytest.importorskip("anthropic", reason="needs the extra test")

from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import ErrorResponse, Message, MessageStopEvent, RawMessageStreamEvent
from pydantic import TypeAdapter

HEAD = MessageHead("msg_1", 'a "model"')
KEPT = Kept(max_tokens=20)
FIRST = Usage(10, 1, 1, 4, 0, 0)
LAST = Usage(10, 20, 5, 4, 2, 1)
EVENT = TypeAdapter(RawMessageStreamEvent)
SIGNED = {"thinking", "redacted_thinking"}


def events_of(data: bytes) -> list[Any]:
    """The events, each of the type that the package has for it and with no field that it does not know."""
    blocks = data.split(b"\n\n")
    assert blocks.pop() == b""
    parsed = []
    for block in blocks:
        name, _, fields = block.partition(b"\ndata: ")
        event = EVENT.validate_json(fields)
        assert name == f"event: {event.type}".encode()
        assert extras(event) == []
        parsed.append(event)
    return parsed


def extras(model: Any) -> list[str]:
    """Fields in a model, or below it, that its type does not have."""
    if isinstance(model, list):
        return [name for one in model for name in extras(one)]
    if not hasattr(model, "model_extra"):
        return []
    below = [name for field in type(model).model_fields for name in extras(getattr(model, field))]
    return [*(model.model_extra or {}), *below]


def streamed(deltas: list[Delta], usage: Usage = LAST) -> Message:
    """The message that the package's stream helper puts together."""
    writer = BlockWriter(HEAD, KEPT)
    events = events_of(b"".join(map(writer.delta, deltas)) + writer.end(usage))
    snapshot, buffers = None, {}
    for event in events:
        snapshot = accumulate_event(event=event, current_snapshot=snapshot, json_bufs=buffers)
    assert isinstance(events[-1], MessageStopEvent)
    _check_blocks(events)
    return Message.model_validate(snapshot.model_dump())


def _check_blocks(events: list[Any]) -> None:
    """One block is open at a time, they are counted from 0, and each delta belongs to the one that is open."""
    opened, is_open = -1, False
    for event in events:
        if event.type == "content_block_start":
            assert not is_open
            opened, is_open = opened + 1, True
        if event.type.startswith("content_block"):
            assert is_open
            assert event.index == opened
        if event.type == "content_block_stop":
            is_open = False
    assert not is_open


def whole(deltas: list[Delta], usage: Usage = LAST, kept: Kept = KEPT) -> Message:
    collected = CollectedChoice()
    for delta in deltas:
        collected.add(delta)
    message = Message.model_validate_json(message_body(HEAD, collected, usage, kept))
    assert extras(message) == []
    return message


def call(index: int, *arguments: str) -> tuple[ToolDelta, ...]:
    return (ToolDelta(index, f"call_{index}", "f", ""), *(ToolDelta(index, None, None, one) for one in arguments))


END = Delta("r", 99, finish_reason="stop", usage=LAST)


def test_the_events_of_an_answer_in_their_order() -> None:
    deltas = [
        Delta("r", 1, reasoning="Hm", usage=FIRST),
        Delta("r", 2, reasoning=".", start=1),
        Delta("r", 5, content="I look.", tool_calls=call(0, '{"a":', "1}"), start=2),
        Delta("r", 9, tool_calls=call(1, "{}"), finish_reason="tool_calls", usage=LAST, start=5),
    ]
    writer = BlockWriter(HEAD, KEPT)
    names = [
        (event.type, getattr(getattr(event, "delta", None), "type", None))
        for event in events_of(b"".join(map(writer.delta, deltas)) + writer.end(LAST))
    ]
    start, delta, stop = "content_block_start", "content_block_delta", "content_block_stop"
    assert names == [
        ("message_start", None),
        (start, None),
        (delta, "thinking_delta"),
        (delta, "thinking_delta"),
        (delta, "signature_delta"),
        (stop, None),
        (start, None),
        (delta, "text_delta"),
        (stop, None),
        (start, None),
        (delta, "input_json_delta"),
        (delta, "input_json_delta"),
        (stop, None),
        (start, None),
        (delta, "input_json_delta"),
        (stop, None),
        ("message_delta", None),
        ("message_stop", None),
    ]
    message = streamed(deltas)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert message == whole(deltas)


def test_the_stream_begins_with_the_usage_of_the_prompt() -> None:
    writer = BlockWriter(HEAD, KEPT)
    start, *_ = events_of(writer.delta(Delta("r", 1, content="a", usage=FIRST)))
    usage = start.message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (6, 4, 0)
    assert (start.message.id, start.message.model, start.message.content) == ("msg_1", 'a "model"', [])


def test_usage_leaves_out_of_the_input_what_was_cached() -> None:
    usage = whole([END]).usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (6, 4, 0)
    assert (usage.output_tokens, usage.output_tokens_details.thinking_tokens) == (20, 5)
    assert streamed([END]).usage.model_dump() == usage.model_dump()


@pytest.mark.parametrize(
    ("end", "called", "kept", "reason", "sequence"),
    [
        (Delta("r", 9, finish_reason="stop"), False, KEPT, "end_turn", None),
        (Delta("r", 9, finish_reason="stop", stop="\n\n"), False, KEPT, "stop_sequence", "\n\n"),
        (Delta("r", 9, finish_reason="tool_calls", stop="END"), True, KEPT, "stop_sequence", "END"),
        (Delta("r", 9, finish_reason="tool_calls"), True, KEPT, "tool_use", None),
        (Delta("r", 9, finish_reason="stop"), True, KEPT, "tool_use", None),  # of a tool that was named
        (Delta("r", 9, finish_reason="length"), True, KEPT, "max_tokens", None),
        (Delta("r", 9, finish_reason="length"), False, Kept(21), "model_context_window_exceeded", None),
    ],
)
def test_why_an_answer_ended(end: Delta, called: bool, kept: Kept, reason: str, sequence: str | None) -> None:
    deltas = [Delta("r", 1, tool_calls=call(0, "{}") if called else ()), end]
    message = whole(deltas, kept=kept)
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)
    if kept is KEPT:
        assert streamed(deltas) == message


@pytest.mark.parametrize("arguments", ["", "[1]", '{"a": 1'], ids=["nothing", "no object", "cut off"])
def test_arguments_that_are_no_object_spoil_no_answer(arguments: str) -> None:
    (block,) = whole([Delta("r", 1, tool_calls=call(0, arguments)), END]).content
    assert block.input == {}


texts = st.text(st.sampled_from('ab\n"\u2028\u0085😀'), max_size=3)
JSON_PIECES = st.lists(st.sampled_from(["{}", '{"a": ', '"b"}', '{"c": [1, 2]}']), max_size=2)


@st.composite
def answers(draw: st.DrawFn) -> list[Delta]:
    """Deltas in the order in which postproc makes them: calls are written one after the other, text anywhere."""
    deltas = []
    if draw(st.booleans()):
        deltas = [Delta("r", 1, reasoning=draw(texts), usage=FIRST)]
    for index in range(draw(st.integers(0, 3))):
        deltas.append(Delta("r", 2, content=draw(texts), tool_calls=call(index)))
        half = draw(st.integers(0, 7))
        value = json.dumps({"k": draw(texts)})
        deltas.append(Delta("r", 3, tool_calls=(ToolDelta(index, None, None, value[:half]),)))
        rest = (ToolDelta(index, None, None, value[half:]),)
        deltas.append(Delta("r", 4, content=draw(texts), tool_calls=rest))
    deltas.append(Delta("r", 5, content=draw(texts)))
    return [*deltas, END]


@given(answers())
def test_streamed_and_whole_answers_are_the_same(deltas: list[Delta]) -> None:
    message = whole(deltas)
    assert streamed(deltas) == message
    assert "".join(block.text for block in message.content if block.type == "text") == "".join(
        delta.content for delta in deltas
    )


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (408, "timeout_error"),
        (409, "invalid_request_error"),
        (413, "invalid_request_error"),
        (415, "invalid_request_error"),
        (429, "rate_limit_error"),
        (431, "invalid_request_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
    ],
)
def test_a_failure_has_the_name_of_its_kind(status: int, kind: str) -> None:
    body = error_body(Failure(status, "No."))
    response = ErrorResponse.model_validate_json(body)
    assert (response.type, response.error.type, response.error.message) == ("error", kind, "No.")
    assert error_event(Failure(status, "No.")) == b"event: error\ndata: " + body + b"\n\n"


def test_a_failure_names_its_field() -> None:
    def message(text: str) -> str:
        return ErrorResponse.model_validate_json(error_body(Failure(400, text, param="a.b"))).error.message

    assert message("It is too long.") == "a.b: It is too long."
    assert message("`a.b` is too long.") == "`a.b` is too long."


def test_failures_have_the_form_of_the_api_whose_path_it_is() -> None:
    bodies = FailureBodies({"/v1/messages": error_body})
    for path in ("/v1/messages", "/v1/messages/", "/v1/messages/count_tokens", "/v1/messages/batches/x"):
        assert bodies.of(path) is error_body
    for path in ("/v1/messagesx", "/v1", "/", "/v1/chat/completions"):
        assert bodies.of(path) is openai_body


def test_a_sign_of_life_is_an_event() -> None:
    assert PING == b'event: ping\ndata: {"type":"ping"}\n\n'
