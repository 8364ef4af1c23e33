"""The model's thread, as the event loop sees it: it loads, reports that, and works until it is stopped or fails."""

import asyncio
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from shared.errors import CheckpointError, ConfigError
from shared.log import logger

T = TypeVar("T")

_log = logger(__name__)


class ModelThread(Generic[T]):
    """Thread that loads and runs the model, so that a device's context has one owner. A daemon: a process that is
    stopped during loading does not wait for the rest."""

    def __init__(self, load: Callable[[], T], run: Callable[[T], None]) -> None:
        self._load = load
        self._run = run
        self._loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._main, name="model", daemon=True)

    async def start(self) -> None:
        """Wait until the model is loaded; raise any exception of loading."""
        self._thread.start()
        await self._loaded

    async def watch(self) -> None:
        """Wait until the thread has stopped; raise any exception of running."""
        await asyncio.shield(self._ended)

    def _main(self) -> None:
        reached = self._loaded
        try:
            loaded = self._load()
            self._settle(reached, None)
            reached = self._ended
            self._run(loaded)
            self._settle(reached, None)
        except (CheckpointError, ConfigError) as failure:  # the service says it, as the reason why it cannot start
            self._settle(reached, failure)
        except BaseException as failure:
            _log.exception("the model's thread failed; the engine stops")
            self._settle(reached, failure)

    def _settle(self, future: "asyncio.Future[None]", failure: BaseException | None) -> None:
        def settle() -> None:
            if future.done():
                return
            if failure is None:
                future.set_result(None)
            else:
                future.set_exception(failure)

        # If the process was stopped during loading, the loop may be closed.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(settle)
