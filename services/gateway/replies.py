"""Deltas as the bytes OpenAI clients read: chunks of a stream, or one answer.

A chunk is a prefix made once per request, the escaped text, and a fixed end; nothing else is formatted per token.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import msgspec

from services.gateway.exchange import Place
from shared.errors import Failure
from shared.messages import Delta, ShownLogprob, ToolDelta, Usage, unpack_ids

DONE = b"data: [DONE]\n\n"
# A comment without a blank line, which the openai client, once it has seen an id, takes for the end of an empty event.
KEEP_ALIVE = b": keep-alive\n"
LOWEST_LOGPROB = -9999.0  # JSON has no infinity

_json = msgspec.json.Encoder()
# Line ends for some clients' readers, which would cut the event in two.
_LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


def quote(text: str) -> bytes:
    """`text` as a JSON string on one line, whatever the reader takes for a line end."""
    quoted = _json.encode(text)
    if not text.isascii():
        for raw, escaped in _LINE_ENDS:
            quoted = quoted.replace(raw, escaped)
    return quoted


def error_event(failure: Failure) -> bytes:
    """A failure inside a stream. `code` is a number here: LiteLLM reads the status from it."""
    body = failure.openai_body()
    body["error"]["code"] = failure.status
    return b"data: " + _one_line(body) + b"\n\n"


def merge(deltas: Iterable[tuple[int, Delta]]) -> list[tuple[int, Delta]]:
    """Neighbouring pieces of plain text of the same choice as one, so that who is behind has less to write."""
    merged: list[tuple[int, Delta]] = []
    run: list[Delta] = []
    for index, delta in deltas:
        if run and not (index == merged[-1][0] and _joins(run[-1], delta)):
            merged[-1] = (merged[-1][0], _join(run))
            run = []
        if not run:
            merged.append((index, delta))
        run.append(delta)
    if run:
        merged[-1] = (merged[-1][0], _join(run))
    return merged


def _joins(first: Delta, second: Delta) -> bool:
    return _is_text(first) and _is_text(second) and bool(first.content) == bool(second.content)


def _is_text(delta: Delta) -> bool:
    """Only reasoning or only content, and nothing that belongs to a single token."""
    return bool(delta.reasoning) != bool(delta.content) and not (
        delta.tool_calls or delta.logprobs or delta.token_ids or delta.prompt or delta.finish_reason or delta.failure
    )


def _join(run: list[Delta]) -> Delta:
    if len(run) == 1:
        return run[0]
    return msgspec.structs.replace(
        run[-1], reasoning="".join(d.reasoning for d in run), content="".join(d.content for d in run)
    )


class Head(msgspec.Struct, frozen=True):
    """What every piece of one answer repeats."""

    id: str  # chatcmpl-...
    created: int
    model: str
    system_fingerprint: str


class Marks:
    """The ids of a stream's events: how much of each choice a reader has that has read so far.

    A number where that is a whole number of deltas. One delta may take several events; after some of them it is the
    number before the delta, the delta's, and how many of its events.
    """

    def __init__(self, places: Iterable[Place]) -> None:
        """`places`: where the stream starts."""
        self._ids = [b"%d" % place.seq for place in places]

    def line(self) -> bytes:
        """The field of an event."""
        return b"id: %b\n" % b".".join(self._ids)

    def through(self, index: int, delta: Delta, events: int) -> Iterator[bytes]:
        """The field of each event of a delta of choice `index`."""
        for event in range(1, events):
            self._ids[index] = b"%d-%d-%d" % (delta.start, delta.seq, event)
            yield self.line()
        self._ids[index] = b"%d" % delta.seq
        yield self.line()


class Chunks:
    """Writes the chunks of one stream.

    The chunk that names the role is written before anything has come. If the client asked for token ids it has the
    prompt's, which come with the first delta, and is then the first event of that delta.
    """

    def __init__(self, head: Head, n: int, include_usage: bool, token_ids: bool = False) -> None:
        fields = {"id": head.id, "object": "chat.completion.chunk", "created": head.created, "model": head.model}
        fields["system_fingerprint"] = head.system_fingerprint
        self._head = b"data: " + _one_line(fields)[:-1]
        self._starts = [self._head + b',"choices":[{"index":%d,"delta":{' % i for i in range(n)]
        self._end = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._plain = b'},"logprobs":null,"finish_reason":null}]' + self._end
        self._token_ids = token_ids

    def openings(self, mark: bytes) -> bytes:
        """The first chunks, one a choice; nothing where they wait for the prompt's ids."""
        if self._token_ids:
            return b""
        *others, last = map(self._opening, self._starts)
        return b"".join([*others, mark, last])

    def delta(self, index: int, delta: Delta, marks: Marks, shown: int = 0) -> bytes:
        """A delta's chunks but for the first `shown`: reasoning, content, tool calls one fragment each, finish."""
        start = self._starts[index]
        pieces = [*_texts(delta), *map(_fragment, _split_calls(delta.tool_calls))]
        chunks = [start + piece + self._plain for piece in pieces]
        if delta.logprobs or delta.token_ids:
            # They belong to all of the delta, and ride on its first chunk.
            chunks[:1] = [self._detailed(start, pieces[0] if pieces else b"", delta)]
        if self._token_ids and delta.start == 0:
            chunks.insert(0, self._opening(start, b',"prompt_token_ids":' + _json.encode(prompt_ids(delta))))
        if delta.finish_reason:
            chunks.append(
                start + b'},"logprobs":null,"finish_reason":"%s"}]' % delta.finish_reason.encode() + self._end
            )
        return b"".join(chain(*list(zip(marks.through(index, delta, len(chunks)), chunks, strict=False))[shown:]))

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The chunk without choices that ends the stream of a client who asked for it."""
        return self._head + b',"choices":[],"usage":' + _json.encode(usage) + b"}\n\n"

    def _opening(self, start: bytes, ids: bytes = b"") -> bytes:
        return start + b'"role":"assistant","content":""' + ids + self._plain

    def _detailed(self, start: bytes, piece: bytes, delta: Delta) -> bytes:
        if delta.token_ids:
            piece += b"," if piece else b""
            piece += b'"completion_token_ids":' + _json.encode(delta.token_ids)
        shown = _one_line(logprobs(delta.logprobs)) if delta.logprobs else b"null"
        return start + piece + b'},"logprobs":' + shown + b',"finish_reason":null}]' + self._end


def prompt_ids(delta: Delta) -> list[int] | None:
    """Return the prompt's token ids; None from an engine of a release that does not send them."""
    return unpack_ids(delta.prompt) if delta.prompt else None


def _texts(delta: Delta) -> list[bytes]:
    pieces = []
    if delta.reasoning:
        text = quote(delta.reasoning)
        pieces.append(b'"reasoning_content":' + text + b',"reasoning":' + text)
    if delta.content:
        pieces.append(b'"content":' + quote(delta.content))
    return pieces


def _split_calls(calls: Sequence[ToolDelta]) -> list[ToolDelta]:
    """Clients want the name first and with no arguments."""
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
    """OpenAI's `logprobs` of a choice."""
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
    """The usage of all choices together: the prompt was read once, each answer written."""
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


class Collected:
    """One choice of an answer that is not streamed, put together from its deltas."""

    def __init__(self) -> None:
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._logprobs: list[ShownLogprob] = []
        self._token_ids: list[int] = []
        self._prompt_ids: list[int] | None = None
        self._finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        self._reasoning.append(delta.reasoning)
        self._content.append(delta.content)
        self._logprobs += delta.logprobs
        self._token_ids += delta.token_ids
        self._prompt_ids = self._prompt_ids or prompt_ids(delta)
        self._finish_reason = delta.finish_reason or self._finish_reason
        for piece in delta.tool_calls:
            call = self._calls.setdefault(piece.index, {"id": piece.id, "name": piece.name, "arguments": []})
            call["arguments"].append(piece.arguments)

    def choice(self, index: int, with_logprobs: bool, with_ids: bool) -> dict[str, Any]:
        """An element of `choices`."""
        content, reasoning = "".join(self._content), "".join(self._reasoning)
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if self._calls else "")}
        if reasoning:
            message |= {"reasoning_content": reasoning, "reasoning": reasoning}
        if self._calls:
            message["tool_calls"] = [_call(self._calls[i]) for i in sorted(self._calls)]
        if with_ids:
            message |= {"prompt_token_ids": self._prompt_ids, "completion_token_ids": self._token_ids}
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs(self._logprobs) if with_logprobs else None,
            "finish_reason": self._finish_reason,
        }


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": "".join(call["arguments"])}
    return {"id": call["id"], "type": "function", "function": function}


def completion(head: Head, choices: list[dict[str, Any]], usage: dict[str, Any]) -> bytes:
    """The body of an answer that is not streamed."""
    fields = {"id": head.id, "object": "chat.completion", "created": head.created, "model": head.model}
    return _json.encode({**fields, "system_fingerprint": head.system_fingerprint, "choices": choices, "usage": usage})


def unfinished(head: Head) -> bytes:
    """The body that says that an answer is being written."""
    fields = {"id": head.id, "object": "chat.completion.status", "created": head.created, "model": head.model}
    return _json.encode({**fields, "status": "in_progress"})


def _one_line(value: Any) -> bytes:
    encoded = _json.encode(value)
    for raw, escaped in _LINE_ENDS:
        encoded = encoded.replace(raw, escaped)
    return encoded
