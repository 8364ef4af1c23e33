"""The model's thread, seen from the event loop: it loads, says so, and works until it is told to stop or fails."""

import asyncio
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from shared.log import logger

T = TypeVar("T")

_log = logger(__name__)


class ModelThread(Generic[T]):
    """Loading and running share a thread, so that a device's context has one owner. A daemon: a process that is told
    to stop while it loads does not wait for the rest."""

    def __init__(self, load: Callable[[], T], run: Callable[[T], None]) -> None:
        self._load = load
        self._run = run
        self._loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._main, name="model", daemon=True)

    async def start(self) -> None:
        """Return when it has loaded; raises what loading raised."""
        self._thread.start()
        await self._loaded

    async def watch(self) -> None:
        """Return when it has stopped; raises what running raised."""
        await asyncio.shield(self._ended)

    def _main(self) -> None:
        reached = self._loaded
        try:
            loaded = self._load()
            self._tell(reached, None)
            reached = self._ended
            self._run(loaded)
            self._tell(reached, None)
        except BaseException as failure:
            _log.exception("the model's thread failed")
            self._tell(reached, failure)

    def _tell(self, future: "asyncio.Future[None]", failure: BaseException | None) -> None:
        def settle() -> None:
            if future.done():
                return
            if failure is None:
                future.set_result(None)
            else:
                future.set_exception(failure)

        # Told to stop while it loaded, it may find the loop gone.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(settle)
