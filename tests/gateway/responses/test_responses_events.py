"""Deltas as the events of a response: openai's types, numbers that no cut changes, and the same whole answer."""

import itertools
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from services.gateway.dialects.collected import CollectedChoice
from services.gateway.dialects.merge import merge_text
from services.gateway.dialects.responses.answered import Answered, as_delta, failed
from services.gateway.dialects.responses.events import ResponseEvents, replay
from services.gateway.dialects.responses.resource import Head, resource, unanswered
from services.gateway.errors import CANCELLED, TIMED_OUT
from shared.messages import Delta, ShownLogprob, ToolDelta, Usage

ECHO: dict[str, Any] = {
    "instructions": "Be brief.",
    "previous_response_id": None,
    "tools": [{"type": "function", "name": "f", "description": None, "parameters": None, "strict": None}],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "store": True,
    "metadata": {"a": "b"},
}
HEAD = Head("0123456789abcdef", 123, "demo", ECHO)
SUMMARY_HEAD = Head("0123456789abcdef", 123, "demo", {**ECHO, "reasoning": {"effort": None, "summary": "auto"}})
USAGE = Usage(10, 20, 5, 3, 2, 1)
EVENT = TypeAdapter(ResponseStreamEvent)
CALLS = (ToolDelta(0, "c0", "f", '{"a": 1}'), ToolDelta(1, "c1", "g", "{}"))

# An answer token by token, as (reasoning, content, calls, characters of content behind the first call).
TOKENS: list[Delta] = [
    Delta("r", 1, reasoning="I "),
    Delta("r", 2, reasoning="think\u2028."),
    Delta("r", 3, content="Hé"),
    Delta("r", 4, content="llo"),
    Delta("r", 5, tool_calls=(ToolDelta(0, "c0", "f", '{"a"'),)),
    Delta("r", 6, tool_calls=(ToolDelta(0, None, None, ": 1}"),)),
    Delta("r", 7, content="\nand ", later=5),
    Delta("r", 8, tool_calls=(ToolDelta(1, "c1", "g", "{}"),)),
    Delta("r", 9, content="then", later=4),
    Delta("r", 10, finish_reason="tool_calls", usage=USAGE),
]


def joined(run: list[Delta]) -> Delta:
    """The delta of several tokens, as postproc makes it."""
    calls: list[ToolDelta] = []
    for piece in (call for delta in run for call in delta.tool_calls):
        if calls and calls[-1].index == piece.index and piece.name is None and calls[-1].name is None:
            calls[-1] = ToolDelta(piece.index, None, None, calls[-1].arguments + piece.arguments)
        else:
            calls.append(piece)
    return Delta(
        "r",
        run[-1].seq,
        "".join(delta.reasoning for delta in run),
        "".join(delta.content for delta in run),
        tuple(calls),
        logprobs=tuple(entry for delta in run for entry in delta.logprobs),
        finish_reason=run[-1].finish_reason,
        usage=run[-1].usage,
        start=run[0].seq - 1,
        later=sum(delta.later for delta in run),
    )


class Ended:
    """An open request that has ended."""

    def __init__(self, failure: Any = None) -> None:
        self.failure = failure


def written(deltas: list[Delta], after: int = -1, logprobs: bool = False, head: Head = HEAD) -> list[dict[str, Any]]:
    """The events of a stream, each checked against openai's types."""
    ends: list[Answered] = []
    events = ResponseEvents(head, logprobs, after, ends.append)
    data = events.begin() + b"".join(events.delta(0, delta, 0) for delta in deltas) + events.end(Ended())  # type: ignore[arg-type]
    assert len(ends) == 1
    return parsed(data)


def parsed(data: bytes) -> list[dict[str, Any]]:
    *events, done, rest = data.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    found = []
    for event in events:
        name, _, line = event.partition(b"\n")
        one = json.loads(line.removeprefix(b"data: "))
        assert name == b"event: " + one["type"].encode()
        checked = EVENT.validate_python(one)
        assert checked.type == one["type"]
        if "response" in one:
            Response.model_validate(one["response"], strict=True)
        found.append(one)
    return found


def without_time(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for event in events:
        if "response" in event:
            event["response"].pop("completed_at")
    return events


def expanded(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same events with one character in each that has text."""
    single = []
    for event in events:
        text = event.get("delta")
        if text is None:
            single.append(event)
            continue
        first = event["sequence_number"] - len(text) + 1
        single += [{**event, "delta": one, "sequence_number": first + place} for place, one in enumerate(text)]
    return single


WHOLE = without_time(expanded(written(TOKENS)))


def test_a_call_of_a_namespace_has_both_names() -> None:
    space = {"type": "namespace", "name": "agents", "description": "Helpers.", "tools": ECHO["tools"]}
    head = Head("0123456789abcdef", 123, "demo", {**ECHO, "tools": [*ECHO["tools"], space]})
    calls = (ToolDelta(0, "c0", "agents.f", "{}"), ToolDelta(1, "c1", "others.f", "{}"))
    events = ResponseEvents(head, False, -1, lambda _: None)
    last = Delta("r", 1, tool_calls=calls, finish_reason="tool_calls", usage=USAGE)
    told = parsed(events.begin() + events.delta(0, last, 0) + events.end(Ended()))  # type: ignore[arg-type]
    items = [one["item"] for one in told if one["type"].startswith("response.output_item.")]
    items += told[-1]["response"]["output"]
    names = [(item.get("namespace"), item["name"]) for item in items]
    assert names == [("agents", "f")] * 2 + [(None, "others.f")] * 2 + [("agents", "f"), (None, "others.f")]
    assert told[-1]["response"]["tools"][1] == space


def test_the_events_of_an_answer_in_their_order() -> None:
    kinds = [event["type"].removeprefix("response.") for event in written(TOKENS)]
    message = ["output_item.added", "content_part.added"]
    ends = ["content_part.done", "output_item.done"]
    call = ["output_item.added", "function_call_arguments.delta"]
    assert kinds == [
        *("created", "in_progress"),
        *(*message, "reasoning_text.delta", "reasoning_text.delta", "reasoning_text.done", *ends),
        *(*message, "output_text.delta", "output_text.delta", "output_text.done", *ends),
        *(*call, "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        *(*call, "function_call_arguments.done", "output_item.done"),
        *(*message, "output_text.delta", "output_text.done", *ends),
        "completed",
    ]


def test_a_summary_is_the_reasoning_itself_in_the_events_and_the_place_of_a_summary() -> None:
    plain, told = written(TOKENS), written(TOKENS, head=SUMMARY_HEAD)
    assert [event["type"].removeprefix("response.") for event in told[2:8]] == [
        *("output_item.added", "reasoning_summary_part.added"),
        *("reasoning_summary_text.delta", "reasoning_summary_text.delta", "reasoning_summary_text.done"),
        "reasoning_summary_part.done",
    ]
    added, part, first, _, text, ended, item = told[2:9]
    assert (added["item"]["summary"], added["item"]["content"]) == ([], [])
    assert [one["summary_index"] for one in told[3:8]] == [0] * 5
    assert not any("content_index" in one for one in told[3:8])
    assert (part["part"], first["delta"]) == ({"type": "summary_text", "text": ""}, "I ")
    whole = {"type": "summary_text", "text": "I think\u2028."}
    assert (text["text"], ended["part"], item["item"]["summary"], item["item"]["content"]) == (
        *(whole["text"], whole),
        *([whole], []),
    )
    assert told[-1]["response"]["output"][0] == item["item"]
    # All others are those of an answer without a summary, under the same numbers.
    assert [one["sequence_number"] for one in told] == [one["sequence_number"] for one in plain]
    assert told[9:-1] == plain[9:-1]


def test_a_summary_that_nobody_stores_has_what_its_client_sends_it_back_beside() -> None:
    head = msgspec.structs.replace(SUMMARY_HEAD, echo={**SUMMARY_HEAD.echo, "store": False})
    told = written(TOKENS, head=head)
    items = [told[2]["item"], told[8]["item"], told[-1]["response"]["output"][0]]
    assert [item["encrypted_content"] for item in items] == ["enc_0123456789abcdef"] * 3
    assert [len(item["summary"]) for item in items] == [0, 1, 1]


@pytest.mark.parametrize("after", range(-1, 25))
def test_a_summary_is_continued_and_replayed_behind_a_number(after: int) -> None:
    whole = without_time(expanded(written(TOKENS, head=SUMMARY_HEAD)))
    rest = [event for event in whole if event["sequence_number"] > after]
    assert without_time(expanded(written(TOKENS, after, head=SUMMARY_HEAD))) == rest
    ends: list[Answered] = []
    events = ResponseEvents(SUMMARY_HEAD, False, -1, ends.append)
    for delta in TOKENS:
        events.delta(0, delta, 0)
    events.end(Ended())  # type: ignore[arg-type]
    assert without_time(expanded(parsed(replay(SUMMARY_HEAD, False, ends[0], after)))) == rest


def test_numbers_count_characters_and_events() -> None:
    assert [event["sequence_number"] for event in WHOLE] == list(range(len(WHOLE)))


@given(st.sets(st.integers(1, len(TOKENS) - 1)), st.integers(-1, 200))
def test_however_deltas_are_cut_the_events_behind_a_number_are_the_same(cuts: set[int], after: int) -> None:
    places = [0, *sorted(cuts), len(TOKENS)]
    deltas = [joined(TOKENS[first:end]) for first, end in itertools.pairwise(places)]
    merged = [delta for _, delta in merge_text([(0, delta) for delta in deltas])]
    for given_deltas in (deltas, merged):
        events = without_time(expanded(written(given_deltas, after)))
        assert events == [event for event in WHOLE if event["sequence_number"] > after]


def test_an_answer_that_is_kept_is_replayed_and_shown_as_it_was() -> None:
    ends: list[Answered] = []
    events = ResponseEvents(HEAD, False, -1, ends.append)
    live = events.begin() + b"".join(events.delta(0, delta, 0) for delta in TOKENS) + events.end(Ended())  # type: ignore[arg-type]
    [end] = ends
    assert expanded(parsed(replay(HEAD, False, end, -1))) == expanded(parsed(live))
    assert parsed(live)[-1]["response"] == resource(HEAD, end)
    choice = CollectedChoice()
    choice.add(as_delta(end))
    assert choice.content_around_calls == ("Héllo", "\nand then")
    assert [item["type"] for item in resource(HEAD, end)["output"]] == [
        *("reasoning", "message", "function_call", "function_call", "message")
    ]


def test_a_limit_leaves_the_last_item_incomplete() -> None:
    cut = [*TOKENS[:4], Delta("r", 5, finish_reason="length", usage=USAGE)]
    *_, item, last = written(cut)
    assert (item["type"], item["item"]["status"]) == ("response.output_item.done", "incomplete")
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in last["response"]["output"]] == ["completed", "incomplete"]


@pytest.mark.parametrize(("reason", "count"), [("stop", 2), ("length", 1)])
def test_an_answer_of_reasoning_alone(reason: Any, count: int) -> None:
    last = written([TOKENS[0], Delta("r", 2, finish_reason=reason, usage=USAGE)])[-1]
    assert len(last["response"]["output"]) == count, "an agent waits for a message, if the model did not run out"


def test_logprobs_are_those_of_the_message_and_come_at_its_end() -> None:
    def entry(text: str) -> ShownLogprob:
        return ShownLogprob(text, text.encode(), -0.5, ((text, text.encode(), -0.5),))

    texts = ["I ", "think", "", "\n", "He", "llo", "", "{}"]
    entries = [entry(text) for text in texts]
    deltas = [
        Delta("r", 3, reasoning="I think", logprobs=tuple(entries[:3])),
        Delta("r", 6, content="Hello", logprobs=tuple(entries[3:6]), start=3),
        Delta("r", 8, tool_calls=(ToolDelta(0, "c", "f", "{}"),), logprobs=tuple(entries[6:]), start=6),
        Delta("r", 9, finish_reason="tool_calls", usage=Usage(1, 8, 3, 0, 0, 0), start=8),
    ]
    for cut in (deltas, [joined(deltas)]):
        events = written(cut, logprobs=True)
        [done] = [event for event in events if event["type"] == "response.output_text.done"]
        assert [one["token"] for one in done["logprobs"]] == ["He", "llo"]
        message = events[-1]["response"]["output"][1]
        assert message["content"][0]["logprobs"] == done["logprobs"]
    single = [without_time(expanded(written(cut, logprobs=True))) for cut in (deltas, [joined(deltas)])]
    assert single[0] == single[1]


@pytest.mark.parametrize(("failure", "status"), [(TIMED_OUT, "failed"), (CANCELLED, "cancelled")])
def test_a_failure_ends_the_stream_for_every_reader(failure: Any, status: str) -> None:
    events = ResponseEvents(HEAD, False, -1, lambda _: None)
    live = parsed(events.begin() + events.delta(0, TOKENS[0], 0) + events.end(Ended(failure)))[-1]  # type: ignore[arg-type]
    assert (live["type"], live["response"]["status"]) == ("response.failed", status)
    [again] = parsed(replay(HEAD, False, failed(failure), live["sequence_number"] - 1))
    assert again == live
    if status == "failed":
        assert live["response"]["error"]["code"] == "server_error"


def test_what_has_not_ended_is_a_response() -> None:
    Response.model_validate(unanswered(HEAD, "queued"), strict=True)
