"""OpenAI's chat completions, the API that all others are translated to."""

from collections.abc import Sequence

import msgspec

from services.gateway.dialects.chat_events import (
    AnswerHead,
    ChunkWriter,
    choice_json,
    completion_body,
    last_events,
    status_body,
    total_usage,
)
from services.gateway.dialects.collected import CollectedChoice
from services.gateway.dialects.dialect import TextFormat
from services.gateway.dialects.event_ids import EventIds, NoEventIds
from services.gateway.dialects.prompt_logprobs import TokenTexts, prompt_logprobs_json
from services.gateway.errors import openai_body
from services.gateway.inflight.request import OpenRequest
from services.gateway.inflight.stored import StoredRequest
from services.gateway.request.schemas import ChatRequest, decode_body
from services.gateway.request.statement import Statement
from services.gateway.request.surrogates import replace_lone_surrogates
from services.gateway.request.validate import check_supported, check_whole
from services.gateway.request.warnings import warnings_of
from shared.errors import Failure
from shared.messages import Delta


class ChatDialect(msgspec.Struct, frozen=True):
    """POST /v1/chat/completions."""

    name: str = ""
    path: str = "/v1/chat/completions"
    schema: type[msgspec.Struct] = ChatRequest
    texts: TokenTexts | None = None  # to name the tokens of a prompt by; no request may ask for them without

    def read(self, body: bytes) -> Statement:
        """Understand a body."""
        body = replace_lone_surrogates(body)
        request = decode_body(body)
        check_supported(request)
        check_whole(request)
        return Statement(request, warnings_of(body), self.name)

    def events(self, request: OpenRequest, fingerprint: str, event_ids: bool) -> "ChatEvents":
        """Return the writer of a stream."""
        return ChatEvents(request, _head(request, fingerprint), event_ids)

    def whole(self, request: OpenRequest, fingerprint: str, choices: Sequence[CollectedChoice]) -> bytes:
        """Return the body of an answer that is not streamed."""
        form = request.answer_format
        listed = [choice_json(one, index, form.logprobs, form.token_ids) for index, one in enumerate(choices)]
        more = {}
        if form.prompt_logprobs and self.texts is not None:
            first = choices[0]
            more["prompt_logprobs"] = prompt_logprobs_json(first.prompt_ids, first.prompt_logprobs, self.texts)
        return completion_body(_head(request, fingerprint), listed, total_usage(request.usages()), **more)

    def unfinished(self, request: StoredRequest, fingerprint: str) -> bytes:
        """Return the body that says that an answer is not complete yet."""
        return status_body(_head(request, fingerprint))

    def failure(self, failure: Failure) -> bytes:
        """Return the body of a failure."""
        return openai_body(failure)


class ChatEvents:
    """Formatter of one stream of chunks."""

    __slots__ = ("_chunks", "_ids", "_include_usage")

    def __init__(self, request: OpenRequest, head: AnswerHead, event_ids: bool) -> None:
        form = request.answer_format
        self._include_usage = form.include_usage
        self._ids = EventIds(request.positions) if event_ids else NoEventIds()
        self._chunks = ChunkWriter(head, form.n, form.include_usage, form.token_ids, form.continuous_usage)

    @property
    def keep_alive(self) -> bytes:
        """A comment."""
        return self._ids.keep_alive

    def begin(self) -> bytes:
        """Return the first chunk of each choice."""
        return self._chunks.first_chunks(self._ids.line())

    def delta(self, index: int, delta: Delta, skip: int) -> bytes:
        """Return the chunks of a delta."""
        return self._chunks.delta(index, delta, self._ids, skip)

    def text_format(self, index: int) -> TextFormat:
        """Return the formatter of text: of the chunk alone, if it has neither an id nor usage."""
        if isinstance(self._ids, NoEventIds) and not self._chunks.has_usage:
            return self._chunks.text_chunk(index).format
        return lambda delta: self.delta(index, delta, 0)

    def end(self, request: OpenRequest) -> bytes:
        """Return the chunk of usage or the error, and the mark of the end."""
        return last_events(request, self._include_usage, lambda usages: self._chunks.usage(total_usage(usages)))


def _head(request: OpenRequest | StoredRequest, fingerprint: str) -> AnswerHead:
    return AnswerHead(f"chatcmpl-{request.id}", int(request.created), request.answer_format.model, fingerprint)
