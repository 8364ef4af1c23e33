"""OpenAI's Responses API as a dialect. What it keeps between requests is in `services/gateway/responses/`."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from services.gateway.dialects.collected import CollectedChoice
from services.gateway.dialects.responses.answered import Answered, Call, content_logprobs
from services.gateway.dialects.responses.body import KNOWN, ResponsesRequest, decode_body
from services.gateway.dialects.responses.events import ResponseEvents
from services.gateway.dialects.responses.resource import Head, resource, unanswered
from services.gateway.dialects.responses.translate import echo, translate
from services.gateway.errors import openai_body
from services.gateway.inflight.request import OpenRequest
from services.gateway.inflight.stored import StoredRequest
from services.gateway.request.answer_format import AnswerFormat
from services.gateway.request.statement import Statement
from services.gateway.request.surrogates import replace_lone_surrogates
from services.gateway.request.warnings import warnings_of
from shared.errors import Failure, RequestError, invalid
from shared.model.generation import GenerationDefaults

NAME = "responses"


def forget(_answered: Answered) -> None:
    """Do nothing with an answer."""


class ResponsesDialect(msgspec.Struct, frozen=True):
    """POST /v1/responses. The last four fields are those of one request."""

    defaults: GenerationDefaults
    keep_s: float  # time for which a stored response is kept
    max_stored_bytes: int  # the longest body and input whose response is kept
    history: Sequence[dict[str, Any]] = ()  # items of the earlier turns
    resolved: bytes | None = None  # its input, JSON, if that had references to items
    after: int = -1  # number of the last event that the reader has
    ended: Callable[[Answered], None] = forget  # is told the answer once it is complete

    name: str = NAME
    path: str = "/v1/responses"
    schema: type[msgspec.Struct] = ResponsesRequest

    def read(self, body: bytes) -> Statement:
        """Understand a body."""
        body = replace_lone_surrogates(body)
        request = decode_body(body)
        if self.resolved is not None:
            request = msgspec.structs.replace(request, input=msgspec.json.decode(self.resolved))
        stored = request.store is not False
        if request.background and not stored:
            raise invalid("`background` needs `store`: its answer is read later.", "background")
        size = max(len(body), len(self.resolved or b""))
        if stored and size > self.max_stored_bytes:
            raise RequestError(_too_large(size, self.max_stored_bytes))
        said = translate(request, self.history)
        kept = msgspec.json.encode(echo(request, self.defaults))
        return Statement(
            said.chat,
            warnings_of(body, KNOWN),
            self.name,
            kept,
            rename=said.rename,
            keep_s=self.keep_s if stored else 0.0,
            outlives=bool(request.background),
        )

    def events(self, request: OpenRequest, fingerprint: str, event_ids: bool) -> ResponseEvents:
        """Return the writer of a stream. Its numbers are in the events themselves, whatever `event_ids` says."""
        return ResponseEvents(head_of(request), request.answer_format.logprobs, self.after, self.ended)

    def whole(self, request: OpenRequest, fingerprint: str, choices: Sequence[CollectedChoice]) -> bytes:
        """Return the body of an answer that is not streamed."""
        answered = collected(choices[0], request, int(time.time()))
        self.ended(answered)
        return msgspec.json.encode(resource(head_of(request), answered))

    def unfinished(self, request: StoredRequest, fingerprint: str) -> bytes:
        """Return the body that says that an answer is not complete yet."""
        return msgspec.json.encode(unanswered(head_of(request), status_of(request)))

    def failure(self, failure: Failure) -> bytes:
        """Return the body of a failure."""
        return openai_body(failure)


def count_body(tokens: int) -> bytes:
    """Return the body of the answer to POST /v1/responses/input_tokens."""
    return msgspec.json.encode({"object": "response.input_tokens", "input_tokens": tokens})


def _too_large(size: int, limit: int) -> Failure:
    text = (
        f"This request has {size} bytes; the server keeps {limit} of one response at most: send it with `store` false."
    )
    return Failure(413, text, param="store", code="request_too_large")


def status_of(request: StoredRequest) -> str:
    """Return the status of a response that has not ended."""
    return "in_progress" if request.records[0].begin is not None else "queued"


def head_of(request: OpenRequest | StoredRequest) -> Head:
    """Return what a response says before it has an answer."""
    return make_head(request.id, request.created, request.answer_format)


def make_head(request_id: str, created: float, answer_format: AnswerFormat) -> Head:
    """Return the same from a request's id, its time in unix seconds, and its format."""
    return Head(request_id, int(created), answer_format.model, msgspec.json.decode(answer_format.kept))


def collected(choice: CollectedChoice, request: OpenRequest, completed_at: int) -> Answered:
    """Return an answer that was put together.

    Raises:
        RequestError: 500, it ended without its usage.
    """
    [usage] = request.usages()
    content, later = choice.content_around_calls
    return Answered(
        reasoning=choice.reasoning,
        content=content,
        calls=tuple(Call(call.id or "", call.name or "", call.arguments) for call in choice.calls),
        later=later,
        logprobs=content_logprobs(tuple(choice.logprobs), usage, content),
        finish_reason=choice.finish_reason,
        usage=usage,
        completed_at=completed_at,
    )
