"""Answers of the Messages API: deltas as typed events of a stream, or as one message.

A stream is a sequence of blocks, one open at a time: thinking, text, and a block for each tool call.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from services.gateway.dialects.chat_events import one_line, quote
from services.gateway.dialects.collected import CollectedCall, CollectedChoice
from services.gateway.dialects.merge import is_text
from services.gateway.dialects.messages.request import Kept
from shared.errors import Failure
from shared.messages import Delta, ToolDelta, Usage

# The name of a failure's kind, by its status. The other 4xx are "invalid_request_error", the other 5xx "api_error".
_ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_NO_USAGE = Usage(0, 0, 0, 0, 0, 0)

PING = b'event: ping\ndata: {"type":"ping"}\n\n'
_BLOCK_DELTA = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":%b}}\n\n'
)
MESSAGE_STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'

_json = msgspec.json.Encoder()


class MessageHead(msgspec.Struct, frozen=True):
    """Fields of a message that are known before its content."""

    id: str  # msg_...
    model: str


# ----------------------------------------------------------------------------------------------------------- one body


def message_body(head: MessageHead, answer: CollectedChoice, usage: Usage, kept: Kept) -> bytes:
    """Return the body of an answer that is not streamed."""
    ending = stop_fields(answer.finish_reason, answer.stop, bool(answer.calls), usage, kept)
    return _json.encode({**_message(head, usage), "content": _content(head, answer), **ending})


def _content(head: MessageHead, answer: CollectedChoice) -> list[dict[str, Any]]:
    """Return the blocks as a stream would have them, with text where it came: most often before all calls."""
    blocks: list[dict[str, Any]] = []
    if answer.reasoning:
        blocks.append({"type": "thinking", "thinking": answer.reasoning, "signature": signature(head)})
    calls = [_tool_use(call) for call in answer.calls]
    for before in range(len(calls) + 1):
        if text := answer.content_after(before):
            blocks.append({"type": "text", "text": text})
        blocks += calls[before : before + 1]
    return blocks


def _tool_use(call: CollectedCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": _arguments(call.arguments)}


def _arguments(text: str) -> msgspec.Raw:
    """Return the JSON object that a call's arguments are, an empty one in place of anything else."""
    try:
        msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except msgspec.MsgspecError:
        text = "{}"
    return msgspec.Raw(text.encode())


def _message(head: MessageHead, usage: Usage) -> dict[str, Any]:
    fields = {"id": head.id, "type": "message", "role": "assistant", "model": head.model, "content": []}
    return {
        **fields,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {**usage_fields(usage), "service_tier": "standard"},
    }


def usage_fields(usage: Usage) -> dict[str, Any]:
    """Return the counts of tokens. What the prefix cache had is no part of `input_tokens`."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def stop_fields(finish_reason: str | None, stop: str, called: bool, usage: Usage, kept: Kept) -> dict[str, str | None]:
    """Return why an answer ended. `stop` is the stop sequence that was found, `called` that a tool was called."""
    if stop:
        reason = "stop_sequence"
    elif finish_reason == "length":
        cut_short = usage.completion_tokens < kept.max_tokens  # by the context, not by the request
        reason = "model_context_window_exceeded" if cut_short else "max_tokens"
    else:
        reason = "tool_use" if called else "end_turn"
    return {"stop_reason": reason, "stop_sequence": stop or None}


def signature(head: MessageHead) -> str:
    """Return the signature of an answer's thinking. Clients send it back with the thinking, and nobody reads it."""
    return head.id.replace("msg_", "sig_")


# ------------------------------------------------------------------------------------------------------------ a stream


class BlockWriter:
    """Formatter of the events of one stream."""

    def __init__(self, head: MessageHead, kept: Kept) -> None:
        self._head = head
        self._kept = kept
        self._started = False
        self._index = -1  # of the newest block
        self._open: str | None = None  # type of the block that is open
        self._call: int | None = None  # index of the newest call
        self._finish_reason: str | None = None
        self._stop = ""

    def delta(self, delta: Delta) -> bytes:
        """Return the events of a delta; before those of the first one, the event that tells of the prompt."""
        if self._open == "text" and delta.content and is_text(delta):  # nearly all
            return self._piece(b"text_delta", b"text", delta.content)
        events = b"".join([*self._start(delta), *self._blocks(delta)])
        self._finish_reason, self._stop = delta.finish_reason or self._finish_reason, delta.stop or self._stop
        return events

    def end(self, usage: Usage) -> bytes:
        """Return the events behind the last block."""
        ending = stop_fields(self._finish_reason, self._stop, self._call is not None, usage, self._kept)
        fields = {"type": "message_delta", "delta": ending, "usage": usage_fields(usage)}
        return b"".join(self._close()) + _event("message_delta", fields) + MESSAGE_STOP

    def _start(self, delta: Delta) -> Iterator[bytes]:
        if not self._started:
            self._started = True
            usage = msgspec.structs.replace(delta.usage or _NO_USAGE, completion_tokens=0, reasoning_tokens=0)
            yield _event("message_start", {"type": "message_start", "message": _message(self._head, usage)})

    def _blocks(self, delta: Delta) -> Iterator[bytes]:
        if delta.reasoning:
            if self._open != "thinking":
                yield from self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            yield self._piece(b"thinking_delta", b"thinking", delta.reasoning)
        # What goes on with an open call was written before the text of the same delta.
        goes_on = [piece for piece in delta.tool_calls if piece.index == self._call]
        for piece in goes_on:
            yield from self._call_piece(piece)
        if delta.content:
            if self._open != "text":
                yield from self._begin("text", {"type": "text", "text": ""})
            yield self._piece(b"text_delta", b"text", delta.content)
        for piece in delta.tool_calls[len(goes_on) :]:
            yield from self._call_piece(piece)

    def _call_piece(self, piece: ToolDelta) -> Iterator[bytes]:
        if piece.index != self._call:
            self._call = piece.index
            block: dict[str, Any] = {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}}
            yield from self._begin("tool_use", block)
        if piece.arguments:
            yield self._piece(b"input_json_delta", b"partial_json", piece.arguments)

    def _begin(self, kind: str, block: dict[str, Any]) -> Iterator[bytes]:
        yield from self._close()
        self._open = kind
        self._index += 1
        fields = {"type": "content_block_start", "index": self._index, "content_block": block}
        yield _event("content_block_start", fields)

    def _close(self) -> Iterator[bytes]:
        if self._open == "thinking":
            yield self._piece(b"signature_delta", b"signature", signature(self._head))
        if self._open is not None:
            yield _event("content_block_stop", {"type": "content_block_stop", "index": self._index})
        self._open = None

    def _piece(self, kind: bytes, field: bytes, text: str) -> bytes:
        return _BLOCK_DELTA % (self._index, kind, field, quote(text))


def _event(name: str, fields: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), one_line(fields))


# ------------------------------------------------------------------------------------------------------------ failures


def error_body(failure: Failure) -> bytes:
    """Return the body of a failure. It has no place for the field, so the message names it."""
    default = "invalid_request_error" if failure.status < 500 else "api_error"
    text = failure.message
    if failure.param is not None and failure.param not in text:
        text = f"{failure.param}: {text}"
    return one_line({"type": "error", "error": {"type": _ERRORS.get(failure.status, default), "message": text}})


def error_event(failure: Failure) -> bytes:
    """Return the event of a failure."""
    return b"event: error\ndata: %b\n\n" % error_body(failure)
