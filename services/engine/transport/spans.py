"""Trace spans of a request in this engine: queue, prefill, decode."""

from services.engine.transport.pending import PendingRequest
from shared.bus.records import TOKEN_BYTES
from shared.tracing import REQUEST_ID, Attributes, Tracing

LOST = "lost"  # another replica owns it


def record(tracing: Tracing, pending: PendingRequest, now: float, error: str | None = None) -> None:
    """Record the spans of a request that leaves. `now`: unix seconds; `error`: why, if it leaves without an end."""
    trace, end = pending.message.request.trace, pending.end
    if not tracing.follows(trace):
        return
    phases = _phases(pending)
    for (name, start, attributes), stop in zip(phases, _stops(phases, pending, now), strict=True):
        about = {**_about(pending), **attributes}
        if name != phases[-1][0]:
            tracing.record(name, trace, start, stop, about)
        elif end is None:
            tracing.record(name, trace, start, stop, about, error)
        else:
            ended: Attributes = {"gen_ai.response.finish_reasons": [end.reason]}
            tracing.record(name, trace, start, stop, {**about, **ended}, end.error)


def durations(pending: PendingRequest, now: float) -> dict[str, float]:
    """Return the seconds in each phase that the request reached: queue, prefill, decode."""
    phases = _phases(pending)
    return {name: stop - start for (name, start, _), stop in zip(phases, _stops(phases, pending, now), strict=True)}


def _stops(phases: list[tuple[str, float, Attributes]], pending: PendingRequest, now: float) -> list[float]:
    return [start for _, start, _ in phases[1:]] + [now if pending.end is None else pending.end.at]


def _phases(pending: PendingRequest) -> list[tuple[str, float, Attributes]]:
    """Return (name, start, attributes) of each phase that the request reached; each lasts until the next."""
    times = pending.timeline
    phases: list[tuple[str, float, Attributes]] = [("queue", _queued_at(pending), {})]
    if times.scheduled is not None:
        counts = {
            "gen_ai.usage.input_tokens": len(pending.message.prompt) // TOKEN_BYTES,
            "gen_ai.usage.cache_read.input_tokens": times.cached_tokens,
            "millrace.resumed_tokens": times.resumed_tokens,
        }
        phases.append(("prefill", times.scheduled, counts))
    if times.first_token is not None:
        counts = {"millrace.preemptions": times.preemptions}
        if pending.end is not None:
            counts["gen_ai.usage.output_tokens"] = pending.end.generated
        phases.append(("decode", times.first_token, counts))
    return phases


def _about(pending: PendingRequest) -> Attributes:
    return {REQUEST_ID: pending.request_id, "millrace.epoch": pending.epoch, "millrace.attempt": pending.attempts}


def _queued_at(pending: PendingRequest) -> float:
    """Return when its entry was written, by Redis's clock, or for a redelivered request when this engine read it."""
    taken = pending.timeline.taken
    return taken if pending.epoch > 1 else min(taken, int(pending.entry_id.partition("-")[0]) / 1000)
