"""The time that a request's answer took here, as a span: from its opening to its end being sent."""

import time
from collections.abc import Iterable

from services.postproc.flows import Flow
from shared.tracing import REQUEST_ID, Attributes, Tracing


def record(tracing: Tracing, ended: Iterable[Flow]) -> None:
    """When their last words have been sent."""
    for flow in ended:
        trace = flow.request.trace
        if tracing.follows(trace):
            _record(tracing, flow, trace)


def _record(tracing: Tracing, flow: Flow, trace: str) -> None:
    finish = flow.last_word() if flow.answer.answered or flow.finish is None else flow.finish
    failure = finish.failure
    attributes: Attributes = {
        REQUEST_ID: flow.request_id,
        "millrace.epoch": flow.epoch,
        "millrace.shard": flow.shard,
        "gen_ai.usage.output_tokens": flow.answer.count,
        "gen_ai.response.finish_reasons": [finish.reason],
    }
    error = None if failure is None else failure.kind
    tracing.record("postprocess", trace, flow.opened, time.time(), attributes, error)
