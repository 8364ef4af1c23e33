"""The Messages API as a dialect."""

from collections.abc import Sequence

import msgspec

from services.gateway.dialects.collected import CollectedChoice
from services.gateway.dialects.dialect import TextFormat
from services.gateway.dialects.messages.events import (
    PING,
    BlockWriter,
    MessageHead,
    error_body,
    error_event,
    message_body,
)
from services.gateway.dialects.messages.request import read_kept, translate
from services.gateway.dialects.messages.schemas import (
    COUNT_FIELDS,
    MESSAGE_FIELDS,
    MessagesRequest,
    count_decoder,
    message_decoder,
)
from services.gateway.inflight.request import OpenRequest
from services.gateway.inflight.stored import StoredRequest
from services.gateway.request.schemas import decode_json
from services.gateway.request.statement import Statement
from services.gateway.request.surrogates import replace_lone_surrogates
from services.gateway.request.warnings import warnings_of
from shared.errors import Failure, RequestError
from shared.messages import Delta

NAME = "messages"


class MessagesDialect(msgspec.Struct, frozen=True):
    """POST /v1/messages."""

    name: str = NAME
    path: str = "/v1/messages"
    schema: type[msgspec.Struct] = MessagesRequest

    def read(self, body: bytes) -> Statement:
        """Understand a body."""
        body = replace_lone_surrogates(body)
        return translate(decode_json(message_decoder, body), self.name, warnings_of(body, MESSAGE_FIELDS))

    def events(self, request: OpenRequest, fingerprint: str, event_ids: bool) -> "MessageEvents":
        """Return the writer of a stream. Its events never have ids: the API has no route to resume it by."""
        return MessageEvents(BlockWriter(_head(request), read_kept(request.answer_format.kept)))

    def whole(self, request: OpenRequest, fingerprint: str, choices: Sequence[CollectedChoice]) -> bytes:
        """Return the body of an answer that is not streamed."""
        [usage], [answer] = request.usages(), choices
        return message_body(_head(request), answer, usage, read_kept(request.answer_format.kept))

    def unfinished(self, request: StoredRequest, fingerprint: str) -> bytes:
        """Return the body that says that an answer is not complete yet. No route leads to it."""
        return msgspec.json.encode({"id": _head(request).id, "type": "message", "stop_reason": None})

    def failure(self, failure: Failure) -> bytes:
        """Return the body of a failure."""
        return error_body(failure)


class MessageEvents:
    """Formatter of one stream of typed events."""

    keep_alive = PING

    def __init__(self, blocks: BlockWriter) -> None:
        self._blocks = blocks

    def begin(self) -> bytes:
        """Return nothing: the first event has the usage of the prompt, and waits for it."""
        return b""

    def delta(self, _index: int, delta: Delta, _skip: int) -> bytes:
        """Return the events of a delta."""
        return self._blocks.delta(delta)

    def text_format(self, _index: int) -> TextFormat:
        """Return the formatter of any delta: text belongs to blocks, each of which has a number."""
        return self._blocks.delta

    def end(self, request: OpenRequest) -> bytes:
        """Return the events behind the content: how it ended and the usage, or the failure."""
        if request.failure is not None:
            return error_event(request.failure)
        try:
            [usage] = request.usages()
        except RequestError as error:
            return error_event(error.failure)
        return self._blocks.end(usage)


def count_body(tokens: int) -> bytes:
    """Return the body of the answer to POST /v1/messages/count_tokens."""
    return msgspec.json.encode({"input_tokens": tokens})


def read_count(body: bytes) -> Statement:
    """Understand a body of POST /v1/messages/count_tokens.

    Raises:
        RequestError: 400 naming the field.
    """
    body = replace_lone_surrogates(body)
    return translate(decode_json(count_decoder, body), NAME, warnings_of(body, COUNT_FIELDS))


def _head(request: OpenRequest | StoredRequest) -> MessageHead:
    return MessageHead(f"msg_{request.id}", request.answer_format.model)
