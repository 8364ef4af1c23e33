"""The end of a response: stored, or derived from what the pipeline keeps of its request.

Nobody has to be there when an answer ends. Its record and journal outlive it for as long as responses are kept; whoever
asks next puts the answer together from them and stores it. Once it is stored, they are let go.
"""

import time

import msgspec
from redis.exceptions import RedisError

from services.gateway.dialects.collected import CollectedChoice
from services.gateway.dialects.responses.answered import Answered, failed
from services.gateway.dialects.responses.responses import collected
from services.gateway.errors import SHUTTING_DOWN
from services.gateway.inflight.pipeline import Pipeline
from services.gateway.inflight.registry import OpenRequests
from services.gateway.inflight.request import OpenRequest
from services.gateway.inflight.stored import StoredRequest
from services.gateway.responses.store import ResponseStore, StoredHead
from shared import log
from shared.errors import Failure, RequestError

GONE = Failure(
    500,
    "This response ended without an answer, and nobody was there to keep the reason: it failed, or its time was over.",
    type="server_error",
    code="response_lost",
)
NOT_FOUND = 404

logger = log.logger(__name__)


class Ends(msgspec.Struct, frozen=True):
    """Finder and keeper of the ends of responses."""

    store: ResponseStore
    pipeline: Pipeline
    open_requests: OpenRequests

    async def find_said(self, request_id: str, head: StoredHead) -> Answered | StoredRequest:
        """Return the same as `find`, without log-probabilities: no prompt has them.

        Raises:
            RequestError: 503, Redis or the stages do not answer.
        """
        if (end := await self.store.end(request_id, logprobs=False)) is not None:
            return end
        found = await self.find(request_id, head)
        return msgspec.structs.replace(found, logprobs=()) if isinstance(found, Answered) else found

    async def find(self, request_id: str, head: StoredHead) -> Answered | StoredRequest:
        """Return how a response has ended, or its request if it runs.

        Raises:
            RequestError: 503, Redis or the stages do not answer.
        """
        if (end := await self.store.end(request_id)) is not None:
            return end
        stored = await self._request(request_id, head.owner)
        if stored is None:  # it may have ended a moment ago
            return await self.store.end(request_id) or Answered(failure=GONE)
        if not stored.ended:
            return stored
        end = await self._collect(stored)
        await self.keep(request_id, head.owner, end)
        return end

    async def keep(self, request_id: str, owner: str, end: Answered) -> None:
        """Store an end. If that fails, the next reader derives it again."""
        try:
            await self.store.put_end(request_id, owner, end)
            await self.pipeline.shorten(request_id)
        except (RedisError, RequestError) as error:
            fields = {"request_id": request_id, "error": str(error)}
            logger.warning("could not store the end of a response; it is derived when it is read", extra=fields)

    async def keep_if_abandoned(self, open_request: OpenRequest) -> None:
        """Store that a request is cancelled whose client has left, if it is about to be."""
        if self.open_requests.is_abandoned(open_request) and await self.pipeline.is_alone(open_request.id):
            await self.keep(open_request.id, open_request.answer_format.owner, Answered(cancelled=True))

    async def _request(self, request_id: str, owner: str) -> StoredRequest | None:
        try:
            return await self.pipeline.find(request_id, owner)
        except RequestError as error:
            if error.failure.status != NOT_FOUND:
                raise
            return None

    async def _collect(self, stored: StoredRequest) -> Answered:
        async with self.open_requests.rejoin(stored, stored.answer_format, False) as open_request:
            choice = CollectedChoice()
            while not open_request.done:
                for _, delta in await open_request.queue.next_deltas():
                    choice.add(delta)
            if open_request.failure is not None:
                raise RequestError(open_request.failure)
            return collected(choice, open_request, int(time.time()))


def end_of(failure: Failure | None) -> Answered | None:
    """Return the end of a response that a failure is; None if it goes on behind it."""
    if failure is None or failure is SHUTTING_DOWN:
        return None
    return failed(failure)
