"""A request's time in this engine as spans: it waits, its prompt is computed, its tokens are generated."""

from services.engine.transport.pending import PendingRequest
from shared.bus.records import TOKEN_BYTES
from shared.tracing import REQUEST_ID, Attributes, Tracing

LOST = "lost"  # another replica has it now


def record(tracing: Tracing, pending: PendingRequest, now: float, error: str | None = None) -> None:
    """When a request leaves, in whatever way. `now` in unix seconds; `error`: why, where it has not ended."""
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
    """Seconds in each phase it came to: queue, prefill, decode."""
    phases = _phases(pending)
    return {name: stop - start for (name, start, _), stop in zip(phases, _stops(phases, pending, now), strict=True)}


def _stops(phases: list[tuple[str, float, Attributes]], pending: PendingRequest, now: float) -> list[float]:
    return [start for _, start, _ in phases[1:]] + [now if pending.end is None else pending.end.at]


def _phases(pending: PendingRequest) -> list[tuple[str, float, Attributes]]:
    """(name, start, attributes) of what it came to; each lasts until the next."""
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
    """When it came into the stream, by Redis's clock. What another engine has had waits here since we took it."""
    taken = pending.timeline.taken
    return taken if pending.epoch > 1 else min(taken, int(pending.entry_id.partition("-")[0]) / 1000)
