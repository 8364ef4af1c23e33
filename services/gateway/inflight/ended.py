"""Count of ended requests by outcome, which alerts and panels ask: the status of a stream says nothing of its end."""

from collections.abc import Mapping

from prometheus_client import Counter

from services.gateway.errors import LOST, TIMED_OUT
from services.gateway.inflight.request import ChoiceState, OpenRequest
from shared.errors import Failure

CANCELLED, CLIENT_ERROR, TIMEOUT, ERROR, LOST_REQUEST = "cancelled", "client_error", "timeout", "error", "lost"
OUTCOMES = ("stop", "length", "tool_calls", CANCELLED, CLIENT_ERROR, TIMEOUT, ERROR, LOST_REQUEST)


class EndedRequests:
    """Counter of this gateway's requests, each once: when it is refused, or when its answer has ended."""

    def __init__(self, counter: Counter, model: str, endpoints: Mapping[str, str]) -> None:
        """Take the model's name for clients, and the paths of the APIs by the names of their dialects."""
        self._counter = counter
        self._model = model
        self._endpoints = endpoints
        for path in endpoints.values():
            for outcome in OUTCOMES:
                counter.labels(model, path, outcome)  # at zero, so that the first one is an increase

    def count_refusal(self, method: str, path: str, failure: Failure) -> None:
        """Count a request that was refused before it was submitted, if it was one to an API."""
        if method == "POST" and path in self._endpoints.values():
            self._count(path, outcome_of(failure))

    def count_end(self, open_request: OpenRequest, goes_on: bool) -> None:
        """Count a request that leaves the registry. `goes_on`: without its reader, who may come back.

        Where several connections read one answer, the one that submitted it counts, and each that is told of a failure.
        """
        if not _was_submitted(open_request) or (open_request.rejoined and open_request.failure is None):
            return
        ended = all(choice.ended for choice in open_request.choices)
        path = self._endpoints[open_request.answer_format.dialect]
        if goes_on and not ended:
            return
        if open_request.failure is not None:
            self._count(path, outcome_of(open_request.failure))
        else:
            self._count(path, open_request.choices[0].finish_reason or ERROR if ended else CANCELLED)

    def _count(self, path: str, outcome: str) -> None:
        self._counter.labels(self._model, path, outcome).inc()


def outcome_of(failure: Failure) -> str:
    """Return the outcome of a request that failed."""
    if failure.code == LOST.code:
        return LOST_REQUEST
    if failure.status == TIMED_OUT.status:
        return TIMEOUT
    return CLIENT_ERROR if failure.status < 500 else ERROR


def _was_submitted(open_request: OpenRequest) -> bool:
    return any(choice.state is not ChoiceState.NEW for choice in open_request.choices)
