"""Attributes of the span of a request for an answer, by OpenTelemetry's conventions for HTTP and generative AI; and of
those that lead from an upload to the answers of a batch's lines.
"""

import msgspec

from services.gateway.inflight.request import OpenRequest
from services.gateway.request.parsed import ParsedRequest
from shared.tracing import REQUEST_ID, Span


class Traced(msgspec.Struct, frozen=True):
    """API whose requests have spans."""

    path: str
    operation: str = ""  # gen_ai.operation.name; empty: it asks for no answer
    dialect: str = ""  # its name
    prefix: str = ""  # of the ids of its answers

    @property
    def name(self) -> str:
        """Name of the spans."""
        return f"POST {self.path}"

    def initial(self) -> dict[str, str]:
        """Return the attributes that a span begins with."""
        http = {"http.request.method": "POST", "http.route": self.path, "url.path": self.path}
        if not self.operation:
            return http
        return {**http, "gen_ai.operation.name": self.operation, "gen_ai.provider.name": "millrace"}


_ALL = (
    Traced("/v1/chat/completions", "chat", "", "chatcmpl-"),
    Traced("/v1/completions", "text_completion", "completions", "cmpl-"),
    Traced("/v1/messages", "chat", "messages", "msg_"),
    Traced("/v1/responses", "chat", "responses", "resp_"),
)
_OF_BATCHES = (Traced("/v1/files"), Traced("/v1/batches"))
TRACED = {each.path: each for each in (*_ALL, *_OF_BATCHES)}
_PREFIXES = {each.dialect: each.prefix for each in _ALL}
FIRST_TOKEN, CLIENT_LEFT = "first_token", "client_left"  # events


def set_request(span: Span, parsed: ParsedRequest) -> None:
    """Set the attributes of a parsed request."""
    sampling = parsed.sampling
    span.set(
        {
            "gen_ai.request.model": parsed.model,
            "gen_ai.request.stream": parsed.stream,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.seed": sampling.seed,
        }
    )
    if sampling.max_tokens is not None:
        span.set({"gen_ai.request.max_tokens": sampling.max_tokens})
    if parsed.n != 1:
        span.set({"gen_ai.request.choice.count": parsed.n})


def set_answer(span: Span, open_request: OpenRequest, now: float) -> None:
    """Set the attributes of an answer that has ended, in whatever way. `now` in unix seconds."""
    form = open_request.answer_format
    response_id = _PREFIXES.get(form.dialect, "") + open_request.id
    span.set({REQUEST_ID: open_request.id, "gen_ai.response.id": response_id, "gen_ai.response.model": form.model})
    if open_request.first_token_at is not None:
        span.event(FIRST_TOKEN, open_request.first_token_at)
        span.set({"gen_ai.response.time_to_first_chunk": open_request.first_token_at - open_request.created})
    reasons = [choice.finish_reason for choice in open_request.choices if choice.finish_reason is not None]
    if reasons:
        span.set({"gen_ai.response.finish_reasons": reasons})
    usages = [choice.usage for choice in open_request.choices if choice.usage is not None]
    if usages:
        span.set(
            {
                "gen_ai.usage.input_tokens": usages[0].prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": usages[0].cached_tokens,
                "gen_ai.usage.output_tokens": sum(usage.completion_tokens for usage in usages),
                "gen_ai.usage.reasoning.output_tokens": sum(usage.reasoning_tokens for usage in usages),
            }
        )
    failure = open_request.failure
    if failure is None:
        if not open_request.done:
            span.event(CLIENT_LEFT, now)
    elif failure.status >= 500 and len(reasons) < len(open_request.choices):  # a failure may come after the end
        span.fail(failure.kind)


def end(span: Span, status: str | None) -> None:
    """End the span; `status` is the response's, None if none was begun."""
    if status is not None:
        span.set({"http.response.status_code": int(status)})
        if int(status) >= 500:
            span.fail(status)
    span.end()
