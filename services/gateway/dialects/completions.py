"""OpenAI's completions: the model goes on with texts as they are, without a template."""

from collections.abc import Sequence

import msgspec

from services.gateway.dialects.chat_events import AnswerHead, last_events
from services.gateway.dialects.collected import CollectedChoice
from services.gateway.dialects.completion_events import (
    CompletionChunks,
    CompletionForm,
    choice_json,
    completion_body,
    completion_usage,
    status_body,
)
from services.gateway.dialects.dialect import TextFormat
from services.gateway.dialects.event_ids import EventIds, NoEventIds
from services.gateway.dialects.prompt_logprobs import TokenTexts
from services.gateway.errors import openai_body
from services.gateway.inflight.request import OpenRequest
from services.gateway.inflight.stored import StoredRequest
from services.gateway.request.completion import KNOWN, CompletionRequest, decode_completion
from services.gateway.request.statement import Statement
from services.gateway.request.surrogates import replace_lone_surrogates
from services.gateway.request.warnings import warnings_of
from shared.errors import Failure, RequestError, unreadable
from shared.messages import Delta, Usage

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(CompletionForm)


class CompletionsDialect(msgspec.Struct, frozen=True):
    """POST /v1/completions."""

    texts: TokenTexts
    name: str = "completions"
    path: str = "/v1/completions"
    schema: type[msgspec.Struct] = CompletionRequest

    def read(self, body: bytes) -> Statement:
        """Understand a body."""
        body = replace_lone_surrogates(body)
        request = decode_completion(body)
        prompts = request.prompts()
        form = CompletionForm(
            prompts=len(prompts),
            echo=bool(request.echo),
            logprobs=request.logprobs,
            prompt_logprobs=request.prompt_logprobs,
            token_ids=bool(request.return_token_ids),
            scores_only=request.scores_only,
        )
        kept = _encoder.encode(form)
        return Statement(request.as_chat(), warnings_of(body, KNOWN), self.name, kept=kept, prompts=prompts)

    def events(self, request: OpenRequest, fingerprint: str, event_ids: bool) -> "CompletionEvents":
        """Return the writer of a stream."""
        return CompletionEvents(request, _head(request, fingerprint), _form(request), self.texts, event_ids)

    def whole(self, request: OpenRequest, fingerprint: str, choices: Sequence[CollectedChoice]) -> bytes:
        """Return the body of an answer that is not streamed."""
        form = _form(request)
        listed = [choice_json(one, index, form, self.texts) for index, one in enumerate(choices)]
        return completion_body(_head(request, fingerprint), listed, completion_usage(request.usages(), form))

    def unfinished(self, request: StoredRequest, fingerprint: str) -> bytes:
        """Return the body that says that an answer is not complete yet."""
        return status_body(_head(request, fingerprint))

    def failure(self, failure: Failure) -> bytes:
        """Return the body of a failure."""
        return openai_body(failure)


class CompletionEvents:
    """Formatter of one stream of chunks."""

    def __init__(
        self, request: OpenRequest, head: AnswerHead, form: CompletionForm, texts: TokenTexts, event_ids: bool
    ) -> None:
        kept = request.answer_format
        self._form = form
        self._include_usage = kept.include_usage
        self._ids = EventIds(request.positions) if event_ids else NoEventIds()
        self._chunks = CompletionChunks(head, kept.n, form, texts, kept.include_usage, kept.continuous_usage)

    @property
    def keep_alive(self) -> bytes:
        """A comment."""
        return self._ids.keep_alive

    def begin(self) -> bytes:
        """Return nothing: no chunk comes before the first text."""
        return b""

    def delta(self, index: int, delta: Delta, skip: int) -> bytes:
        """Return the chunks of a delta."""
        return self._chunks.delta(index, delta, self._ids, skip)

    def text_format(self, index: int) -> TextFormat:
        """Return the formatter of any delta."""
        return lambda delta: self.delta(index, delta, 0)

    def end(self, request: OpenRequest) -> bytes:
        """Return the chunk of usage or the error, and the mark of the end."""

        def usage(usages: Sequence[Usage]) -> bytes:
            return self._chunks.usage(completion_usage(usages, self._form))

        return last_events(request, self._include_usage, usage)


def _head(request: OpenRequest | StoredRequest, fingerprint: str) -> AnswerHead:
    return AnswerHead(f"cmpl-{request.id}", int(request.created), request.answer_format.model, fingerprint)


def _form(request: OpenRequest) -> CompletionForm:
    """
    Raises:
        RequestError: 500, it cannot be read.
    """
    try:
        return _decoder.decode(request.answer_format.kept)
    except msgspec.MsgspecError as error:
        raise RequestError(unreadable("the format of the answer")) from error
