"""What the span of a chat request says, by the names of OpenTelemetry's conventions for HTTP and for generative AI."""

from services.gateway.exchange import Exchange
from services.gateway.order import Order
from shared.tracing import REQUEST_ID, Span

PATH = "/v1/chat/completions"
NAME = f"POST {PATH}"
ARRIVED = {
    "http.request.method": "POST",
    "http.route": PATH,
    "url.path": PATH,
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "millrace",
}
FIRST_TOKEN = "first_token"  # an event, and so is
CLIENT_LEFT = "client_left"


def asked(span: Span, order: Order) -> None:
    """The request is understood."""
    sampling = order.sampling
    span.set(
        {
            "gen_ai.request.model": order.model,
            "gen_ai.request.stream": order.stream,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.seed": sampling.seed,
        }
    )
    if sampling.max_tokens is not None:
        span.set({"gen_ai.request.max_tokens": sampling.max_tokens})
    if order.n != 1:
        span.set({"gen_ai.request.choice.count": order.n})


def answered(span: Span, exchange: Exchange, now: float) -> None:
    """It has ended, however. `now` in unix seconds."""
    span.set({REQUEST_ID: exchange.id, "gen_ai.response.id": f"chatcmpl-{exchange.id}"})
    span.set({"gen_ai.response.model": exchange.form.model})
    if exchange.first_token is not None:
        span.event(FIRST_TOKEN, exchange.first_token)
        span.set({"gen_ai.response.time_to_first_chunk": exchange.first_token - exchange.created})
    reasons = [choice.finish_reason for choice in exchange.choices if choice.finish_reason is not None]
    if reasons:
        span.set({"gen_ai.response.finish_reasons": reasons})
    usages = [choice.usage for choice in exchange.choices if choice.usage is not None]
    if usages:
        span.set(
            {
                "gen_ai.usage.input_tokens": usages[0].prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": usages[0].cached_tokens,
                "gen_ai.usage.output_tokens": sum(usage.completion_tokens for usage in usages),
                "gen_ai.usage.reasoning.output_tokens": sum(usage.reasoning_tokens for usage in usages),
            }
        )
    failure = exchange.failure
    if failure is None:
        if not exchange.done:
            span.event(CLIENT_LEFT, now)
    elif failure.status >= 500 and len(reasons) < len(exchange.choices):  # a failure may come after the end
        span.fail(failure.kind)


def end(span: Span, status: str | None) -> None:
    """The connection's part is over; `status` is the answer's, None where none was begun."""
    if status is not None:
        span.set({"http.response.status_code": int(status)})
        if int(status) >= 500:
            span.fail(status)
    span.end()
