"""Answers of OpenAI's chat completions: deltas as the chunks of a stream, or as one JSON body.

A chunk is a prefix made once per request, the escaped text, and a fixed suffix; nothing else is formatted per token.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import msgspec

from services.gateway.dialects.collected import CollectedCall, CollectedChoice, prompt_ids
from services.gateway.dialects.event_ids import EventIds, NoEventIds
from services.gateway.dialects.merge import is_text
from services.gateway.inflight.request import OpenRequest
from shared.errors import Failure, RequestError
from shared.messages import Delta, ShownLogprob, ToolDelta, Usage

DONE = b"data: [DONE]\n\n"
LOWEST_LOGPROB = -9999.0  # JSON has no infinity

_ROLE = b'"role":"assistant","content":""'
_NO_DETAILS = b'},"logprobs":null,"finish_reason":null}]'

_json = msgspec.json.Encoder()
# Some clients take these characters for line ends and would cut the event in two.
_LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


def quote(text: str) -> bytes:
    """Return `text` as a JSON string without any character that a reader may take for a line end."""
    quoted = _json.encode(text)
    if not text.isascii():
        for raw, escaped in _LINE_ENDS:
            quoted = quoted.replace(raw, escaped)
    return quoted


def last_events(request: OpenRequest, include_usage: bool, usage: Callable[[Sequence[Usage]], bytes]) -> bytes:
    """Return the events behind the last delta: the failure, or the chunk that `usage` makes if it was asked for, and
    the mark of the end."""
    if request.failure is not None:
        return error_event(request.failure) + DONE
    if not include_usage:
        return DONE
    try:
        return usage(request.usages()) + DONE
    except RequestError as error:
        return error_event(error.failure) + DONE


def error_event(failure: Failure) -> bytes:
    """Return the event of a failure. Its `code` is a number: LiteLLM reads the status from it."""
    body = failure.openai_body()
    body["error"]["code"] = failure.status
    return b"data: " + one_line(body) + b"\n\n"


class AnswerHead(msgspec.Struct, frozen=True):
    """Fields that every chunk of an answer repeats."""

    id: str  # chatcmpl-...
    created: int
    model: str
    system_fingerprint: str


class TextChunk:
    """Chunk of reasoning or content alone: what stands around the text is always the same."""

    __slots__ = ("_content", "_reasoning")

    def __init__(self, start: bytes, end: bytes) -> None:
        self._content = (start + b'"content":', end)
        self._reasoning = (start + b'"reasoning_content":', b',"reasoning":', end)

    def format(self, delta: Delta) -> bytes:
        """Return the chunk of a delta."""
        return (
            quote(delta.content).join(self._content) if delta.content else quote(delta.reasoning).join(self._reasoning)
        )


class ChunkWriter:
    """Formatter of the chunks of one stream.

    A choice's first chunk has the role and is written before any delta has arrived. If the client asked for token ids
    or for usage in every chunk, it tells of the prompt, which arrives with the first delta, and is the first event of
    that delta.
    """

    __slots__ = (
        "_choice_prefixes",
        "_first_chunks_wait",
        "_prefix",
        "_suffix",
        "_text_chunks",
        "_token_ids",
        "has_usage",
    )

    def __init__(
        self,
        head: AnswerHead,
        n: int,
        include_usage: bool,
        token_ids: bool = False,
        continuous_usage: bool = False,
    ) -> None:
        """Prepare the fixed parts of the chunks of `n` choices."""
        fields = {"id": head.id, "object": "chat.completion.chunk", "created": head.created, "model": head.model}
        fields["system_fingerprint"] = head.system_fingerprint
        self._prefix = b"data: " + one_line(fields)[:-1]
        self._choice_prefixes = [self._prefix + b',"choices":[{"index":%d,"delta":{' % i for i in range(n)]
        self._suffix = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._token_ids = token_ids
        self.has_usage = continuous_usage
        self._first_chunks_wait = token_ids or continuous_usage
        self._text_chunks = [TextChunk(start, _NO_DETAILS + self._suffix) for start in self._choice_prefixes]

    def first_chunks(self, id_line: bytes) -> bytes:
        """Return the first chunk of each choice, the last one with an id; nothing if they wait for the first delta."""
        if self._first_chunks_wait:
            return b""
        *others, last = (start + _ROLE + _NO_DETAILS + self._suffix for start in self._choice_prefixes)
        return b"".join([*others, id_line, last])

    def delta(self, index: int, delta: Delta, ids: EventIds | NoEventIds, skip: int = 0) -> bytes:
        """Return a delta's chunks except the first `skip`: reasoning, content, a fragment of each tool call, finish."""
        start = self._choice_prefixes[index]
        if is_text(delta) and not (skip or self._first_chunks_wait):  # nearly all
            return ids.advance_one(index, delta) + self._text_chunks[index].format(delta)
        suffix = self._usage_suffix(delta.usage) if self.has_usage else self._suffix
        pieces = [*_texts(delta), *map(_fragment, _split_calls(delta.tool_calls))]
        chunks = [start + piece + _NO_DETAILS + suffix for piece in pieces]
        if delta.logprobs or delta.token_ids:
            # They belong to the whole delta, and are sent with its first chunk.
            chunks[:1] = [start + _detailed(pieces[0] if pieces else b"", delta) + suffix]
        if self._first_chunks_wait and delta.start == 0:
            chunks.insert(0, start + self._late_first_chunk(delta))
        if delta.finish_reason:
            chunks.append(start + b'},"logprobs":null,"finish_reason":"%s"}]' % delta.finish_reason.encode() + suffix)
        lines = ids.advance(index, delta, len(chunks))
        return b"".join(chain(*list(zip(lines, chunks, strict=False))[skip:]))

    def text_chunk(self, index: int) -> TextChunk:
        """Return the chunk of a text of a choice."""
        return self._text_chunks[index]

    def usage(self, usage: dict[str, Any]) -> bytes:
        """Return the chunk without choices that ends the stream if the client asked for usage."""
        return self._prefix + b',"choices":[],"usage":' + _json.encode(usage) + b"}\n\n"

    def _late_first_chunk(self, delta: Delta) -> bytes:
        """Return the rest of a first chunk that waited for its choice's first delta."""
        ids = b',"prompt_token_ids":' + _json.encode(prompt_ids(delta)) if self._token_ids else b""
        suffix = self._suffix
        if self.has_usage and delta.usage is not None:
            suffix = self._usage_suffix(msgspec.structs.replace(delta.usage, completion_tokens=0, reasoning_tokens=0))
        return _ROLE + ids + _NO_DETAILS + suffix

    def _usage_suffix(self, usage: Usage | None) -> bytes:
        """Return the end of a chunk with the usage of its choice; null from a postproc of a release without it."""
        return b',"usage":' + _json.encode(None if usage is None else total_usage([usage])) + b"}\n\n"


def _detailed(piece: bytes, delta: Delta) -> bytes:
    if delta.token_ids:
        piece += b"," if piece else b""
        piece += b'"completion_token_ids":' + _json.encode(delta.token_ids)
    shown = one_line(logprobs(delta.logprobs)) if delta.logprobs else b"null"
    return piece + b'},"logprobs":' + shown + b',"finish_reason":null}]'


def _texts(delta: Delta) -> list[bytes]:
    pieces = []
    if delta.reasoning:
        pieces.append(_reasoning(delta.reasoning))
    if delta.content:
        pieces.append(b'"content":' + quote(delta.content))
    return pieces


def _reasoning(text: str) -> bytes:
    quoted = quote(text)
    return b'"reasoning_content":' + quoted + b',"reasoning":' + quoted


def _split_calls(calls: Sequence[ToolDelta]) -> list[ToolDelta]:
    """Split calls in two: clients expect the name first, without arguments."""
    split: list[ToolDelta] = []
    for call in calls:
        if call.name is not None:
            split.append(msgspec.structs.replace(call, arguments=""))
            if call.arguments:
                split.append(ToolDelta(call.index, None, None, call.arguments))
        else:
            split.append(call)
    return split


def _fragment(call: ToolDelta) -> bytes:
    arguments = quote(call.arguments)
    if call.name is None:
        return b'"tool_calls":[{"index":%d,"function":{"arguments":%s}}]' % (call.index, arguments)
    return b'"tool_calls":[{"index":%d,"id":%s,"type":"function","function":{"name":%s,"arguments":%s}}]' % (
        call.index,
        quote(call.id or ""),
        quote(call.name),
        arguments,
    )


def logprobs(shown: Iterable[ShownLogprob]) -> dict[str, Any]:
    """Return OpenAI's `logprobs` of a choice."""
    return {
        "content": [
            {**_logprob(one.token, one.data, one.logprob), "top_logprobs": [_logprob(*other) for other in one.top]}
            for one in shown
        ],
        "refusal": None,
    }


def _logprob(token: str, data: bytes, value: float) -> dict[str, Any]:
    return {"token": token, "logprob": max(value, LOWEST_LOGPROB), "bytes": list(data)}


def total_usage(usages: Sequence[Usage]) -> dict[str, Any]:
    """Add up the usage of all choices; the prompt counts once."""
    first = usages[0]
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": first.prompt_tokens + completion,
        "prompt_tokens_details": {
            "cached_tokens": first.cached_tokens,
            "image_tokens": first.image_tokens,
            "video_tokens": first.video_tokens,
        },
        "completion_tokens_details": {
            "reasoning_tokens": sum(usage.reasoning_tokens for usage in usages),
            "image_tokens": 0,
        },
    }


def choice_json(collected: CollectedChoice, index: int, with_logprobs: bool, with_ids: bool) -> dict[str, Any]:
    """Return the element of `choices`."""
    content, reasoning, calls = collected.content, collected.reasoning, collected.calls
    message: dict[str, Any] = {"role": "assistant", "refusal": None, "content": content or (None if calls else "")}
    if reasoning:
        message |= {"reasoning_content": reasoning, "reasoning": reasoning}
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
    if with_ids:
        message |= {"prompt_token_ids": collected.prompt_ids, "completion_token_ids": collected.token_ids}
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs(collected.logprobs) if with_logprobs else None,
        "finish_reason": collected.finish_reason,
    }


def _call(call: CollectedCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def completion_body(
    head: AnswerHead, choices: list[dict[str, Any]], usage: dict[str, Any], **more: list[dict[str, Any] | None] | None
) -> bytes:
    """Return the body of an answer that is not streamed. `more`: fields that not every request asks for."""
    fields = {"id": head.id, "object": "chat.completion", "created": head.created, "model": head.model}
    fields |= {"system_fingerprint": head.system_fingerprint}
    return _json.encode({**fields, "choices": choices, "usage": usage, **more})


def status_body(head: AnswerHead) -> bytes:
    """Return the body that says that an answer is not complete yet."""
    fields = {"id": head.id, "object": "chat.completion.status", "created": head.created, "model": head.model}
    return _json.encode({**fields, "status": "in_progress"})


def one_line(value: Any) -> bytes:
    """Return a value as JSON without any character that a reader may take for a line end."""
    encoded = _json.encode(value)
    for raw, escaped in _LINE_ENDS:
        encoded = encoded.replace(raw, escaped)
    return encoded
