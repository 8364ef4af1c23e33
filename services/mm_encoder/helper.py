"""Help for other replicas: embeddings of media that they have offered, made here while this replica has nothing to do.

A request with many pictures is one entry, and one replica's to answer. That replica takes the encode locks of those it
comes to next, and offers the others, last first, to whoever is idle. The lock decides who makes each, as where two
requests show the same picture. So nobody relies on help: an offer may be lost or come to nothing, and the locks of a
helper that dies are void. Whatever is wrong with an item is its own replica's to say.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from redis.exceptions import RedisError

from shared.errors import RequestError, release_frames
from shared.log import logger
from shared.messages import Media, Offer, Offered

AT_ONCE = 2  # items: one is decoded while the other is in the tower

_log = logger(__name__)


class Helper:
    """Worker on offers of other replicas.

    `help_with` makes the embeddings of (key, media) unless somebody does or has; `idle` tells if nothing else is to do.
    """

    def __init__(self, help_with: Callable[[str, Media], Awaitable[None]], idle: Callable[[], bool]) -> None:
        self._help_with = help_with
        self._idle = idle
        self._offered: deque[Offered] = deque()
        self._arrived = asyncio.Event()

    def offer(self, message: Offer) -> None:
        """Note an offer, if there is nothing else to do."""
        if self._idle():
            self._offered.extend(message.items)
            self._arrived.set()

    async def run(self) -> None:
        """Help until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(AT_ONCE):
                tasks.create_task(self._work())

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            if not self._idle():
                self._offered.clear()
            if not self._offered:
                self._arrived.clear()
                continue
            item = self._offered.popleft()
            try:
                await self._help_with(item.key, item.media)
            except (RequestError, RedisError) as error:
                _log.info("no help with an item of another replica", extra={"key": item.key, "why": str(error)})
                release_frames(error)
            except Exception as error:
                _log.exception("help failed with an item of another replica", extra={"key": item.key})
                release_frames(error)
