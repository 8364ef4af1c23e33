"""Attributes of a chat request's span, named by OpenTelemetry's conventions for HTTP and for generative AI."""

from services.gateway.inflight.request import OpenRequest
from services.gateway.request.parsed import ParsedRequest
from shared.tracing import REQUEST_ID, Span

PATH = "/v1/chat/completions"
NAME = f"POST {PATH}"
INITIAL = {
    "http.request.method": "POST",
    "http.route": PATH,
    "url.path": PATH,
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "millrace",
}
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
    span.set({REQUEST_ID: open_request.id, "gen_ai.response.id": f"chatcmpl-{open_request.id}"})
    span.set({"gen_ai.response.model": open_request.answer_format.model})
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
