"""An answer of this API that has ended, and its output items.

The items are, in this order: the reasoning, a message, the calls, and a second message with what the model said behind
its first call. So they are a function of the answer, however its deltas were cut or merged on their way.
"""

from collections.abc import Mapping
from typing import Any, cast

import msgspec

from services.gateway.dialects.responses.tools import namespaces, split_name
from services.gateway.errors import CANCELLED
from shared.errors import Failure
from shared.messages import Delta, ShownLogprob, ToolDelta, Usage

LOWEST_LOGPROB = -9999.0  # JSON has no infinity


class Call(msgspec.Struct, frozen=True, array_like=True):
    """Function call of an answer."""

    id: str
    name: str
    arguments: str


class Answered(msgspec.Struct, frozen=True, omit_defaults=True):
    """End of a response. Kept in Redis: fields may be added at the end, with defaults."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[Call, ...] = ()
    later: str = ""  # content behind the first call
    logprobs: tuple[ShownLogprob, ...] = ()  # of the content's tokens
    finish_reason: str | None = None
    usage: Usage | None = None
    completed_at: int | None = None  # unix seconds
    failure: Failure | None = None
    cancelled: bool = False

    @property
    def status(self) -> str:
        """The status of the response."""
        if self.cancelled:
            return "cancelled"
        if self.failure is not None:
            return "failed"
        return "incomplete" if self.finish_reason == "length" else "completed"


def encode(answered: Answered) -> bytes:
    """Encode for Redis."""
    return msgspec.msgpack.encode(answered)


def decode(data: bytes) -> Answered:
    """Decode the bytes of `encode`.

    Raises:
        msgspec.MsgspecError: they are damaged.
    """
    return msgspec.msgpack.decode(data, type=Answered)


_said_fields = [(f.name, f.type, f.default) for f in msgspec.structs.fields(Answered) if f.name != "logprobs"]
_said = msgspec.msgpack.Decoder(msgspec.defstruct("_Said", _said_fields))


def decode_said(data: bytes) -> Answered:
    """Decode the same without log-probabilities, which are hundreds of times as large as the text.

    Raises:
        msgspec.MsgspecError: they are damaged.
    """
    return Answered(**msgspec.structs.asdict(_said.decode(data)))


def said_bytes(answered: Answered) -> int:
    """Return the bytes of JSON of what the model said."""
    return len(msgspec.json.encode((answered.reasoning, answered.content, answered.calls, answered.later)))


def failed(failure: Failure) -> Answered:
    """Return the end that a failure is."""
    return Answered(cancelled=True) if failure.code == CANCELLED.code else Answered(failure=failure)


def as_delta(answered: Answered) -> Delta:
    """Return a whole answer as one delta."""
    return Delta(
        "",
        1,
        reasoning=answered.reasoning,
        content=answered.content + answered.later,
        tool_calls=tuple(ToolDelta(i, call.id, call.name, call.arguments) for i, call in enumerate(answered.calls)),
        finish_reason=cast(Any, answered.finish_reason),
        usage=answered.usage,
        later=len(answered.later),
    )


class ItemForm(msgspec.Struct, frozen=True):
    """Facts of a request that the output items of its answer depend on."""

    spaces: frozenset[str] = frozenset()  # the namespaces of its tools
    summarized: bool = False  # it asked for a summary of the reasoning
    stored: bool = True  # it did not ask for `store` false


def item_form(echo: Mapping[str, Any]) -> ItemForm:
    """Return the form of the items of a response, from the fields that repeat its request."""
    return ItemForm(namespaces(echo["tools"]), bool(echo.get("reasoning", {}).get("summary")), echo["store"])


def output_items(request_id: str, answered: Answered, form: ItemForm) -> list[dict[str, Any]]:
    """Return the output items of an answer that was not cancelled and has not failed."""
    items: list[dict[str, Any]] = []
    if answered.reasoning:
        items.append(reasoning_item(request_id, answered.reasoning, form))
    if has_message(answered):
        items.append(message_item(message_id(request_id), answered.content, answered.logprobs))
    items += [call_item(request_id, index, call, form.spaces) for index, call in enumerate(answered.calls)]
    if answered.later:
        items.append(message_item(message_id(request_id, later=True), answered.later, ()))
    if items and answered.status == "incomplete":
        items[-1]["status"] = "incomplete"
    return items


def has_message(answered: Answered) -> bool:
    """Return True if the first message is there: an answer without calls has one, though it may be empty."""
    return bool(answered.content) or not (answered.calls or answered.status == "incomplete")


def reasoning_item(request_id: str, text: str | None, form: ItemForm, status: str = "completed") -> dict[str, Any]:
    """Return a reasoning item, whose text is in one of two places; without it if the item only begins."""
    item = {"id": f"rs_{request_id}", "type": "reasoning", "status": status, "summary": [], "content": []}
    if form.summarized and not form.stored:
        # Some clients send a summary back only beside this. Ours says nothing but which answer it came with.
        item["encrypted_content"] = f"enc_{request_id}"
    if text is None:
        return item
    return {**item, "summary" if form.summarized else "content": [reasoning_part(text, form.summarized)]}


def reasoning_part(text: str, summarized: bool) -> dict[str, Any]:
    return {"type": "summary_text" if summarized else "reasoning_text", "text": text}


def message_id(request_id: str, later: bool = False) -> str:
    """Return the id of a message."""
    return f"msg_{request_id}-1" if later else f"msg_{request_id}"


def message_item(
    item_id: str, text: str | None, logprobs: tuple[ShownLogprob, ...], status: str = "completed"
) -> dict[str, Any]:
    """Return a message; without a text if it only begins."""
    content = [] if text is None else [text_part(text, logprobs)]
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": content}


def text_part(text: str, logprobs: tuple[ShownLogprob, ...]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": [_logprob(one) for one in logprobs]}


def call_item(
    request_id: str, index: int, call: Call, spaces: frozenset[str], status: str = "completed"
) -> dict[str, Any]:
    """Return a function call."""
    namespace, name = split_name(call.name, spaces)
    item = {
        "id": f"fc_{request_id}-{index}",
        "type": "function_call",
        "status": status,
        "call_id": call.id,
        "name": name,
        "arguments": call.arguments,
    }
    return item if namespace is None else {**item, "namespace": namespace}


def content_logprobs(entries: tuple[ShownLogprob, ...], usage: Usage | None, content: str) -> tuple[ShownLogprob, ...]:
    """Return the log-probabilities of the tokens of the content, of those of all tokens shown."""
    first = 0 if usage is None else usage.reasoning_tokens
    size, length = 0, len(content.encode())
    chosen: list[ShownLogprob] = []
    for entry in entries[first:]:
        if size >= length:
            break
        # Line ends before the content separate it from the reasoning, and are not shown.
        data = entry.data if size else entry.data.lstrip(b"\n")
        if size or data:
            chosen.append(entry)
        size += len(data)
    return tuple(chosen)


def _logprob(entry: ShownLogprob) -> dict[str, Any]:
    top = [_token(token, data, value) for token, data, value in entry.top]
    return {**_token(entry.token, entry.data, entry.logprob), "top_logprobs": top}


def _token(token: str, data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token, "bytes": list(data), "logprob": max(logprob, LOWEST_LOGPROB)}
