"""Waiting for what a request needs before it is submitted, for no longer than its client does."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from services.gateway.errors import TIMED_OUT
from shared.errors import RequestError

T = TypeVar("T")


class ClientPatience(msgspec.Struct, frozen=True):
    """Bound on waits: `receive` says that the client has left, or `deadline` (unix seconds) passes.

    The body has been read before.
    """

    receive: Receive
    deadline: float

    async def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`, which is cancelled at the bound.

        Raises:
            ClientDisconnect: the client has left.
            RequestError: 504, the deadline has passed; or what `work` raises.
        """
        working, leaving = asyncio.create_task(work), asyncio.create_task(self._left())
        left_s = self.deadline - time.time()
        try:
            await asyncio.wait([working, leaving], timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise ClientDisconnect if leaving.done() else RequestError(TIMED_OUT)
        finally:
            for task in (working, leaving):
                task.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def _left(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
