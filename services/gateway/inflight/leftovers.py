"""Removal of what requests without a work entry have left in Redis, records and uploads: nobody else knows of it."""

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence

from redis.exceptions import RedisError

from shared import log
from shared.bus.blobs import MEDIA, Blobs
from shared.bus.records import Records
from shared.redis_errors import Action, action_for

CLEAN_UP_S = 2.0  # limit on an attempt, for which the client of a failed submission waits
MOST = 10_000  # that are remembered while Redis is away; what others left expires

logger = log.logger(__name__)


class Leftovers:
    """Requests that were not submitted, or that no stage works on any more, and that may have left something."""

    def __init__(self, records: Records, blobs: Blobs) -> None:
        self._records = records
        self._blobs = blobs
        self._left: deque[tuple[Sequence[str], Sequence[str]]] = deque(maxlen=MOST)

    def __len__(self) -> int:
        return len(self._left)

    async def remove(self, request_ids: Iterable[str], uploads: Iterable[str]) -> None:
        """Remove the records of these requests and the blobs of these keys, later if Redis does not answer.

        If an entry was written after all, the stage that takes it finds no record and drops it.
        """
        await self._remove(list(request_ids), list(uploads))

    async def remove_again(self) -> None:
        """Remove what could not be removed before, or stop at the first that still cannot be."""
        for _ in range(len(self._left)):
            if not await self._remove(*self._left.popleft()):
                return

    async def _remove(self, request_ids: Sequence[str], uploads: Sequence[str]) -> bool:
        """Return False if Redis did not answer."""
        try:
            async with asyncio.timeout(CLEAN_UP_S):
                await self._records.delete(request_ids)
                await self._blobs.delete(MEDIA, uploads)
        except (RedisError, TimeoutError) as error:
            fields = {"request_ids": request_ids, "error": str(error)}
            if isinstance(error, RedisError) and action_for(error) is Action.END:
                logger.warning("could not remove what a failed submission left in Redis; it will expire", extra=fields)
                return True
            logger.warning("could not remove what a failed submission left in Redis; retrying", extra=fields)
            self._left.append((request_ids, uploads))
            return False
        return True
