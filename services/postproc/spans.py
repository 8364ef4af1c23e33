"""Spans of requests in postproc: from a request's opening to the sending of its last delta."""

import time
from collections.abc import Iterable

from services.postproc.request_state import RequestState
from shared.tracing import REQUEST_ID, Attributes, Tracing


def record(tracing: Tracing, ended: Iterable[RequestState]) -> None:
    """Record the spans of requests whose last delta was sent."""
    for state in ended:
        trace = state.request.trace
        if tracing.follows(trace):
            _record(tracing, state, trace)


def _record(tracing: Tracing, state: RequestState, trace: str) -> None:
    finish = state.finish_to_record() if state.answer.succeeded or state.finish is None else state.finish
    failure = finish.failure
    attributes: Attributes = {
        REQUEST_ID: state.request_id,
        "millrace.epoch": state.epoch,
        "millrace.shard": state.shard,
        "gen_ai.usage.output_tokens": state.answer.count,
        "gen_ai.response.finish_reasons": [finish.reason],
    }
    error = None if failure is None else failure.kind
    tracing.record("postprocess", trace, state.opened_at, time.time(), attributes, error)
