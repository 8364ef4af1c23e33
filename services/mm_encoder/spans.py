"""Trace span of a request in this stage: from the delivery of its entry until it is forwarded or answered."""

import time

from services.mm_encoder.running import RunningRequest
from shared.errors import Failure
from shared.messages import Encode, MediaKind
from shared.tracing import REQUEST_ID, Tracing


def record(tracing: Tracing, running: RunningRequest, outcome: str | Failure) -> None:
    """Record the span of a request that has left this stage."""
    message = running.message
    trace = message.request.trace
    if not tracing.follows(trace):
        return
    attributes: dict[str, str | int] = {
        REQUEST_ID: message.request.id,
        "millrace.attempt": running.attempts,
        "millrace.images": _count(message, "image"),
        "millrace.videos": _count(message, "video"),
    }
    if running.prompt_tokens is not None:
        attributes |= {"gen_ai.usage.input_tokens": running.prompt_tokens, "millrace.cache_hits": running.hits}
    error = None
    if isinstance(outcome, Failure):
        error = outcome.kind
    else:
        attributes["millrace.outcome"] = "lost" if running.lost else outcome
    tracing.record("encode", trace, running.taken, time.time(), attributes, error)


def _count(message: Encode, kind: MediaKind) -> int:
    return sum(media.kind == kind for media in message.media)
