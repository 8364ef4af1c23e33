"""HTTP responses of errors: OpenAI's body, and the headers by which clients decide whether to retry."""

from collections.abc import Callable, Iterable, Mapping

import msgspec
from starlette.responses import Response

from shared.errors import Failure, RequestError

RETRY_AFTER_S = 1  # for conditions that pass soon: too many requests, draining, a restarting dependency

TIMED_OUT = Failure(504, "The request took too long and was cancelled.", type="timeout_error", code="timeout")
SHUTTING_DOWN = Failure(503, "The server is shutting down.", type="server_error", code="shutting_down")
QUEUE_DOWN = Failure(503, "The request queue cannot be reached.", type="api_connection_error", code="connection_error")
NO_FILES = Failure(503, "The server has too many files open.", type="server_error", code="overloaded")
LOST = Failure(
    503,
    "The server lost this request and cannot go on with it; send it again.",
    type="server_error",
    code="request_lost",
)
UNKNOWN_API = Failure(
    503,
    "A newer gateway took this request; this one does not know the API of its answer. Ask again: another may.",
    type="server_error",
    code="unknown_api",
)
REUSED_KEY = Failure(
    409, "This Idempotency-Key was used for another request.", param="Idempotency-Key", code="idempotency_key_reused"
)
USAGE_AT_END = Failure(
    409,
    "The first request with this Idempotency-Key did not ask for usage in every chunk, so only the end has it.",
    param="stream_options.continuous_usage_stats",
    code="idempotency_key_reused",
)
CANCELLED = Failure(409, "The response was cancelled.", code="response_cancelled")
UNEXPECTED = Failure(500, "The server failed to handle the request.", type="server_error", code="internal_error")
UNAUTHORIZED = Failure(
    401, "A valid API key is needed: Authorization: Bearer KEY, or X-API-Key: KEY.", code="invalid_api_key"
)


FailureBody = Callable[[Failure], bytes]


def openai_body(failure: Failure) -> bytes:
    """Return the body of a failure, as OpenAI's clients read it."""
    return msgspec.json.encode(failure.openai_body())


class FailureBodies(msgspec.Struct, frozen=True):
    """Forms of failures by path: on the path of an API, and below it, that API's; elsewhere OpenAI's."""

    by_path: Mapping[str, FailureBody] = {}

    def of(self, path: str) -> FailureBody:
        """Return the form of the failures of requests for `path`, whether or not there is such a route."""
        found = (body for own, body in self.by_path.items() if path == own or path.startswith(f"{own}/"))
        return next(found, openai_body)


def error_response(
    failure: Failure, headers: Mapping[str, str] | None = None, body: FailureBody = openai_body
) -> Response:
    """Return the response of `failure`; `body` is how the API of the request writes it."""
    own = {"retry-after": str(RETRY_AFTER_S)} if failure.status in (429, 503) else {}
    if failure.status == 409:
        own["x-should-retry"] = "false"  # OpenAI's client retries every 409 otherwise
    return Response(
        body(failure),
        failure.status,
        {**own, **(headers or {})},
        media_type="application/json",
    )


def unknown_request(name: str) -> RequestError:
    """Return a 404: no such request runs or is kept, or it belongs to another API key."""
    return RequestError(Failure(404, f"No request {name[:64]!r} is running or kept.", code="request_not_found"))


def too_many(text: str) -> RequestError:
    """Return a 429: the request would be accepted a little later."""
    return RequestError(Failure(429, text, type="rate_limit_error", code="rate_limit_exceeded"))


class TooLateError(RequestError):
    """Refusal of a request that the engines would begin `wait_s` from now, after its deadline."""

    def __init__(self, wait_s: float, rest_s: float) -> None:
        text = (
            f"The request would wait for {wait_s:.0f} s before it begins, as fast as requests end now, and its "
            f"deadline is in {rest_s:.0f} s."
        )
        super().__init__(Failure(503, text, type="server_error", code="deadline_unreachable"))
        self.wait_s = wait_s


def older_build(names: Iterable[str]) -> RequestError:
    """Return a 503: replicas that would serve the request without these fields are still being replaced."""
    text = (
        "The server is being upgraded: some of its processes do not know all that this request asks for yet "
        f"({', '.join(names)}). Ask again in a moment."
    )
    return RequestError(Failure(503, text, type="server_error", code="upgrade_under_way"))


def uploads_too_large(size: int, limit: int) -> Failure:
    """Return a 413: the uploads of one request exceed all that the server has for uploads."""
    text = (
        f"The uploads of this request are {size} bytes; the server keeps {limit} at most (half of blob_budget_bytes)."
    )
    return Failure(413, text, param="messages", code="request_too_large")


def http_failure(status: int, detail: str, method: str, path: str) -> Failure:
    """Return a routing error (404, 405) in OpenAI's terms, with the route that is not there."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(status)
    if code:
        detail = f"There is no {method} {path[:64]}; GET /openapi.json lists what there is."
    kind = "invalid_request_error" if status < 500 else "server_error"
    return Failure(status, detail, type=kind, code=code)
