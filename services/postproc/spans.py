"""The time that a request's answer took here, as a span: from its opening to its end being sent."""

import time
from collections.abc import Iterable

from services.postproc.request_states import RequestState
from shared.tracing import REQUEST_ID, Attributes, Tracing


def record(tracing: Tracing, ended: Iterable[RequestState]) -> None:
    """When their last words have been sent."""
    for state in ended:
        trace = state.request.trace
        if tracing.follows(trace):
            _record(tracing, state, trace)


def _record(tracing: Tracing, state: RequestState, trace: str) -> None:
    finish = state.last_word() if state.answer.answered or state.finish is None else state.finish
    failure = finish.failure
    attributes: Attributes = {
        REQUEST_ID: state.request_id,
        "millrace.epoch": state.epoch,
        "millrace.shard": state.shard,
        "gen_ai.usage.output_tokens": state.answer.count,
        "gen_ai.response.finish_reasons": [finish.reason],
    }
    error = None if failure is None else failure.kind
    tracing.record("postprocess", trace, state.opened, time.time(), attributes, error)
