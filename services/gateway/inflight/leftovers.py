"""Removal of what requests without a work entry have left in Redis, records and uploads: nobody else knows of it."""

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from redis.exceptions import RedisError

from shared import log
from shared.bus.blobs import MEDIA, Blobs
from shared.bus.records import Records
from shared.redis_errors import Action, action_for

CLEAN_UP_S = 2.0  # limit on an attempt, for which the client of a failed submission waits
MOST = 10_000  # that are remembered while Redis is away; what others left expires

logger = log.logger(__name__)


class Left(NamedTuple):
    """Records and uploads that requests may have left."""

    request_ids: Sequence[str]
    uploads: Sequence[str]
    runs: bool  # if the requests are there they stay: somebody may have come back to them


class Leftovers:
    """Requests that were not submitted, or that no stage works on any more, and that may have left something."""

    def __init__(self, records: Records, blobs: Blobs) -> None:
        self._records = records
        self._blobs = blobs
        self._left: deque[Left] = deque(maxlen=MOST)
        self._removing_again = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._left)

    async def remove(self, request_ids: Iterable[str], uploads: Iterable[str]) -> None:
        """Remove the records of these requests and the blobs of these keys, later if Redis does not answer.

        If an entry was written after all, the stage that takes it finds no record and drops it.
        """
        await self._remove(Left(list(request_ids), list(uploads), runs=False))

    async def remove_unless_submitted(self, request_ids: Iterable[str], uploads: Iterable[str]) -> None:
        """Remove the blobs of these keys, in the same way, unless one of these requests has a record.

        Then it was submitted, and runs: under its Idempotency-Key its client may already read it over another
        connection.
        """
        await self._remove(Left(list(request_ids), list(uploads), runs=True))

    async def remove_again(self) -> None:
        """Remove what could not be removed before, or stop at the first that still cannot be."""
        async with self._removing_again:  # who comes second has to find it removed
            for _ in range(len(self._left)):
                if not await self._remove(self._left.popleft()):
                    return

    async def _remove(self, left: Left) -> bool:
        """Return False if Redis did not answer."""
        try:
            async with asyncio.timeout(CLEAN_UP_S):
                await self._try(left)
        except (RedisError, TimeoutError) as error:
            if isinstance(error, RedisError) and action_for(error) is Action.END:
                fields = {"request_ids": left.request_ids, "error": str(error)}
                logger.warning("could not remove what a failed submission left in Redis; it will expire", extra=fields)
                return True
            self._postpone(left, str(error))
            return False
        except asyncio.CancelledError:
            self._postpone(left, "the submission took too long with this, or its client left")
            raise
        return True

    def _postpone(self, left: Left, reason: str) -> None:
        fields = {"request_ids": left.request_ids, "error": reason}
        logger.warning("could not remove what a failed submission left in Redis; retrying", extra=fields)
        self._left.append(left)

    async def _try(self, left: Left) -> None:
        if left.runs:
            if await self._records.exists(left.request_ids):
                return
        else:
            await self._records.delete(left.request_ids)
        await self._blobs.delete(MEDIA, left.uploads)
