"""Answers held against the types of OpenAI's and Anthropic's own packages, whose clients never check them.

The clients build their objects without validation, so an answer of a wrong shape fails later, in a caller's hands, or
at once in clients of other languages, whose code is generated from the same description. Nothing is coerced here, and
fields that a type does not have must be named by the test.
"""

import json
from collections.abc import Iterable
from functools import cache
from typing import Any, get_args

from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def held(kind: Any, body: str | bytes, beyond: Iterable[str] = ()) -> Any:
    """Return a body as a value of the package's type, whose fields beyond it, anywhere, are among those named."""
    value = _adapter(kind).validate_json(body, strict=True)
    assert fields_beyond(value) <= set(beyond), body
    return value


def fields_beyond(value: Any) -> set[str]:
    """Return the names of the fields that the types of a value do not have."""
    if isinstance(value, BaseModel):
        own = [fields_beyond(getattr(value, name)) for name in type(value).model_fields]
        return set(value.model_extra or ()).union(*own)
    if isinstance(value, list):
        return set().union(*map(fields_beyond, value))
    return set()


def events_of(text: str) -> list[tuple[str | None, str]]:
    """Return the name and the data of each event of a stream, but for signs of life and the mark of the end."""
    found: list[tuple[str | None, str]] = []
    for block in text.split("\n\n"):
        fields = dict(line.partition(": ")[::2] for line in block.splitlines() if not line.startswith(":"))
        if fields.get("data", "[DONE]") != "[DONE]":
            found.append((fields.get("event"), fields["data"]))
    return found


def response_events(text: str, beyond: Iterable[str] = ()) -> list[Any]:
    """Return the events of a streamed response, each of the type that its name says, in an order that holds together.

    Numbers grow; an item, a part and a text each begin before they go on, and end as the sum of what came.
    """
    found = []
    for name, data in events_of(text):
        kind = json.loads(data)["type"]
        assert name == kind
        found.append(held(_event_types()[kind], data, beyond))
    numbers = [event.sequence_number for event in found]
    assert numbers == sorted(set(numbers))
    assert [event.type for event in found[:2]] == ["response.created", "response.in_progress"]
    items: list[Any] = []
    texts: dict[str, str] = {}
    for event in found:
        kind = event.type
        if kind == "response.output_item.added":
            assert event.output_index == len(items)
            items.append(event.item)
        elif kind == "response.output_item.done":
            items[event.output_index] = event.item
        elif hasattr(event, "item_id"):
            assert items[event.output_index].id == event.item_id
        if kind.endswith(".delta"):
            texts[event.item_id] = texts.get(event.item_id, "") + event.delta
        if kind.endswith(("_text.done", "arguments.done")):
            assert texts.get(event.item_id, "") == (event.arguments if "arguments" in kind else event.text)
    last = found[-1]
    assert last.type in ("response.completed", "response.incomplete", "response.failed")
    if last.type != "response.failed":
        assert [item.to_dict() for item in items] == [item.to_dict() for item in last.response.output]
    return found


@cache
def _event_types() -> dict[str, Any]:
    """The types of the events of a streamed response, by their names."""
    kinds = get_args(get_args(ResponseStreamEvent)[0])
    return {name: kind for kind in kinds for name in get_args(kind.model_fields["type"].annotation)}
